"""The block on a GPU: where its kernels apply, and the block itself."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from fewshot_asam.models.gpu_kernels.convolution import convolve
from fewshot_asam.models.gpu_kernels.norm_relu_pool import norm_relu_pool
from fewshot_asam.models.gpu_kernels.settings import current

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@cache
def available() -> bool:
    """Whether Triton is there, which PyTorch's CUDA builds bring."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels on a CPU's tensors, as `TRITON_INTERPRET=1` says before it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on tensors of that device."""
    return available() and (device.type == "cuda" or (device.type == "cpu" and interpreted()))


def applies(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `conv_block` can take images `x` and `parameters`, inside `vmap` and `grad` or outside."""
    return (
        current().triton
        and available()
        and _here(x, *parameters)
        and _understood()
        and x.dim() == 4
        and x.dtype in DTYPES
        and all(value.dtype in (x.dtype, *_cast(x)) for value in parameters)
        and len(x) > 0
        and min(x.shape[-2:]) >= 2
    )


def conv_block(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """3x3 convolution of padding 1, batch norm on batch statistics, ReLU and 2x2 max-pooling.

    **Arguments:**

    - `x`: `[n, C, H, W]`; `weight`: `[D, C, 3, 3]`; `gamma`, `beta`: the norm's weight and bias `[D]`. Inside `vmap`
      over tasks those of all tasks go through each kernel together.

    **Returns:** `[n, D, H // 2, W // 2]`.
    """
    return norm_relu_pool(conv2d(x, weight), gamma, beta, eps)


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(x, weight, padding=1)`, run as `Kernels.convolution` says where that is asked and can be."""
    how = current().convolution
    if how == "grouped" or not (_here(x, weight) and _understood()):
        return F.conv2d(x, weight, padding=1)
    for kind in _cast(x):
        x, weight = x.to(kind), weight.to(kind)
    return convolve(x, weight, how)


def _cast(x: Tensor) -> tuple[torch.dtype, ...]:
    """What autocast would have of convolutions beside `x`: its own type and float32, or nothing."""
    kind = x.device.type
    return (torch.float32, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ()


def _here(*values: Tensor) -> bool:
    """Whether all are in the memory of a GPU, or of a CPU where Triton's kernels are interpreted."""
    kinds = ("cuda", "cpu") if interpreted() else ("cuda",)
    return all(value.device.type in kinds and value.layout == torch.strided for value in values)


def _understood() -> bool:
    """Whether PyTorch transforms in no other way than by `grad`, `vmap` or `grad` inside `vmap`."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    kinds = [one.key() for one in get_interpreter_stack() or ()]
    return kinds in ([], [TransformType.Grad], [TransformType.Vmap], [TransformType.Vmap, TransformType.Grad])
