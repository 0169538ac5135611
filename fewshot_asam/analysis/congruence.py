"""Gradient congruence, the paper's Figure 1: how far the training and the validation gradient point the same way."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewshot_asam import engine
from fewshot_asam.engine.inner_loop import SupportLoss, initial_state, shared_parameters
from fewshot_asam.episodes import Episodes
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules import inner_step, perturbations
from fewshot_asam.rules.inner_step import Loss, Rule, autograd_gradient
from fewshot_asam.rules.perturbations import Params


def congruence(learner: MetaLearner, episodes: Episodes, generator: torch.Generator) -> Tensor:
    """The cosines of `grad L_t(theta)` and `grad L_v(theta_v)` before and after one inner step of the learner's rule.

    **Arguments:**

    - `generator`: for the augmented validation set, on the images' device.

    `L_v` is of the learner's own validation set or, where that is a duplicate of the support set, of an augmented copy:
    with a duplicate the two gradients are nearly the same. The inner step is the learner's own all the same.
    `theta_v = theta + rho2 v / ||v||` of equation (4), for MAML and Sharp-MAML_low too, with the learner's `rho`.

    **Returns:** float64 `[T, 2]`, on the CPU.
    """
    lower = learner.inner_loop
    duplicate = lower.validation == "duplicate"
    tasks = engine.batch(replace(lower, validation="augment") if duplicate else lower, episodes, generator)
    shared, found = shared_parameters(lower), []
    with torch.no_grad():
        params, memory = initial_state(lower)
        for index in range(tasks.num_tasks):
            x, y, val_x, val_y = tasks.task(index).inner
            train = SupportLoss(lower.model, shared, x, y)
            val = SupportLoss(lower.model, shared, val_x, val_y)
            used = None if duplicate else val
            after, _ = inner_step.step(lower.rule, params, memory, train, used, lower.lr, autograd_gradient)
            found.append([_cosine(lower.rule, point, train, val) for point in (params, after)])
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _cosine(rule: Rule, params: Params, train: Loss, val: Loss) -> float:
    ascent = perturbations.sam(params, autograd_gradient(val, params), rule.radii[1], adaptive=rule.adaptive)
    first, second = autograd_gradient(train, params), autograd_gradient(val, perturbations.add(params, ascent))
    product = sum(
        ((first[name].double() * second[name].double()).sum() for name in first), torch.zeros((), device="cpu")
    )
    return (product / (_norm(first) * _norm(second))).item()


def _norm(gradient: Params) -> Tensor:
    return perturbations.norm({name: value.double() for name, value in gradient.items()})
