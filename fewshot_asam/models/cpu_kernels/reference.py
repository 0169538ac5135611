"""The block as PyTorch would write it, for derivatives beyond the second and for several at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INACTIVE = 4
"""As in `parallel_reduce.h`."""


def plain_tail(y: Tensor, gamma: Tensor, beta: Tensor, eps: float, place: Tensor) -> Tensor:
    """What `_Tail` computes, as PyTorch would write it, where `place` says which of a window's places was chosen.

    To choose again would choose others where places are equal, and derivatives of different choices would be mixed.
    """
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0, keepdim=True)
    normal = (y - mean) * torch.rsqrt(var + eps)
    values = normal * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
    height, width = place.shape[2:]
    windows = values[..., : 2 * height, : 2 * width].unflatten(3, (width, 2)).unflatten(2, (height, 2))
    four = windows.transpose(3, 4).flatten(4)  # [n, C, height, width, 4]
    chosen = four.gather(4, place.long().clamp(max=3).unsqueeze(4)).squeeze(4)
    return torch.where(place == INACTIVE, 0, chosen)


def batched(*cotangents: Tensor | None) -> bool:
    """Whether these stand for several at once: within `torch.func.vmap`, or by `is_grads_batched`."""
    of_vmap = torch._C._functorch
    return any(
        value is not None and (of_vmap.is_batchedtensor(value) or of_vmap.is_legacy_batchedtensor(value))
        for value in cotangents
    )


def gradient(function: Callable[..., Any], cotangents: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of what is written in PyTorch's own operations: `cotangents` times its derivative by each of its inputs."""
    return torch.func.vjp(function, *inputs)[1](cotangents)  # type: ignore[no-any-return]


def gradient_of_gradient(
    block: Callable[..., Tensor], cotangents: tuple[Tensor, ...], g: Tensor, *values: Tensor
) -> tuple[Tensor, ...]:
    """For `cotangents` of the gradients of `block(*values)` by `g`: those of `g` and `values`, differentiable again."""
    given = [value if value.requires_grad else value.detach().requires_grad_() for value in (g, *values)]
    inputs = [value.view_as(value) for value in given]  # so that no path from one to another is followed
    grads = torch.autograd.grad(block(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
    return torch.autograd.grad(grads, inputs, cotangents, create_graph=True, allow_unused=True)
