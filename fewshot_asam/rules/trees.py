"""Arithmetic on tensors by name: one call for all of them where no graph is recorded, else one a tensor.

A single call (`torch._foreach_*`) saves a launch for each tensor of a model, but `vmap` has no rule for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]

HALVES = (torch.float16, torch.bfloat16)
"""Types whose squares are added in single precision."""


def add(tree: Params, other: Params) -> Params:
    """`tree + other`, tensor by tensor."""
    if _alike(tree):
        return _named(tree, torch._foreach_add(_values(tree), [other[name] for name in tree]))
    return {name: value + other[name] for name, value in tree.items()}


def times(tree: Params, other: Params) -> Params:
    """`tree * other`, tensor by tensor."""
    if _alike(tree):
        return _named(tree, torch._foreach_mul(_values(tree), [other[name] for name in tree]))
    return {name: value * other[name] for name, value in tree.items()}


def scaled(tree: Params, scale: float | Tensor | Mapping[str, Tensor]) -> Params:
    """Each tensor times one number, or times the one of its own name."""
    if not isinstance(scale, Mapping) and _alike(tree):
        return _named(tree, torch._foreach_mul(_values(tree), scale))
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(tree, scale)
    return {name: _beside(scales[name], value) * value for name, value in tree.items()}


def squared_norm(tree: Params) -> Tensor:
    """The sum of the squares of all elements, a scalar."""
    if _alike(tree):
        values = _values(tree)
        return torch.stack(torch._foreach_norm(values, dtype=_wide(values[0].dtype))).square().sum()
    sums = [value.to(_wide(value.dtype)).square().sum() for value in tree.values()]
    return torch.stack([one.to(sums[0]) for one in sums]).sum()


def _alike(tree: Params) -> bool:
    """Whether one call can take all tensors: no graph, no transformation of `torch.func`, one type and device."""
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return len({(value.dtype, value.device) for value in tree.values()}) == 1


def _values(tree: Params) -> list[Tensor]:
    return list(tree.values())


def _named(tree: Params, values: tuple[Tensor, ...]) -> Params:
    return dict(zip(tree, values, strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _beside(scale: float | Tensor, value: Tensor) -> float | Tensor:
    return scale.to(value.device) if isinstance(scale, Tensor) else scale
