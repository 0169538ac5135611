"""What is computed for one task: an inner step and the query loss, as pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.episodes import Episodes
from fewshot_asam.rules import inner_step
from fewshot_asam.rules.inner_step import Gradient, Rule, Vectorise
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.rules.validation_sets import Validation, lower_level_sets

State = tuple[Params, Params]
"""The adapted parameters and the momentum of the validation gradient, which is empty where there is none."""


@dataclass(frozen=True, eq=False)
class InnerLoop:
    """What one task's adaptation needs to know, apart from its data.

    **Arguments:**

    - `model`: called with images; in inductive mode also with `support=n`.
    - `adapted`: names of the parameters that the inner loop changes.
    - `lr`: inner learning rate alpha; a tensor of one number where it is learned.
    - `inductive`: the support set alone gives the norm layers' statistics for the queries.
    - `zeroed`: names of the adapted parameters that start every task at zero, whatever the model's own values.
    - `prepared`: what `engine.ways` keeps for these settings, such as compiled code.
    """

    model: FunctionalModel
    rule: Rule
    lr: float | Tensor
    adapted: tuple[str, ...]
    validation: Validation = "duplicate"
    inductive: bool = False
    zeroed: tuple[str, ...] = ()
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)


class Batch(NamedTuple):
    """The tensors of one task, or of `T` tasks with a leading dimension.

    - `inner`: training images and labels and, where validation is not a duplicate, those of the validation set.
    - `query`: query images and labels and, in inductive mode, support images.
    """

    inner: tuple[Tensor, ...]
    query: tuple[Tensor, ...]

    @property
    def num_tasks(self) -> int:
        """How many, `T`."""
        return len(self.query[1])

    def task(self, index: int) -> Batch:
        """One of the tasks."""
        return self._take(index)

    def part(self, which: slice) -> Batch:
        """Some of the tasks."""
        return self._take(which)

    def copied(self) -> Batch:
        """The same numbers in tensors of their own."""
        inner, query = (tuple(value.clone() for value in tensors) for tensors in self)
        return Batch(inner, query)

    def _take(self, which: int | slice) -> Batch:
        inner, query = (tuple(value[which] for value in tensors) for tensors in self)
        return Batch(inner, query)


def batch(inner_loop: InnerLoop, episodes: Episodes, generator: torch.Generator | None) -> Batch:
    """The tensors of all tasks; `generator` is for augmented validation sets."""
    train, val = lower_level_sets(episodes.support_x, episodes.support_y, inner_loop.validation, generator)
    support = (episodes.support_x,) if inner_loop.inductive else ()
    return Batch((*train, *(val or ())), (episodes.query_x, episodes.query_y, *support))


def initial_parameters(inner_loop: InnerLoop) -> Params:
    """What a task adapts, before its first step: the meta-parameters, and zeros for those that are `zeroed`."""
    named = inner_loop.model.parameters()
    return {
        name: torch.zeros_like(named[name]).requires_grad_() if name in inner_loop.zeroed else named[name]
        for name in inner_loop.adapted
    }


def initial_state(inner_loop: InnerLoop) -> State:
    """The initial parameters, and a momentum of zero where the rule has one."""
    params = initial_parameters(inner_loop)
    has_momentum = inner_loop.rule.name == "agnostic_sam" and inner_loop.rule.beta > 0
    return params, {name: torch.zeros_like(value) for name, value in params.items()} if has_momentum else {}


def shared_parameters(inner_loop: InnerLoop) -> Params:
    """The trainable parameters that the inner loop leaves alone."""
    named = inner_loop.model.parameters().items()
    return {name: value for name, value in named if value.requires_grad and name not in inner_loop.adapted}


@dataclass(frozen=True)
class SupportLoss:
    """The loss on labelled images `x`, `y` as a function of the adapted parameters; `shared` are the others."""

    model: FunctionalModel
    shared: Params
    x: Tensor
    y: Tensor

    def __call__(self, params: Params) -> Tensor:
        return support_loss(self.model, self.shared, self.x, self.y, params)


def support_loss(model: FunctionalModel, shared: Params, x: Tensor, y: Tensor, params: Params) -> Tensor:
    """What a `SupportLoss` computes."""
    return F.cross_entropy(predict(model, {**shared, **params}, x), y)


def step(
    inner_loop: InnerLoop,
    gradient: Gradient,
    vectorise: Vectorise,
    state: State,
    shared: Params,
    lr: float | Tensor,
    data: tuple[Tensor, ...],
) -> State:
    """One inner step of `lr` on `Batch.inner`, of one task or, with a `gradient` and `vectorise` for that, of all."""
    losses = [SupportLoss(inner_loop.model, shared, x, y) for x, y in zip(data[::2], data[1::2], strict=True)]
    train_loss, val_loss = losses if len(losses) > 1 else (losses[0], None)
    return inner_step.step(inner_loop.rule, *state, train_loss, val_loss, lr, gradient, vectorise)


def query(inner_loop: InnerLoop, state: State, shared: Params, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The query loss and logits of one task after adaptation, on `Batch.query`."""
    x, y, *support = data
    logits = predict(inner_loop.model, {**shared, **state[0]}, x, *support)
    return F.cross_entropy(logits, y), logits


def predict(model: FunctionalModel, params: Params, x: Tensor, support: Tensor | None = None) -> Tensor:
    """The model's logits with `params` in place of its own; `support` alone gives the norm's statistics if given."""
    if support is None:
        return model(params, x)  # type: ignore[no-any-return]
    both = model(params, torch.cat([support, x]), support=len(support))
    return both[len(support) :]  # type: ignore[no-any-return]
