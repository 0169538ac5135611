"""Calls of the compiled functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fewshot_asam.errors import FewShotError
from fewshot_asam.models.cpu_kernels.build import library
from fewshot_asam.models.cpu_kernels.signatures import FIRST, KINDS, LAYOUT_OF, SIGNATURES, TYPE_OF, Shape, shapes

NHWC = torch.channels_last


def call(name: str, y: Tensor, *arguments: Tensor | float, channels: int = 0) -> None:
    """Calls a compiled function with the addresses of tensors, all of them dense and 4-d images channels-last.

    **Arguments:**

    - `name`: a key of `SIGNATURES`, without the channels.
    - `y`: a tensor with the shape and the type of the convolution's result.
    - `channels`: of the images that are convolved.
    """
    name = f"{name}_{channels}" if name in FIRST else name
    n, filters, height, width = y.shape
    expected = shapes(y.shape, channels, y.dtype)
    given = [
        value if isinstance(value, float) else _address(argument, value, expected[LAYOUT_OF[argument]], y.dtype)
        for argument, value in zip(SIGNATURES[name].split(), arguments, strict=True)
    ]
    shape = Shape(n, height, width, filters, torch.get_num_threads(), channels)
    getattr(library(), f"{name}_{KINDS[y.dtype]}")(shape, *given)


def _address(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of the first number of `value`, once it is sure to have that shape and type and no gaps."""
    dtype = TYPE_OF.get(name, dtype)
    images = LAYOUT_OF[name] in ("images", "dense", "pooled")
    if (
        value.shape == shape
        and value.dtype == dtype
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.is_contiguous(memory_format=NHWC if images else torch.contiguous_format)
        and not value.is_neg()
    ):
        address = value.data_ptr()
        if address:
            return address
    raise FewShotError(
        f"the fused block was given {name} of shape {tuple(value.shape)}, {value.dtype} on {value.device}, strides "
        f"{value.stride() if value.layout == torch.strided else value.layout}; expected {shape}, {dtype} in the CPU's "
        "memory without gaps; fewshot_asam.models.cpu_kernels.disabled() runs the block in plain PyTorch"
    )


def pooled(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    n, channels, height, width = y.shape
    shape = (n, channels, height // 2, width // 2)
    return torch.empty(shape, dtype=dtype or y.dtype, device=y.device, memory_format=NHWC)


def doubles(y: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=y.device)


def channels_last(x: Tensor) -> Tensor:
    """The same images channels-last; strides of one channel fit every format and are made to say so."""
    if x.shape[1] > 1 or x.requires_grad:
        return x.contiguous(memory_format=NHWC)
    x = x.contiguous()
    return x.as_strided(x.shape, (x.shape[2] * x.shape[3], 1, x.shape[3], 1))
