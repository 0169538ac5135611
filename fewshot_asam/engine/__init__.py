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
    "predict",
    "rates",
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
    found = list(run(inner_loop, batch, steps, mode))
    if mode.batching == "vmap":
        losses, logits = found[0]
    else:
        losses, logits = (torch.stack(column) for column in zip(*found, strict=True))
    return MetaOutput(losses.mean(), logits, _accuracy(logits, batch.query[1]))


def meta_backward(inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode) -> MetaOutput:
    """`meta_loss(...).loss.backward()`, but one by one each task's graph is freed before the next is built.

    **Returns:** the output without its graph; gradients are added to the parameters' `.grad`.
    """
    lr = inner_loop.lr
    if isinstance(lr, Tensor) and lr.requires_grad and not lr.is_leaf:  # computed once for all tasks: so is its graph
        own = lr.detach().requires_grad_()
        output = meta_backward(replace(inner_loop, lr=own), batch, steps, mode)
        if own.grad is not None:
            lr.backward(own.grad)  # type: ignore[no-untyped-call]
        return output
    losses, logits = [], []
    for loss, task_logits in run(inner_loop, batch, steps, mode):
        (loss.sum() / batch.num_tasks).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        logits.append(task_logits.detach())
    if mode.batching == "vmap":
        loss, all_logits = losses[0], logits[0]
    else:
        loss, all_logits = torch.stack(losses), torch.stack(logits)
    return MetaOutput(loss.mean(), all_logits, _accuracy(all_logits, batch.query[1]))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of right answers in each task: `[T, n, N]`, `[T, n]` -> `[T]`."""
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return logits.new_full((len(logits),), torch.nan)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return (logits.detach().argmax(-1) == labels).to(precise).mean(-1)
