"""What is computed for one task: inner steps and the query loss, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules import Gradient, Rates, Rule, rule_name
from fewshot_asam.rules.graph import graph
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.rules.validation_sets import Validation, lower_level_sets

State = tuple[Params, Any]
"""The adapted parameters, and what the rule remembers."""
Objective = Callable[[Tensor, Tensor], Tensor]
"""A loss of predictions and labels, such as `torch.nn.functional.cross_entropy`; a mean over images."""
DataGradient = Callable[[Params, Params, Tensor, Tensor], Params]
"""The gradient of the loss at adapted and shared parameters, of one task's images and labels or of all tasks'."""


@dataclass(frozen=True, eq=False)
class InnerLoop:
    """What one task's adaptation needs to know, apart from its data.

    **Arguments:**

    - `model`: called with images; in inductive mode also with `support=n`.
    - `adapted`: names of the parameters that the inner loop changes.
    - `lr`: inner learning rate alpha, a tensor where it is learned, or a module that gives those of a step by name.
    - `inductive`: the support set alone gives the norm layers' statistics for the queries.
    - `zeroed`: names of the adapted parameters that start every task at zero, whatever the model's own values.
    - `first_order`: the inner gradients are constants.
    - `loss`: of support and query sets.
    - `prepared`: what `engine.execution` keeps for these settings, such as compiled code.
    """

    model: FunctionalModel
    rule: Rule
    lr: float | Tensor | nn.Module
    adapted: tuple[str, ...]
    validation: Validation = "duplicate"
    inductive: bool = False
    zeroed: tuple[str, ...] = ()
    first_order: bool = False
    loss: Objective = F.cross_entropy
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)


class Batch(NamedTuple):
    """The tensors of one task, or of `T` tasks with a leading dimension.

    - `support`: training images and labels and, where validation is not a duplicate, those of the validation set.
    - `query`: query images and labels and, in inductive mode, support images.
    - `step_weights`: nothing, or what the query loss after each inner step counts, `[steps]`, shared by all tasks.
    """

    support: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    step_weights: tuple[Tensor, ...] = ()

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
        return Batch(*(tuple(value.clone() for value in tensors) for tensors in self))

    def _take(self, which: int | slice) -> Batch:
        support, query = (tuple(value[which] for value in tensors) for tensors in self[:2])
        return Batch(support, query, self.step_weights)


def batch(inner_loop: InnerLoop, episodes: Episodes, generator: torch.Generator | None) -> Batch:
    """The tensors of all tasks; `generator` is for augmented validation sets."""
    unused = inner_loop.validation != "split" and not inner_loop.rule.needs_validation
    source: Validation = "duplicate" if unused else inner_loop.validation
    queries = (episodes.query_x, episodes.query_y)
    train, val = lower_level_sets(episodes.support_x, episodes.support_y, source, generator, queries)
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
    """The initial parameters, and what the rule remembers before its first step."""
    params = initial_parameters(inner_loop)
    return params, inner_loop.rule.init(params)


def shared_parameters(inner_loop: InnerLoop) -> Params:
    """The trainable parameters that the inner loop leaves alone."""
    named = inner_loop.model.parameters().items()
    return {name: value for name, value in named if value.requires_grad and name not in inner_loop.adapted}


def rates(inner_loop: InnerLoop, step: int) -> Rates:
    """The inner learning rates of a step, counted from 0, by parameter name."""
    lr = inner_loop.lr
    if isinstance(lr, nn.Module):
        return lr(step)  # type: ignore[no-any-return]
    return dict.fromkeys(inner_loop.adapted, lr.reshape(()) if isinstance(lr, Tensor) else lr)


@dataclass(frozen=True)
class SupportLoss:
    """The loss on labelled images `x`, `y` as a function of the adapted parameters; `shared` are the others."""

    inner_loop: InnerLoop
    shared: Params
    x: Tensor
    y: Tensor

    def __call__(self, params: Params) -> Tensor:
        return support_loss(self.inner_loop, self.shared, self.x, self.y, params)


def support_loss(inner_loop: InnerLoop, shared: Params, x: Tensor, y: Tensor, params: Params) -> Tensor:
    """What a `SupportLoss` computes."""
    return inner_loop.loss(predict(inner_loop.model, {**shared, **params}, x), y)


def gradients(
    inner_loop: InnerLoop, gradient: DataGradient, shared: Params, data: tuple[Tensor, ...]
) -> tuple[Gradient, Gradient]:
    """A rule's `train_grad` and `val_grad` on `Batch.support`; one function where validation is a duplicate."""

    def of(x: Tensor, y: Tensor) -> Gradient:
        def grad(params: Params) -> Params:
            require_all(inner_loop, params)
            with graph(not inner_loop.first_order):
                return gradient(params, shared, x, y)

        return grad

    train, *val = (of(x, y) for x, y in zip(data[::2], data[1::2], strict=True))
    return train, (val or [train])[0]


def require_all(inner_loop: InnerLoop, params: Params) -> None:
    """Raises `FewShotError` where a rule asks for the gradient at some parameters: the rest would be the model's."""
    if params.keys() != set(inner_loop.adapted):
        raise FewShotError(
            f"rule {rule_name(inner_loop.rule)} asked for the gradient at {len(params)} of "
            f"{len(inner_loop.adapted)} parameters; expected all of them, of which it may use some"
        )


def step(inner_loop: InnerLoop, state: State, grads: tuple[Gradient, Gradient], lr: Rates) -> State:
    """One inner step of one task; raises `FewShotError` for a rule that returns something else than new parameters."""
    found: Any = inner_loop.rule.step(*state, *grads, lr)
    made = found[0] if isinstance(found, tuple) and len(found) == 2 else None
    if not isinstance(made, dict) or made.keys() != state[0].keys():
        raise FewShotError(
            f"rule {rule_name(inner_loop.rule)} returned something else than the new parameters, by the same names, "
            "and the new state; expected a tuple of these two"
        )
    return found  # type: ignore[no-any-return]


def query(inner_loop: InnerLoop, params: Params, shared: Params, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The query loss and predictions of one task after adaptation, on `Batch.query`."""
    x, y, *support = data
    logits = predict(inner_loop.model, {**shared, **params}, x, *support)
    return inner_loop.loss(logits, y), logits


def predict(model: FunctionalModel, params: Params, x: Tensor, support: Tensor | None = None) -> Tensor:
    """The model's logits with `params` in place of its own; `support` alone gives the norm's statistics if given."""
    if support is None:
        return model(params, x)  # type: ignore[no-any-return]
    both = model(params, torch.cat([support, x]), support=len(support))
    return both[len(support) :]  # type: ignore[no-any-return]
