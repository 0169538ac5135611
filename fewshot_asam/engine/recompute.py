"""A step of which the graph is not kept: the backward pass runs it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of nested tensors, whose inputs alone are kept for its gradient; differentiable once."""

    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*arguments)
        leaves, structure = pytree.tree_flatten(arguments)
        made: list[Any] = []
        found = _Recomputed.apply(function, structure, made, *leaves)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(list(found), made[0])

    return run


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], structure: Any, made: list[Any], *leaves: Tensor) -> Any:
        ctx.function, ctx.structure = function, structure
        ctx.save_for_backward(*leaves)
        values, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(list(leaves), structure)))
        made.append(spec)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            values, _ = pytree.tree_flatten(ctx.function(*pytree.tree_unflatten(leaves, ctx.structure)))
        pairs = [(value, grad) for value, grad in zip(values, grads, strict=True) if value.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        outputs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)
