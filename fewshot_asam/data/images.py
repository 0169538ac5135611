"""The one type that every dataset loads into: uint8 images grouped by class."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewshot_asam.errors import FewShotError


@dataclass(frozen=True)
class ImageSet:
    """The images of one split, resident on one device, grouped by class.

    **Arguments:**

    - `images`: uint8 `[n, C, H, W]`; the images of class 0 first, then those of class 1, and so on.
    - `counts`: int64 `[classes]`; how many images each class has, in the same order.
    - `names`: one unique name a class.

    Raises `FewShotError` where the three do not fit together.
    """

    images: Tensor
    counts: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise FewShotError(f"images are {self.images.dtype} {list(self.images.shape)}; expected uint8 [n, C, H, W]")
        if self.counts.dtype != torch.int64 or self.counts.shape != (len(self.names),):
            raise FewShotError(
                f"counts are {self.counts.dtype} {list(self.counts.shape)}; "
                f"expected int64 [{len(self.names)}], one a class name"
            )
        if len(set(self.names)) != len(self.names):
            raise FewShotError("two classes have the same name; expected unique names")
        if int(self.counts.sum()) != len(self.images):
            raise FewShotError(f"counts add up to {int(self.counts.sum())}, but there are {len(self.images)} images")

        if len(self.names) and int(self.counts.min()) < 0:
            raise FewShotError(f"class {self.names[int(self.counts.argmin())]!r} has a negative count; expected images")

    @classmethod
    def from_arrays(cls, images: Any, labels: Any, names: Sequence[str] | None = None) -> ImageSet:
        """The image set of arrays or tensors, whatever the order of the images.

        **Arguments:**

        - `images`: uint8 `[n, C, H, W]` or `[n, H, W, C]` with 1 or 3 channels (the former where it could be both), or
          `[n, H, W]`.
        - `labels`: `n` labels of any kind: numbers, text or whatever else can be a key of a dict.
        - `names`: one unique name a class, in the order of the labels; if not given, the labels as text.

        **Returns:** classes in the order of their labels, or of their first images where labels have no order; within
        a class the images are as they were given. Raises `FewShotError` where the arguments are not as described.
        """
        pixels, keys = _channels_first(images), _keys(labels)
        if len(keys) != len(pixels):
            raise FewShotError(f"there are {len(keys)} labels for {len(pixels)} images; expected one each")
        known = _in_order(keys)
        texts = tuple(map(str, known if names is None else names))
        if len(texts) != len(known):
            raise FewShotError(f"there are {len(texts)} names for {len(known)} different labels; expected one each")
        numbers = {key: number for number, key in enumerate(known)}
        of_images = np.array([numbers[key] for key in keys])
        ordered = torch.from_numpy(pixels[of_images.argsort(kind="stable")])
        return cls(ordered, torch.from_numpy(np.bincount(of_images)), texts)

    def of_classes(self, names: Collection[str]) -> ImageSet:
        """The images of some classes, in the order that they have here."""
        chosen = torch.tensor([name in names for name in self.names], device=self.counts.device)
        kept = tuple(name for name in self.names if name in names)
        return ImageSet(self.images[chosen.repeat_interleave(self.counts)], self.counts[chosen], kept)

    @property
    def starts(self) -> Tensor:
        """int64 `[classes]`: the index of each class's first image."""
        return self.counts.cumsum(0) - self.counts

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageSet:
        """The same images on another device."""
        return replace(self, images=self.images.to(device), counts=self.counts.to(device))


def joined(parts: Sequence[ImageSet]) -> ImageSet:
    """The classes of several image sets of one shape as one; raises `FewShotError` where a name stands twice."""
    images, counts = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "counts"))
    return ImageSet(images, counts, tuple(name for part in parts for name in part.names))


@dataclass(frozen=True)
class Dataset:
    """Three splits with disjoint classes: meta-training, meta-validation and meta-testing."""

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: Any,
        labels: Any,
        names: Sequence[str] | None = None,
        *,
        seed: int = 0,
        fractions: Sequence[float] = (0.64, 0.16, 0.2),
    ) -> Dataset:
        """The dataset of arrays or tensors that `ImageSet.from_arrays` takes, its classes divided by a seed.

        **Arguments:**

        - `name`: of the dataset.
        - `seed`: which classes go to which split.
        - `fractions`: the shares of the classes in train, val and test; they add up to 1.

        Raises `FewShotError` as `ImageSet.from_arrays` does, and where a split gets no class.
        """
        every = ImageSet.from_arrays(images, labels, names)
        parts = divide(every.names, seed, fractions)
        if not all(parts):
            sizes = ", ".join(str(len(part)) for part in parts)
            raise FewShotError(
                f"fractions {tuple(fractions)} of {len(every.names)} classes are {sizes}; expected at least one each"
            )
        return cls(name, *map(every.of_classes, parts))

    def to(self, device: torch.device | str) -> Dataset:
        """The same dataset on another device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def divide(names: Sequence[str], seed: int, fractions: Sequence[float]) -> list[list[str]]:
    """The names of train, val and test, each sorted, chosen by a seed in shares that add up to 1.

    Raises `FewShotError` where the seed or the fractions are none.
    """
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise FewShotError(f"seed is {seed!r}; expected a whole number, at least 0 and below 2**63")
    shares = fractions if isinstance(fractions, Sequence) else ()
    if len(shares) != 3 or not all(map(_is_positive, shares)) or not math.isclose(sum(shares), 1):
        raise FewShotError(f"fractions are {fractions}; expected three positive shares that add up to 1")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(int(seed))).tolist()
    first, second = (round(len(names) * share) for share in (shares[0], shares[0] + shares[1]))
    return [sorted(names[i] for i in part) for part in (order[:first], order[first:second], order[second:])]


def is_whole(value: object) -> bool:
    """Whether it is a whole number, numpy's included."""
    return isinstance(value, Integral)


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and float(value) > 0


def _channels_first(images: Any) -> NDArray[np.uint8]:
    try:
        pixels = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images)
    except (TypeError, ValueError) as error:
        raise FewShotError(f"images are no array ({error}); expected uint8 [n, C, H, W], all of one size") from error
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape:
        hint = "; multiply images in [0, 1] by 255" if pixels.dtype.kind == "f" else ""
        raise FewShotError(
            f"images are {pixels.dtype} {list(pixels.shape)}; expected uint8 [n, C, H, W] or [n, H, W, C] of 1 or 3 "
            f"channels, or [n, H, W]{hint}"
        )
    return np.ascontiguousarray(pixels)


def _keys(labels: Any) -> list[Any]:
    plain = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    if not isinstance(plain, Iterable) or isinstance(plain, str):
        raise FewShotError(f"labels are a {type(labels).__name__}; expected one label an image")
    keys = list(plain)
    try:
        if odd := [key for key in dict.fromkeys(keys) if key is None or bool(key != key)]:
            raise FewShotError(f"a label is {odd[0]}; expected one label an image")
    except (TypeError, ValueError, RuntimeError) as error:
        raise FewShotError(f"a label cannot be told from another ({error}); expected numbers or text") from error
    return keys


def _in_order(keys: list[Any]) -> list[Any]:
    """The different keys, sorted where they can be."""
    known = list(dict.fromkeys(keys))
    try:
        return sorted(known)
    except TypeError:
        return known
