"""The images that a model takes."""

from __future__ import annotations

from fewshot_asam.errors import FewShotError

Shape = tuple[int, int, int]
"""Of an image: `(C, H, W)`."""


def checked(image_shape: Shape, hidden: int) -> Shape:
    """The shape of images that four poolings leave something of; else raises `FewShotError`."""
    if min(image_shape[1:]) < 16:
        raise FewShotError(f"images are {image_shape[1]}x{image_shape[2]}; four poolings need sides of at least 16")
    if hidden < 1:
        raise FewShotError(f"hidden is {hidden}; expected at least 1 filter")
    return image_shape
