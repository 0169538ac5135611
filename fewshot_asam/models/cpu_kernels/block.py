"""The block as autograd functions: a 3x3 convolution, and the tail that `norm_relu_pool.cpp` computes.

Each is a pair, the function and its gradient, whose own gradient is written out as well. That is what MAML needs;
derivatives beyond the second go through PyTorch's own. Under autocast to bfloat16, on a CPU that multiplies it, the
convolutions are in bfloat16, and the results that they are summed to in float32 are rounded to it; all else is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fewshot_asam.models.cpu_kernels import convolution, input_block
from fewshot_asam.models.cpu_kernels.build import library
from fewshot_asam.models.cpu_kernels.ctypes_call import call, channels_last, doubles, pooled
from fewshot_asam.models.cpu_kernels.reference import batched, gradient, gradient_of_gradient, plain_tail
from fewshot_asam.models.cpu_kernels.signatures import KINDS

_enabled = ContextVar("fused blocks", default=True)


@contextmanager
def disabled() -> Iterator[None]:
    """Blocks run in plain PyTorch within."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def available() -> bool:
    """Whether the compiled functions are there and wanted."""
    return _enabled.get() and library() is not None


def applies(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `conv_block` can take images `x` and `parameters` of the same precision.

    That is so on a CPU where each operation is to be computed and nothing else: see `_observed`.
    """
    return (
        not _observed()
        and x.dtype in KINDS
        and x.dim() == 4
        and all(_plain(value) and value.dtype == x.dtype for value in (x, *parameters))
        and len(x) > 0
        and min(x.shape[-2:]) >= 2
        and available()
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it, with which convolutions are about twice as fast."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _in_bfloat16() -> bool:
    """Whether autocast wants convolutions in bfloat16, and they gain by it."""
    wanted = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return wanted and multiplies_bfloat16()


def float32_after(x: Tensor) -> AbstractContextManager[object]:
    """Within, what follows the blocks that gave `x` is float32 too where their convolutions are in bfloat16."""
    here = x.device.type == "cpu" and x.dtype == torch.float32 and _in_bfloat16()
    return torch.autocast("cpu", enabled=False) if here else nullcontext()


def _plain(value: Tensor) -> bool:
    """Whether it has numbers in the CPU's memory, unlike sparse and fake tensors and those without storage."""
    return (
        value.device.type == "cpu"
        and value.layout == torch.strided
        and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _observed() -> bool:
    """Whether PyTorch has to see each operation: to transform, differentiate forwards, cast, record or count it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_autocast_enabled("cpu") and not _in_bfloat16())
        or torch._C._is_tracing()
        or _get_current_dispatch_mode() is not None
    )


def conv_block(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """3x3 convolution of padding 1, batch norm on batch statistics, ReLU and 2x2 max-pooling.

    **Arguments:**

    - `x`: `[n, C, H, W]`; `weight`: `[D, C, 3, 3]`; `gamma`, `beta`: the norm's weight and bias `[D]`.

    **Returns:** `[n, D, H // 2, W // 2]`, channels-last in memory, as are all tensors inside.
    """
    if input_block.applies(x, weight):
        return input_block.block(x, weight, gamma, beta, eps)
    kind = torch.bfloat16 if x.dtype == torch.float32 and _in_bfloat16() else x.dtype
    return _Tail.apply(convolution.apply(x, weight, kind), gamma, beta, eps)  # type: ignore[no-any-return]


class _Tail(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        best, out, place = pooled(y), pooled(y), pooled(y, torch.uint8)
        statistics = doubles(y, 2, len(gamma))
        call("tail_forward", y, eps, y, gamma.contiguous(), beta.contiguous(), best, out, place, *statistics)
        ctx.save_for_backward(y, gamma, beta, best, place, statistics)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        y, gamma, beta, best, place, statistics = ctx.saved_tensors
        if batched(g):
            return *gradient(partial(plain_tail, eps=ctx.eps, place=place), g, y, gamma, beta), None
        g, y, best, place = map(channels_last, (g, y, best, place))
        return *_TailBackward.apply(g, y, gamma, beta, best, place, statistics, ctx.eps), None


class _TailBackward(Function):
    """`(g, y, gamma, beta, ...) -> (gy, ggamma, gbeta)`."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, best: Tensor, place: Tensor, statistics: Tensor,
        eps: float,
    ) -> Any:  # fmt: skip
        gy, sums = torch.empty_like(y), torch.empty_like(statistics)
        call("tail_backward", y, g, place, best, y, gamma.contiguous(), *statistics, gy, sums)
        ctx.save_for_backward(g, y, gamma, beta, best, place, statistics, sums)
        ctx.eps = eps
        gbeta, ggamma = sums.to(y.dtype)
        return gy, ggamma, gbeta

    @staticmethod
    def backward(ctx: Any, hy: Tensor, hgamma: Tensor, hbeta: Tensor) -> Any:
        g, y, gamma, beta, best, place, statistics, sums = ctx.saved_tensors
        tail = partial(plain_tail, eps=ctx.eps, place=place)
        if batched(hy, hgamma, hbeta):
            return *gradient(partial(gradient, tail), (hy, hgamma, hbeta), g, y, gamma, beta), None, None, None, None
        if torch.is_grad_enabled():
            return *gradient_of_gradient(tail, (hy, hgamma, hbeta), g, y, gamma, beta), None, None, None, None
        hy, g, y, best, place = map(channels_last, (hy, g, y, best, place))
        gg, ggamma, gy = torch.empty_like(g), torch.empty_like(gamma), torch.empty_like(y)
        given = (hgamma.contiguous(), hbeta.contiguous(), g, place, best, y, gamma.contiguous(), *statistics, sums)
        call("tail_double_backward", y, hy, *given, gg, ggamma, gy)
        return gg, gy, ggamma, None, None, None, None, None
