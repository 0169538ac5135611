"""How a batch of tasks is run. `task` says what is computed, `ways` how, `choice` which way, `capture` for replay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_asam.engine.choice import Choice, EngineName, Tasks, choose, measured
from fewshot_asam.engine.task import Batch, LowerLevel, batch, initial_parameters, predict
from fewshot_asam.engine.ways import Way, run

__all__ = [
    "Batch",
    "Choice",
    "EngineName",
    "LowerLevel",
    "MetaOutput",
    "Tasks",
    "Way",
    "batch",
    "choose",
    "initial_parameters",
    "measured",
    "meta_backward",
    "meta_loss",
    "predict",
]


class MetaOutput(NamedTuple):
    """The queries of a batch of tasks: `loss` (scalar, mean over tasks), `logits` `[T, N*Q, N]`, `accuracy` `[T]`."""

    loss: Tensor
    logits: Tensor
    accuracy: Tensor


def meta_loss(lower: LowerLevel, tasks: Batch, steps: int, way: Way) -> MetaOutput:
    """Adapts to each task's support set and evaluates its queries.

    `loss` can be differentiated with respect to the model's parameters; under `torch.no_grad` no graph is built.
    """
    found = list(run(lower, tasks, steps, way))
    if way.tasks == "vmap":
        losses, logits = found[0]
    else:
        losses, logits = (torch.stack(column) for column in zip(*found, strict=True))
    return MetaOutput(losses.mean(), logits, _accuracy(logits, tasks.query[1]))


def meta_backward(lower: LowerLevel, tasks: Batch, steps: int, way: Way) -> MetaOutput:
    """`meta_loss(...).loss.backward()`, but one by one each task's graph is freed before the next is built.

    **Returns:** the output without its graph; gradients are added to the parameters' `.grad`.
    """
    losses, logits = [], []
    for loss, task_logits in run(lower, tasks, steps, way):
        (loss.sum() / tasks.tasks).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        logits.append(task_logits.detach())
    if way.tasks == "vmap":
        loss, all_logits = losses[0], logits[0]
    else:
        loss, all_logits = torch.stack(losses), torch.stack(logits)
    return MetaOutput(loss.mean(), all_logits, _accuracy(all_logits, tasks.query[1]))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of right answers in each task: `[T, n, N]`, `[T, n]` -> `[T]`."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return (logits.detach().argmax(-1) == labels).to(precise).mean(-1)
