"""How a batch of tasks is run: `inner_loop` says what is computed, `execution` how, `selection` which way."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewshot_asam.engine.execution import ExecutionMode, run
from fewshot_asam.engine.inner_loop import Batch, InnerLoop, Objective, batch, initial_parameters, predict, rates
from fewshot_asam.engine.selection import Batching, Choice, EngineName, choose, measured

__all__ = [
    "Batch",
    "Batching",
    "Choice",
    "EngineName",
    "ExecutionMode",
    "InnerLoop",
    "MetaOutput",
    "Objective",
    "batch",
    "choose",
    "initial_parameters",
    "measured",
    "meta_backward",
    "meta_loss",
    "output",
    "predict",
    "rates",
    "task_gradients",
    "task_losses",
]


class MetaOutput(NamedTuple):
    """The queries of a batch of tasks: `loss` (scalar, mean over tasks), `logits` `[T, N*Q, N]`, `accuracy` `[T]`.

    Where labels are no classes, as in regression, `logits` are the predictions and `accuracy` is not a number.
    """

    loss: Tensor
    logits: Tensor
    accuracy: Tensor


def meta_loss(inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode) -> MetaOutput:
    """Adapts to each task's support set and evaluates its queries.

    `loss` can be differentiated with respect to the model's parameters; under `torch.no_grad` no graph is built.
    """
    return output(*task_losses(inner_loop, batch, steps, mode), batch)


def task_losses(inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode) -> tuple[Tensor, Tensor]:
    """Query losses `[T]` and logits `[T, n, N]`."""
    return _joined(list(run(inner_loop, batch, steps, mode)), mode)


def meta_backward(inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode) -> MetaOutput:
    """`meta_loss(...).loss.backward()`, but one by one each task's graph is freed before the next is built.

    **Returns:** the output without its graph; gradients are added to the parameters' `.grad`.
    """
    return output(*task_gradients(inner_loop, batch, steps, mode, batch.num_tasks), batch)


def task_gradients(
    inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode, num_tasks: int
) -> tuple[Tensor, Tensor]:
    """Query losses `[T]` and logits `[T, n, N]` of some of a meta-batch's `num_tasks` tasks.

    Their part of the meta-gradient is added to the parameters' `.grad`.
    """
    given = [value for value in (inner_loop.lr, *chain(*batch)) if isinstance(value, Tensor)]
    if computed := [value for value in given if value.requires_grad and not value.is_leaf]:
        return _once(computed, inner_loop, batch, steps, mode, num_tasks)
    results = []
    for loss, logits in run(inner_loop, batch, steps, mode):
        (loss.sum() / num_tasks).backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), logits.detach()))
    return _joined(results, mode)


def _once(
    computed: list[Tensor], inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode, num_tasks: int
) -> tuple[Tensor, Tensor]:
    """The same where tensors were computed for all tasks: their graph is gone through once, after all of them."""
    own = {value: value.detach().requires_grad_() for value in computed}
    leaves = Batch(*(tuple(own.get(value, value) for value in values) for values in batch))
    lr: Any = own.get(inner_loop.lr, inner_loop.lr) if isinstance(inner_loop.lr, Tensor) else inner_loop.lr
    found = task_gradients(replace(inner_loop, lr=lr), leaves, steps, mode, num_tasks)
    reached = [value for value, leaf in own.items() if leaf.grad is not None]
    torch.autograd.backward(reached, [own[value].grad for value in reached])
    return found


def output(losses: Tensor, logits: Tensor, batch: Batch) -> MetaOutput:
    """What is said of a batch whose tasks have these query losses and logits."""
    return MetaOutput(losses.mean(), logits, _accuracy(logits, batch.query[1]))


def _joined(results: list[tuple[Tensor, Tensor]], mode: ExecutionMode) -> tuple[Tensor, Tensor]:
    """The results of all tasks as one, where they came one after another."""
    if mode.batching == "vmap":
        return results[0]
    losses, logits = zip(*results, strict=True)
    return torch.stack(losses), torch.stack(logits)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of right answers in each task: `[T, n, N]`, `[T, n]` -> `[T]`."""
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return logits.new_full((len(logits),), torch.nan)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return (logits.detach().argmax(-1) == labels).to(precise).mean(-1)
