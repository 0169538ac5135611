"""Calls of the compiled functions on tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fewshot_asam.fused.build import library

KINDS = {torch.float32: "float", torch.float64: "double"}
NHWC = torch.channels_last


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "height", "width", "channels", "threads")]


def call(name: str, y: Tensor, *arguments: Any) -> None:
    """Calls a compiled function with the addresses of tensors; all of them are dense, 4-d ones channels-last."""
    n, channels, height, width = y.shape
    shape = Shape(n, height, width, channels, torch.get_num_threads())
    given = [ctypes.c_double(a) if isinstance(a, float) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
    getattr(library(), f"{name}_{KINDS[y.dtype]}")(ctypes.byref(shape), *given)


def pooled(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    n, channels, height, width = y.shape
    return torch.empty((n, channels, height // 2, width // 2), dtype=dtype or y.dtype, memory_format=NHWC)


def channels_last(x: Tensor) -> Tensor:
    """The same images channels-last; strides of one channel fit every format and are made to say so."""
    if x.shape[1] > 1 or x.requires_grad:
        return x.contiguous(memory_format=NHWC)
    x = x.contiguous()
    return x.as_strided(x.shape, (x.shape[2] * x.shape[3], 1, x.shape[3], 1))
