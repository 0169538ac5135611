"""The first block as autograd functions: `first.cpp` computes it without the result of its convolution being stored."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.weak import WeakIdKeyDictionary

from fewshot_asam.fused.compiled import call, channels_last, pooled
from fewshot_asam.fused.plain import gradient_of_gradient, plain_tail

CHANNELS = (1, 3)
REGISTER = 64
"""Bytes of the vectors that `first.cpp` is written in; it takes filters two vectors at a time."""

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
    """Made once for images that several gradients are taken on."""
    latest = None if x.is_inference() else x._version
    version, images = _seen.get(x, (None, None))
    if latest is None or version != latest:
        padded = F.pad(x.detach().permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
        patch, lanes = 9 * x.shape[1], REGISTER // x.element_size()
        moments = torch.empty(patch, (patch + lanes) // lanes * lanes, dtype=torch.float64)
        call(f"first_moments_{x.shape[1]}", _like(x, 1), padded, moments)
        images = padded, moments
        if latest is not None:
            _seen[x] = latest, images
    return images  # type: ignore[no-any-return]


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
        statistics = torch.empty(2, len(gamma), dtype=torch.float64)
        given = (images[0], filters, gamma.contiguous(), beta.contiguous(), best, out, place, *statistics)
        call(f"first_forward_{x.shape[1]}", y, eps, *given)
        ctx.save_for_backward(filters, gamma, beta, x, *images, best, place, statistics)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_FirstBackward.apply(channels_last(g), *ctx.saved_tensors, ctx.eps), None, None, None


class _FirstBackward(Function):
    """`(g, filters, gamma, beta, ...) -> (gfilters, ggamma, gbeta)`."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, filters: Tensor, gamma: Tensor, beta: Tensor, x: Tensor, padded: Tensor, moments: Tensor,
        best: Tensor, place: Tensor, statistics: Tensor, eps: float,
    ) -> Any:  # fmt: skip
        gfilters, sums = torch.empty_like(filters), torch.empty_like(statistics)
        gathered = torch.empty(filters.shape, dtype=torch.float64)
        given = (padded, filters, moments, g, place, best, gamma.contiguous(), *statistics, gfilters, gathered, sums)
        call(f"first_backward_{x.shape[1]}", _like(x, len(gamma)), *given)
        ctx.save_for_backward(g, filters, gamma, beta, x, padded, moments, best, place, statistics, gathered, sums)
        ctx.eps = eps
        gbeta, ggamma = sums.to(x.dtype)
        return gfilters, ggamma, gbeta

    @staticmethod
    def backward(ctx: Any, hfilters: Tensor, hgamma: Tensor, hbeta: Tensor) -> Any:
        g, filters, gamma, beta, x, padded, moments, best, place, statistics, gathered, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            block = partial(_plain_block, x, eps=ctx.eps)
            found = gradient_of_gradient(block, (hfilters, hgamma, hbeta), g, filters, gamma, beta)
        else:
            gg, ggamma, gfilters = torch.empty_like(g), torch.empty_like(gamma), torch.empty_like(filters)
            given = (hfilters.contiguous(), hgamma.contiguous(), hbeta.contiguous(), padded, filters, moments, place)
            more = (best, gamma.contiguous(), *statistics, gathered, sums, gg, ggamma, gfilters)
            call(f"first_double_backward_{x.shape[1]}", _like(x, len(gamma)), *given, *more)
            found = (gg, gfilters, ggamma, None)  # type: ignore[assignment]
        return *found, *[None] * 7


def _plain_block(x: Tensor, filters: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return plain_tail(F.conv2d(x, filters.permute(3, 2, 0, 1), padding=1), gamma, beta, eps)
