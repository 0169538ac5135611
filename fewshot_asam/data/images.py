"""The one type that every dataset loads into: uint8 images grouped by class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
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


@dataclass(frozen=True)
class Dataset:
    """Three splits with disjoint classes: meta-training, meta-validation and meta-testing."""

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet

    def to(self, device: torch.device | str) -> Dataset:
        """The same dataset on another device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))
