"""Accuracy over test tasks with its interval, and paired comparison on the same tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.runtime import distributed

TASKS_AT_ONCE = 20
"""Tasks drawn and run together; a constant, as the stream of tasks depends on it."""


class Interval(NamedTuple):
    """A mean and the half width of its 95 % confidence interval over tasks (normal approximation)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ± {100 * self.half_width:.1f}"


def interval(values: Tensor) -> Interval:
    """The mean of independent values `[n]`, `n >= 2`, and `1.96` standard errors of it."""
    if len(values) < 2:
        raise FewShotError(f"an interval over {len(values)} tasks was asked for; expected at least 2 tasks")
    values = values.double()
    return Interval(values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values)))


def paired_difference(first: Tensor, second: Tensor) -> Interval:
    """The mean of `first - second`, accuracies `[n]` of two learners on the same tasks, and its interval."""
    if first.shape != second.shape:
        raise FewShotError(f"{len(first)} and {len(second)} tasks cannot be paired; expected the same tasks")
    return interval(first - second)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in `eval()` mode; afterwards each layer is in its own again."""
    training = [layer for layer in model.modules() if layer.training]
    model.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def evaluate(
    learner: MetaLearner,
    sampler: EpisodeSampler,
    tasks: int,
    steps: int,
    between: Callable[[], object] = lambda: None,
) -> Tensor:
    """The accuracy on each of `tasks` new tasks, float `[tasks]` on the CPU; no graph is built.

    A fresh sampler of the same seed gives the same tasks, so learners can be compared task by task. Several processes
    of one job share the tasks, and each returns all accuracies. `between` is called every `TASKS_AT_ONCE` tasks.
    The model is in `eval()` mode meanwhile, while it adapts too: dropout drops nothing.
    """
    accuracies = torch.zeros(tasks, device=sampler.images.images.device)
    with torch.no_grad(), in_eval_mode(learner.model):
        for start in range(0, tasks, TASKS_AT_ONCE):
            between()
            episodes = sampler.sample(min(TASKS_AT_ONCE, tasks - start))
            batch, own = learner.batch(episodes, sampler.augmentation), distributed.share(episodes.num_tasks)
            if own.start < own.stop:
                found = learner.batch_loss(batch.part(own), steps).accuracy
                accuracies[start + own.start : start + own.stop] = found
    distributed.all_reduce_sum(accuracies)
    return accuracies.cpu()
