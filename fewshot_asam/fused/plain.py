"""The block as PyTorch would write it, for derivatives beyond the second."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_tail(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """What `_Tail` computes, as PyTorch would write it."""
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0, keepdim=True)
    normal = (y - mean) * torch.rsqrt(var + eps)
    return F.max_pool2d(F.relu(normal * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)), 2)


def gradient_of_gradient(
    block: Callable[..., Tensor], cotangents: tuple[Tensor, ...], g: Tensor, *values: Tensor
) -> tuple[Tensor, ...]:
    """For `cotangents` of the gradients of `block(*values)` by `g`: those of `g` and `values`, differentiable again."""
    given = [value if value.requires_grad else value.detach().requires_grad_() for value in (g, *values)]
    inputs = [value.view_as(value) for value in given]  # so that no path from one to another is followed
    grads = torch.autograd.grad(block(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
    return torch.autograd.grad(grads, inputs, cotangents, create_graph=True, allow_unused=True)
