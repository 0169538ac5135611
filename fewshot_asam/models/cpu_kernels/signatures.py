"""What the compiled functions take: the names of their arguments, and the shape and type that each name stands for."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

CHANNELS = (1, 3)
"""Of the images that `input_block.cpp` is compiled for."""
REGISTER = 64
"""Bytes of the vectors that the functions are written in; `input_block.cpp` takes filters two vectors at a time."""
KINDS = {torch.float32: "float", torch.float64: "double"}

TAIL = {
    "tail_forward": "eps y gamma beta best out place mean rstd",
    "tail_backward": "g place best y gamma mean rstd gy sums",
    "tail_double_backward": "hy hgamma hbeta g place best y gamma mean rstd sums gg ggamma gy",
}
FIRST = {
    "first_moments": "padded moments",
    "first_forward": "eps padded filters gamma beta best out place mean rstd",
    "first_backward": "padded filters moments g place best gamma mean rstd gfilters gathered sums",
    "first_double_backward": (
        "hfilters hgamma hbeta padded filters moments place best gamma mean rstd gathered sums gg ggamma gfilters"
    ),
}
CONVOLUTION = {
    "conv_forward": "x weight y",
    "conv_input_gradient": "gy weight gx",
    "conv_weight_gradient": "x gy gweight",
}
SIGNATURES = (
    CONVOLUTION | TAIL | {f"{name}_{channels}": names for name, names in FIRST.items() for channels in CHANNELS}
)

LAYOUTS = {
    "images": "x gx",
    "weight": "weight gweight",
    "dense": "y hy gy",
    "pooled": "g gg best out place",
    "by channel": "gamma beta hgamma hbeta ggamma mean rstd",
    "pair": "sums",
    "filters": "filters hfilters gfilters gathered",
    "padded": "padded",
    "moments": "moments",
}
LAYOUT_OF = {name: layout for layout, names in LAYOUTS.items() for name in names.split()}
TYPE_OF = dict.fromkeys(("mean", "rstd", "sums", "gathered", "moments"), torch.float64) | {"place": torch.uint8}
"""Of the arguments whose type is not that of the images."""


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "height", "width", "channels", "threads", "inputs")]


def moments_shape(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of the second moments of patches, with a column for their sums, in whole vectors."""
    patch, lanes = 9 * channels, REGISTER // dtype.itemsize
    return patch, (patch + lanes) // lanes * lanes


@lru_cache(maxsize=256)
def shapes(y: torch.Size, channels: int, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """The shape of each layout, for a convolution's result `y` from images of so many channels."""
    n, filters, height, width = y
    return {
        "images": (n, channels, height, width),
        "weight": (filters, channels, 3, 3),
        "dense": (n, filters, height, width),
        "pooled": (n, filters, height // 2, width // 2),
        "by channel": (filters,),
        "pair": (2, filters),
        "filters": (3, 3, channels, filters),
        "padded": (n, height + 2, width + 2, channels),
        "moments": moments_shape(channels, dtype),
    }


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Types of the arguments of every function; an `OSError` where one is missing."""
    for name, names in SIGNATURES.items():
        types = [ctypes.c_double if argument == "eps" else ctypes.c_void_p for argument in names.split()]
        for kind in KINDS.values():
            try:
                function = getattr(library, f"{name}_{kind}")
            except AttributeError as error:
                raise OSError(f"the compiled library has no function {name}_{kind}") from error
            function.restype, function.argtypes = None, [ctypes.POINTER(Shape), *types]
    return library
