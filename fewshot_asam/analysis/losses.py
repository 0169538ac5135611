"""Losses as functions of parameters by name: of a plain model, of a task before and after adaptation, of all tasks.

Everything in this room takes such a function and the parameters at which it is looked at. So a classifier and a
meta-learner are analysed by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import engine
from fewshot_asam.engine.execution import ExecutionMode
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.gradients import Loss, autograd_gradient
from fewshot_asam.engine.inner_loop import (
    InnerLoop,
    Objective,
    SupportLoss,
    gradients,
    initial_state,
    query,
    shared_parameters,
    step,
)
from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.rules.validation_sets import Validation, lower_level_sets

ONE_BY_ONE = ExecutionMode("loop")


@dataclass(frozen=True)
class TaskLosses:
    """One task's losses as functions of its adapted parameters, and these before and after the inner steps.

    **Arguments:**

    - `support`, `query`: the losses that are adapted to and tested on.
    - `validation`: the lower level's `L_v`: of the learner's own validation set or, where that is a duplicate of the
      support set, of an augmented copy, as with a duplicate the two gradients are nearly the same.
    - `before`, `after`: the adapted parameters by name.
    - `logits`: of the queries after adaptation, `[N*Q, N]`.
    """

    support: Loss
    validation: Loss
    query: Loss
    before: Params
    after: Params
    logits: Tensor


def supervised_loss(model: nn.Module, x: Tensor, y: Tensor, loss: Objective = F.cross_entropy) -> tuple[Loss, Params]:
    """The loss of any model on a batch as a function of its trainable parameters, and their values now.

    **Arguments:**

    - `x`, `y`: inputs `[n, ...]` and labels `[n]` or targets, on the model's device.
    - `loss`: of predictions and labels, a mean over the batch.

    Raises `FewShotError` for a model with a layer that would change from call to call: norm with running statistics or
    dropout in `train()` mode.
    """
    for name, layer in model.named_modules():
        dropout = isinstance(layer, nn.modules.dropout._DropoutNd)
        if layer.training and (dropout or getattr(layer, "running_mean", None) is not None):
            raise FewShotError(
                f"layer {name!r} ({type(layer).__name__}) is in train() mode, where the loss is another one at every "
                "call; call .eval() on the model first"
            )
    called = FunctionalModel(model)
    params = {name: value.detach().clone() for name, value in called.parameters().items() if value.requires_grad}
    return lambda at: loss(called(at, x), y), params


def task_losses(
    learner: MetaLearner, episodes: Episodes, steps: int, generator: torch.Generator | None = None
) -> list[TaskLosses]:
    """Adapts to each task by the learner's rule; see `TaskLosses`.

    **Arguments:**

    - `steps`: inner steps, at least 0.
    - `generator`: for the augmented validation set, on the images' device.

    The losses keep the parameters of now, also when the model is trained further. It stays in the mode that it is in:
    for what a test sees, call `learner.eval()` first.
    """
    own = learner.inner_loop
    _require_derivatives(learner, episodes)
    duplicate = own.validation == "duplicate"
    source: Validation = "augment" if duplicate else own.validation
    train_set, val_set = lower_level_sets(
        *(episodes.support_x, episodes.support_y, source, generator), (episodes.query_x, episodes.query_y)
    )
    data = (*train_set, *(val_set or ()))
    return [
        _adapted(own, tuple(values[index] for values in data), _query_set(own, episodes, index), steps, duplicate)
        for index in range(episodes.num_tasks)
    ]


def meta_loss(
    learner: MetaLearner, episodes: Episodes, steps: int, generator: torch.Generator | None = None
) -> tuple[Loss, Params]:
    """The mean query loss after adaptation as a function of the meta-parameters, and their values now.

    **Arguments:** those of `MetaLearner.meta_loss`.

    Its derivatives are those of the function itself, adaptation included, also where the learner trains with the
    cheaper forms `first_order` and `through_perturbation=False`. A head that starts every task from zeros and learned
    inner rates are not among the parameters.
    """
    own, batch = learner.inner_loop, learner.batch(episodes, generator)
    _require_derivatives(learner, episodes)
    rule: Any = own.rule
    if not getattr(rule, "through_perturbation", True):
        rule = replace(rule, through_perturbation=True)
    exact = replace(own, rule=rule, first_order=False)
    trained = {name: value for name, value in own.model.parameters().items() if value.requires_grad}
    params = {name: value.detach().clone() for name, value in trained.items() if name not in own.zeroed}

    def loss(at: Params) -> Tensor:
        differentiable = {
            name: value if value.requires_grad else value.detach().requires_grad_() for name, value in at.items()
        }
        placed = replace(exact, model=own.model.starting_from(differentiable), prepared={})
        return engine.meta_loss(placed, batch, steps, ONE_BY_ONE).loss

    return loss, params


def _require_derivatives(learner: MetaLearner, episodes: Episodes) -> None:
    """Raises `FewShotError` for a foreign model that PyTorch would differentiate wrongly."""
    learner.trials.require(ONE_BY_ONE, ((episodes.support_x[0],), {}))


def _query_set(own: InnerLoop, episodes: Episodes, index: int) -> tuple[Tensor, ...]:
    support = (episodes.support_x[index],) if own.inductive else ()
    return (episodes.query_x[index], episodes.query_y[index], *support)


def _adapted(
    own: InnerLoop, data: tuple[Tensor, ...], queries: tuple[Tensor, ...], steps: int, duplicate: bool
) -> TaskLosses:
    shared = {name: value.detach().clone() for name, value in shared_parameters(own).items()}

    def gradient(params: Params, shared: Params, x: Tensor, y: Tensor) -> Params:
        return autograd_gradient(SupportLoss(own, shared, x, y), params)

    with torch.no_grad():
        train, val = gradients(own, gradient, shared, data)
        state = initial_state(own)
        before = {name: value.detach().clone() for name, value in state[0].items()}
        for number in range(steps):
            state = step(own, state, (train, train if duplicate else val), engine.rates(own, number))
        after = {name: value.detach().clone() for name, value in state[0].items()}
        logits = query(own, after, shared, queries)[1]
    return TaskLosses(
        support=SupportLoss(own, shared, *data[:2]),
        validation=SupportLoss(own, shared, *data[2:4]),
        query=lambda at: query(own, at, shared, queries)[0],
        before=before,
        after=after,
        logits=logits,
    )
