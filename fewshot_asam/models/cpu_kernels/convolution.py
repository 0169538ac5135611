"""The 3x3 convolution of a block as autograd functions, by `winograd.cpp` or by PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fewshot_asam.models.cpu_kernels.build import winograd_is_fast
from fewshot_asam.models.cpu_kernels.ctypes_call import NHWC, call, channels_last
from fewshot_asam.models.cpu_kernels.reference import batched, gradient
from fewshot_asam.models.cpu_kernels.signatures import REGISTER


def apply(x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
    """The convolution of padding 1 of `x` `[n, C, H, W]` by `weight` `[D, C, 3, 3]`, channels-last.

    Its operands are rounded to `kind`, and so is its result; all that enters and leaves is of one precision.
    """
    return channels_last(_Conv.apply(channels_last(x), weight, kind))


def _by_winograd(x: Tensor, weight: Tensor, kind: torch.dtype) -> bool:
    """Whether nothing is rounded, and the channels on both sides fill whole vectors, which are fast here."""
    filters, channels = weight.shape[:2]
    lanes = REGISTER // x.element_size()
    fits = channels == x.shape[1] and filters % lanes == channels % lanes == 0
    return fits and x.dtype == kind and winograd_is_fast()


def _plain(x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
    return F.conv2d(x.to(kind), weight.to(kind), padding=1).to(x.dtype)


def _conv(x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
    if not _by_winograd(x, weight, kind):
        return _plain(x, weight, kind)
    n, channels, *size = x.shape
    y = torch.empty((n, len(weight), *size), dtype=x.dtype, device=x.device, memory_format=NHWC)
    call("conv_forward", y, channels_last(x), weight.contiguous(), y, channels=channels)
    return y


def _conv_backward(
    gy: Tensor, x: Tensor, weight: Tensor, kind: torch.dtype, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `_conv` with respect to `x` and `weight`."""
    if not _by_winograd(x, weight, kind):
        ones, zeros = [1, 1], [0, 0]
        given = (value.to(kind) for value in (gy, x, weight))
        found = torch.ops.aten.convolution_backward(*given, None, ones, ones, ones, False, zeros, 1, [*wanted, False])
        return tuple(None if value is None else value.to(x.dtype) for value in found[:2])  # type: ignore[return-value]
    gx = gweight = None
    gy, x, channels = channels_last(gy), channels_last(x), x.shape[1]
    if wanted[0]:
        gx = torch.empty_like(x)
        call("conv_input_gradient", gy, gy, weight.contiguous(), gx, channels=channels)
    if wanted[1]:
        gweight = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        call("conv_weight_gradient", gy, x, gy, gweight, channels=channels)
    return gx, gweight


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind = kind
        return _conv(x, weight, kind)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        if batched(gy):
            return *gradient(partial(_plain, kind=ctx.kind), gy, *ctx.saved_tensors), None
        return *_ConvBackward.apply(gy, *ctx.saved_tensors, ctx.kind, ctx.needs_input_grad[:2]), None


class _ConvBackward(Function):
    """`(gy, x, weight) -> (gx, gweight)`, each None where it is not wanted."""

    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, kind: torch.dtype, wanted: tuple[bool, bool]) -> Any:
        ctx.save_for_backward(gy, x, weight)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return _conv_backward(gy, x, weight, kind, wanted)

    @staticmethod
    def backward(ctx: Any, hx: Tensor | None, hweight: Tensor | None) -> Any:
        gy, x, weight = ctx.saved_tensors
        if batched(hx, hweight):
            back = partial(gradient, partial(_plain, kind=ctx.kind))
            zeros = (torch.zeros_like(x), torch.zeros_like(weight))
            given = tuple(zero if h is None else h for h, zero in zip((hx, hweight), zeros, strict=True))
            return *gradient(back, given, gy, x, weight), None, None
        _, wants_x, wants_weight, *_ = ctx.needs_input_grad
        ggy = gx = gweight = None
        if hweight is not None:
            ggy = _Conv.apply(x, hweight, ctx.kind)
            if wants_x:
                gx = _ConvBackward.apply(gy, x, hweight, ctx.kind, (True, False))[0]
        if hx is not None:
            from_x = _Conv.apply(hx, weight, ctx.kind)
            ggy = from_x if ggy is None else ggy + from_x
            if wants_weight:
                gweight = _ConvBackward.apply(gy, hx, weight, ctx.kind, (False, True))[1]
        return ggy, gx, gweight, None, None
