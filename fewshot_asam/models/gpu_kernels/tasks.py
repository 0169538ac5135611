"""The tasks' channels side by side: the batching rule of the block's autograd functions under `vmap` over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def merged(value: Tensor, batch_dim: int | None, tasks: int, at: int) -> Tensor:
    """A tensor with a dimension of tasks as one whose dimension `at` has all of theirs; a view where they lie so."""
    if batch_dim is None:
        value, batch_dim = value.expand(tasks, *value.shape), 0
    return value.movedim(batch_dim, at).flatten(at, at + 1)


def over_tasks(function: Any, info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    """An autograd function applied to the channels of all tasks at once.

    Images `[n, C, H, W]` and statistics `[2, C]` have their channels second, numbers a channel `[C]` first; what is no
    tensor passes through.
    """
    found = function.apply(
        *(
            merged(value, dim, info.batch_size, _channels(value.ndim - (dim is not None)))
            if isinstance(value, Tensor)
            else value
            for value, dim in zip(arguments, in_dims, strict=True)
        )
    )
    dims = tuple(_channels(value.ndim) for value in found)
    return tuple(v.unflatten(dim, (info.batch_size, -1)) for v, dim in zip(found, dims, strict=True)), dims


def _channels(dimensions: int) -> int:
    return min(dimensions - 1, 1)
