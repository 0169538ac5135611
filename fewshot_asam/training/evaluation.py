"""Accuracy over test tasks with its interval, and paired comparison on the same tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewshot_asam.episodes import Episodes, EpisodeSampler
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
    learner: MetaLearner | Sequence[MetaLearner],
    sampler: EpisodeSampler,
    num_tasks: int,
    steps: int,
    between: Callable[[], object] = lambda: None,
    *,
    permutations: int = 1,
) -> Tensor:
    """The accuracy on each of `num_tasks` new tasks, float `[num_tasks]` on the CPU; no graph is built.

    **Arguments:**

    - `learner`: or several, an ensemble: the mean of their probabilities decides (MAML++, Antoniou et al. 2019).
    - `between`: called every `TASKS_AT_ONCE` tasks.
    - `permutations`: each task is adapted to with so many numberings of its classes, and the mean of the probabilities
      decides (UNICORN-MAML, Ye & Chao 2022). With a head that starts from zeros all numberings give the same.

    A fresh sampler of the same seed gives the same tasks, so learners can be compared task by task. Several processes
    of one job share the tasks, and each returns all accuracies.
    The model is in `eval()` mode meanwhile, while it adapts too: dropout drops nothing.
    """
    members = [learner] if isinstance(learner, MetaLearner) else list(learner)
    numberings = _numberings(sampler.ways, permutations)
    accuracies = torch.zeros(num_tasks, device=sampler.images.images.device)
    with torch.no_grad(), ExitStack() as modes:
        for member in members:
            modes.enter_context(in_eval_mode(member.model))
        for start in range(0, num_tasks, TASKS_AT_ONCE):
            between()
            episodes = sampler.sample(min(TASKS_AT_ONCE, num_tasks - start))
            own = distributed.share(episodes.num_tasks)
            if own.start < own.stop:
                found = _accuracy(members, numberings, episodes, own, steps, sampler.augmentation)
                accuracies[start + own.start : start + own.stop] = found
    distributed.all_reduce_sum(accuracies)
    return accuracies.cpu()


def _accuracy(
    members: Sequence[MetaLearner],
    numberings: Sequence[Tensor],
    episodes: Episodes,
    own: slice,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """The accuracy of the mean prediction on this process's part of the episodes."""
    if len(members) == len(numberings) == 1:
        return members[0].batch_loss(members[0].batch(episodes, generator).part(own), steps).accuracy
    total, drawn = torch.zeros(()), generator.get_state()
    for member in members:
        for numbering in numberings:
            generator.set_state(drawn)  # all members see the same augmentation
            renumbered = replace(
                episodes,
                support_y=numbering.to(episodes.support_y.device)[episodes.support_y],
                query_y=numbering.to(episodes.query_y.device)[episodes.query_y],
            )
            logits = member.batch_loss(member.batch(renumbered, generator).part(own), steps).logits
            total = total.to(logits.device) + logits.double().softmax(-1)[..., numbering.to(logits.device)]
    labels = episodes.query_y[own]
    return (total.argmax(-1) == labels).to(torch.get_default_dtype()).mean(-1)


def _numberings(ways: int, number: int) -> list[Tensor]:
    """Different permutations of the classes, the one as they are first; the same ones for all learners and tasks."""
    most = math.factorial(ways)
    if not 1 <= number <= most:
        raise FewShotError(f"permutations is {number}; expected 1 to {most:,}, as there are so many of {ways} classes")
    generator, found = torch.Generator().manual_seed(0), [tuple(range(ways))]
    if number == most:
        found = list(itertools.permutations(range(ways)))
    while len(found) < number:
        drawn = tuple(torch.randperm(ways, generator=generator).tolist())
        if drawn not in found:
            found.append(drawn)
    return [torch.tensor(one) for one in found]
