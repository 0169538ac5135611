"""The first block as autograd functions: `input_block.cpp` computes it without storing its convolution."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.weak import WeakIdKeyDictionary

from fewshot_asam.models.cpu_kernels.ctypes_call import call, channels_last, doubles, pooled
from fewshot_asam.models.cpu_kernels.reference import batched, gradient, gradient_of_gradient, plain_tail
from fewshot_asam.models.cpu_kernels.signatures import CHANNELS, REGISTER, moments_shape

Images = tuple[Tensor, Tensor]
"""Padded images `[n, H + 2, W + 2, C]` and the moments of their patches, `[9 * C, more than 9 * C]` doubles."""

_seen: Any = WeakIdKeyDictionary()


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether these images, of one or three channels, need no gradient, and the filters fill whole vectors."""
    return (
        not x.requires_grad
        and weight.shape[1] == x.shape[1] in CHANNELS
        and weight.shape[0] % (2 * REGISTER // weight.element_size()) == 0
    )


def block(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """As `conv_block`."""
    filters = weight.permute(2, 3, 1, 0).contiguous()  # [3, 3, C, D]
    return _First.apply(filters, gamma, beta, x, _images(x), eps)  # type: ignore[no-any-return]


def _images(x: Tensor) -> Images:
    """Made once for images that several gradients are taken on, and again where their pixels are not the same."""
    images: Images | None = _seen.get(x)
    if images is None or not _shows(images[0], x):
        with torch.inference_mode(False):
            images = _prepared(x)
        _seen[x] = images
    return images


def _shows(padded: Tensor, x: Tensor) -> bool:
    """Whether these are the pixels of `x`: `.data`, NumPy and other views change them without PyTorch's notice."""
    return padded.dtype == x.dtype and torch.equal(padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2), x)


def _prepared(x: Tensor) -> Images:
    padded = F.pad(x.detach().permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    moments = doubles(x, *moments_shape(x.shape[1], x.dtype))
    call("first_moments", _like(x, 1), padded, moments, channels=x.shape[1])
    return padded, moments


def _like(x: Tensor, filters: int) -> Tensor:
    """A tensor without memory that has the shape of the convolution's result."""
    return x.new_empty(1).expand(x.shape[0], filters, *x.shape[2:])


class _First(Function):
    @staticmethod
    def forward(
        ctx: Any, filters: Tensor, gamma: Tensor, beta: Tensor, x: Tensor, images: Images, eps: float
    ) -> Tensor:
        y = _like(x, len(gamma))
        best, out, place = pooled(y), pooled(y), pooled(y, torch.uint8)
        statistics = doubles(x, 2, len(gamma))
        given = (images[0], filters, gamma.contiguous(), beta.contiguous(), best, out, place, *statistics)
        call("first_forward", y, eps, *given, channels=x.shape[1])
        ctx.save_for_backward(filters, gamma, beta, x, *images, best, place, statistics)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        *given, best, place, statistics = ctx.saved_tensors
        if batched(g):
            filters, gamma, beta, x, *_ = given
            plain = partial(_plain_block, x, eps=ctx.eps, place=place)
            return *gradient(plain, g, filters, gamma, beta), None, None, None
        g, best, place = map(channels_last, (g, best, place))
        return *_FirstBackward.apply(g, *given, best, place, statistics, ctx.eps), None, None, None


class _FirstBackward(Function):
    """`(g, filters, gamma, beta, ...) -> (gfilters, ggamma, gbeta)`."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, filters: Tensor, gamma: Tensor, beta: Tensor, x: Tensor, padded: Tensor, moments: Tensor,
        best: Tensor, place: Tensor, statistics: Tensor, eps: float,
    ) -> Any:  # fmt: skip
        gfilters, sums = torch.empty_like(filters), torch.empty_like(statistics)
        gathered = doubles(x, *filters.shape)
        given = (padded, filters, moments, g, place, best, gamma.contiguous(), *statistics, gfilters, gathered, sums)
        call("first_backward", _like(x, len(gamma)), *given, channels=x.shape[1])
        ctx.save_for_backward(g, filters, gamma, beta, x, padded, moments, best, place, statistics, gathered, sums)
        ctx.eps = eps
        gbeta, ggamma = sums.to(x.dtype)
        return gfilters, ggamma, gbeta

    @staticmethod
    def backward(ctx: Any, hfilters: Tensor, hgamma: Tensor, hbeta: Tensor) -> Any:
        g, filters, gamma, beta, x, padded, moments, best, place, statistics, gathered, sums = ctx.saved_tensors
        block = partial(_plain_block, x, eps=ctx.eps, place=place)
        if batched(hfilters, hgamma, hbeta):
            found = gradient(partial(gradient, block), (hfilters, hgamma, hbeta), g, filters, gamma, beta)
        elif torch.is_grad_enabled():
            found = gradient_of_gradient(block, (hfilters, hgamma, hbeta), g, filters, gamma, beta)
        else:
            g, best, place = map(channels_last, (g, best, place))
            gg, ggamma, gfilters = torch.empty_like(g), torch.empty_like(gamma), torch.empty_like(filters)
            given = (hfilters.contiguous(), hgamma.contiguous(), hbeta.contiguous(), padded, filters, moments, place)
            more = (best, gamma.contiguous(), *statistics, gathered, sums, gg, ggamma, gfilters)
            call("first_double_backward", _like(x, len(gamma)), *given, *more, channels=x.shape[1])
            found = (gg, gfilters, ggamma, None)  # type: ignore[assignment]
        return *found, *[None] * 7


def _plain_block(x: Tensor, filters: Tensor, gamma: Tensor, beta: Tensor, eps: float, place: Tensor) -> Tensor:
    return plain_tail(F.conv2d(x, filters.permute(3, 2, 0, 1), padding=1), gamma, beta, eps, place)
