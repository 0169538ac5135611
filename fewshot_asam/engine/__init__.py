"""How a batch of tasks is run: `inner_loop` says what is computed, `execution` how, `selection` which way."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

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
    lr = inner_loop.lr
    if isinstance(lr, Tensor) and lr.requires_grad and not lr.is_leaf:  # computed once for all tasks: so is its graph
        own = lr.detach().requires_grad_()
        found = task_gradients(replace(inner_loop, lr=own), batch, steps, mode, num_tasks)
        if own.grad is not None:
            lr.backward(own.grad)  # type: ignore[no-untyped-call]
        return found
    results = []
    for loss, logits in run(inner_loop, batch, steps, mode):
        (loss.sum() / num_tasks).backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), logits.detach()))
    return _joined(results, mode)


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
