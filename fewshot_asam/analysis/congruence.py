"""Gradient congruence, the paper's Figure 1: how far the training and the validation gradient point the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewshot_asam import engine
from fewshot_asam.engine.gradients import autograd_gradient
from fewshot_asam.engine.inner_loop import SupportLoss, gradients, initial_state, shared_parameters, step
from fewshot_asam.episodes import Episodes
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules import Gradient, Rule
from fewshot_asam.rules.perturbations import Params, add, l2_norm, sam
from fewshot_asam.rules.validation_sets import Validation, lower_level_sets

RADIUS = 5e-4
"""Of rules that have none."""


def congruence(learner: MetaLearner, episodes: Episodes, generator: torch.Generator, radius: float = RADIUS) -> Tensor:
    """The cosines of `grad L_t(theta)` and `grad L_v(theta_v)` before and after one inner step of the learner's rule.

    **Arguments:**

    - `generator`: for the augmented validation set, on the images' device.
    - `radius`: of `theta_v = theta + radius * v / ||v||`, equation (4), for a rule that has no `rho` of its own.

    `L_v` is of the learner's own validation set or, where that is a duplicate of the support set, of an augmented copy:
    with a duplicate the two gradients are nearly the same. The inner step is the learner's own all the same.

    **Returns:** float64 `[T, 2]`, on the CPU.
    """
    own = learner.inner_loop
    duplicate = own.validation == "duplicate"
    source: Validation = "augment" if duplicate else own.validation
    queries = (episodes.query_x, episodes.query_y)
    train_set, val_set = lower_level_sets(episodes.support_x, episodes.support_y, source, generator, queries)
    data = (*train_set, *(val_set or ()))
    shared, found = shared_parameters(own), []

    def gradient(params: Params, shared: Params, x: Tensor, y: Tensor) -> Params:
        return autograd_gradient(SupportLoss(own, shared, x, y), params)

    with torch.no_grad():
        state = initial_state(own)
        for index in range(episodes.num_tasks):
            train, val = gradients(own, gradient, shared, tuple(values[index] for values in data))
            after, _ = step(own, state, (train, train if duplicate else val), engine.rates(own, 0))
            ascent = ascent_radius(own.rule, radius), bool(getattr(own.rule, "adaptive", False))
            found.append([_cosine(params, train, val, *ascent) for params in (state[0], after)])
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def ascent_radius(rule: Rule, otherwise: float = RADIUS) -> float:
    """The radius of equation (4): Agnostic-SAM's `rho2`, the `rho` of another rule, or `otherwise`."""
    own: Any = getattr(rule, "rho2", None)
    return float(getattr(rule, "rho", otherwise) if own is None else own)


def _cosine(params: Params, train: Gradient, val: Gradient, radius: float, adaptive: bool) -> float:
    first, second = train(params), val(add(params, sam(params, val(params), radius, adaptive=adaptive)))
    product = sum(
        ((first[name].double() * second[name].double()).sum() for name in first), torch.zeros((), device="cpu")
    )
    return (product / (_norm(first) * _norm(second))).item()


def _norm(gradient: Params) -> Tensor:
    return l2_norm({name: value.double() for name, value in gradient.items()})
