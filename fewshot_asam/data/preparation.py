"""Anyone's images as those that a run was trained on: uint8, of its size and channels, ink light on dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fewshot_asam.data.archives import decode_image, read_file, squashed
from fewshot_asam.errors import FewShotError

Picture: TypeAlias = "str | Path | Image.Image | Tensor | NDArray[Any]"
"""A file, a Pillow image, or an array as one of those that `prepared` takes."""
Label = Any
"""Anything hashable: a string, a number, ..."""
Shape = tuple[int, int, int]
"""Of an image: `(C, H, W)`."""
LISTED = 5
"""How many unreadable files a message names."""
LEAST_CONTRAST = 25
"""Between paper and ink, of 255: below, a page has no ink."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an array with so many channels."""


def prepared(
    pictures: Picture | Sequence[Picture], shape: Shape, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Tensor:
    """The pictures as uint8 `[n, C, H, W]`, `n >= 1`, on the CPU.

    What has another size or other channels is squashed and converted as the dataset `folder` does it; floats are
    rounded to the 8 bits that every dataset has.

    **Arguments:**

    - `pictures`: an array or tensor `[n, C, H, W]` or `[n, H, W, C]`, uint8 or floats in `[0, 1]`; or a sequence, or
        one, of files, Pillow images and arrays `[C, H, W]` or `[H, W, C]`. Where both orders of an array's axes are
        possible, channels come first.
    - `shape`: `(C, H, W)`.
    - `resample`: Pillow's filter.

    Raises `FewShotError` where there is none or they are not as described; it names all files that cannot be read.
    """
    if isinstance(pictures, Tensor | np.ndarray):
        return _from_array(pictures, shape, resample)
    if isinstance(pictures, str | Path | Image.Image):
        pictures = [pictures]
    if not isinstance(pictures, Sequence):
        raise FewShotError(f"images are a {type(pictures).__name__}; expected an array, or a list of files or images")
    if not pictures:
        raise FewShotError("no images were given; expected at least one")
    found: list[Tensor] = []
    problems: list[str] = []
    for picture in pictures:
        try:
            found.append(_one(picture, shape, resample))
        except FewShotError as error:
            problems.append(str(error))
    if len(problems) > 1:
        reasons = [problem.partition("; expected")[0] for problem in problems[:LISTED]]
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise FewShotError(f"{len(problems)} images cannot be used: {', '.join(reasons)}{more}; mend or remove them")
    if problems:
        raise FewShotError(problems[0])
    return torch.cat(found)


def scaled(images: Tensor, device: torch.device) -> Tensor:
    """uint8 as float32 in `[0, 1]`, on the device."""
    return images.to(device).to(torch.float32) / 255


def dark_on_light(images: Tensor) -> bool:
    """Whether drawings, uint8 `[n, C, H, W]`, are dark ink on lighter paper.

    Most pixels are paper, so the median is, and ink moves the mean away from it; how well the paper is lit changes
    nothing.
    """
    pixels = images.flatten(1).double()
    return bool((pixels.mean(1) - pixels.median(1).values).mean() < 0)


def ink_on_paper(images: Tensor) -> Tensor:
    """Drawings of dark ink on lighter paper, uint8 `[n, C, H, W]`, as ink 255 on paper 0, however each is lit."""
    pixels = images.flatten(1).float()
    paper, darkest = pixels.median(1, keepdim=True).values, pixels.amin(1, keepdim=True)
    ink = (paper - pixels) / (paper - darkest).clamp_min(LEAST_CONTRAST)
    return (255 * ink).clamp(0, 255).round().to(torch.uint8).view_as(images)


def numbered(labels: Iterable[Label], count: int) -> tuple[tuple[Label, ...], Tensor]:
    """The classes in the order in which they are first met, and each image's, int64 `[count]`."""
    found = [label.item() if hasattr(label, "item") else label for label in labels]  # numbers of NumPy and PyTorch
    if len(found) != count:
        raise FewShotError(f"{count} images and {len(found)} labels were given; expected one label an image")
    try:
        numbers = {label: number for number, label in enumerate(dict.fromkeys(found))}
    except TypeError as error:
        raise FewShotError(f"labels cannot be told apart ({error}); expected strings, numbers or the like") from error
    if len(numbers) < 2:
        raise FewShotError(f"all images have the label {found[0]!r}; expected images of at least two classes")
    return tuple(numbers), torch.tensor([numbers[label] for label in found])


def _one(picture: Picture, shape: Shape, resample: Image.Resampling) -> Tensor:
    if isinstance(picture, Tensor | np.ndarray):
        return _from_array(picture[None], shape, resample)
    mode, size = _mode(shape), shape[1:]
    if isinstance(picture, str | Path):
        return torch.from_numpy(decode_image(read_file(Path(picture)), str(picture), mode, size, resample))[None]
    if not isinstance(picture, Image.Image):
        raise FewShotError(f"an image is a {type(picture).__name__}; expected a file, a Pillow image or an array")
    try:
        return torch.from_numpy(squashed(picture, mode, size, resample))[None]
    except Exception as error:  # of any kind: a file that Pillow opened is read only now
        raise FewShotError(f"a Pillow image cannot be read ({error}); expected an undamaged one") from error


def _mode(shape: Shape) -> Any:
    if shape[0] not in (1, 3):
        raise FewShotError(f"the run's images have {shape[0]} channels, which no file has; pass arrays {list(shape)}")
    return MODES[shape[0]]


def _from_array(given: Tensor | NDArray[Any], shape: Shape, resample: Image.Resampling) -> Tensor:
    pixels = _eight_bits(given)
    if pixels.shape[1:] == shape:
        return torch.from_numpy(pixels.copy())
    last = pixels if pixels.shape[1] not in MODES else pixels.transpose(0, 2, 3, 1)
    if last.shape[1:] == (*shape[1:], shape[0]):
        return torch.from_numpy(last.transpose(0, 3, 1, 2).copy())
    if last.shape[3] not in MODES or 0 in last.shape:
        raise FewShotError(
            f"images are {list(given.shape)}; expected [n, C, H, W] or [n, H, W, C] with 1, 3 or 4 channels, or the "
            f"run's own {list(shape)} each"
        )
    mode = _mode(shape)
    opened = (Image.fromarray(np.ascontiguousarray(one.squeeze(2) if last.shape[3] == 1 else one)) for one in last)
    return torch.from_numpy(np.stack([squashed(image, mode, shape[1:], resample) for image in opened]))


def _eight_bits(given: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    if given.ndim != 4:
        raise FewShotError(
            f"images are {list(given.shape)}; expected four dimensions: one image as images[None], grey ones as "
            "images[:, None]"
        )
    if len(given) == 0:
        raise FewShotError("no images were given; expected at least one")
    if isinstance(given, Tensor):
        given = (given.detach().float() if given.is_floating_point() else given.detach()).cpu().numpy()
    if given.dtype == np.uint8:
        return given
    if not np.issubdtype(given.dtype, np.floating):
        raise FewShotError(f"images are {given.dtype}; expected uint8, or floats from 0 to 1")
    if not (given.min() >= 0 and given.max() <= 1):  # false for NaN too
        raise FewShotError(
            f"images are floats from {given.min():g} to {given.max():g}; expected 0 to 1, not normalised by a mean"
        )
    eight: NDArray[np.uint8] = np.rint(given * 255).astype(np.uint8)
    return eight
