"""Gradient congruence: how far training and validation gradients agree (the paper's Figure 1 and Theorem 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewshot_asam.analysis.losses import task_losses
from fewshot_asam.engine.gradients import Loss, autograd_gradient
from fewshot_asam.episodes import Episodes
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules import Rule
from fewshot_asam.rules.perturbations import Params, add, agnostic_sam, l2_norm, sam

RADIUS = 5e-4
"""Of rules that have none."""


class ValidationDecrease(NamedTuple):
    """The quantities of Theorem 2 and what becomes of them in one step; see `validation_decrease`."""

    product_at_theta: float
    product_at_perturbed: float
    predicted: float
    measured: float


def congruence(learner: MetaLearner, episodes: Episodes, generator: torch.Generator, radius: float = RADIUS) -> Tensor:
    """The cosines of `grad L_t(theta)` and `grad L_v(theta_v)` before and after one inner step of the learner's rule.

    **Arguments:**

    - `generator`: for the augmented validation set, on the images' device.
    - `radius`: of `theta_v = theta + radius * v / ||v||`, equation (4), for a rule that has no `rho` of its own.

    `L_v` is of the learner's own validation set or, where that is a duplicate of the support set, of an augmented copy:
    with a duplicate the two gradients are nearly the same. The inner step is the learner's own all the same.

    **Returns:** float64 `[T, 2]`, on the CPU.
    """
    rho, adaptive = ascent_radius(learner.rule, radius), bool(getattr(learner.rule, "adaptive", False))
    found = [
        [gradient_cosine(task.support, task.validation, at, rho, adaptive=adaptive) for at in (task.before, task.after)]
        for task in task_losses(learner, episodes, 1, generator)
    ]
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def gradient_cosine(
    train_loss: Loss, val_loss: Loss, params: Params, radius: float = RADIUS, *, adaptive: bool = False
) -> float:
    """The cosine of `grad L_t(theta)` and `grad L_v(theta_v)` with `theta_v = theta + radius * v / ||v||`, (4)."""
    with torch.no_grad():
        train, val = autograd_gradient(train_loss, params), _validation(val_loss, params, radius, adaptive)
    return _product(train, val) / (_norm(train) * _norm(val))


def validation_decrease(
    train_loss: Loss, val_loss: Loss, params: Params, lr: float, *, rho1: float, rho2: float
) -> ValidationDecrease:
    """Whether one step of Agnostic-SAM lowers the validation loss by what Theorem 2 lets one expect.

    With `g = grad L_t(theta)`, `theta_v` and `v~ = grad L_v(theta_v)` of (4), `theta_t` of (5) and
    `g~ = grad L_t(theta_t)`:

    - `product_at_theta`: `g . v~`, which (7) says that the step makes large.
    - `product_at_perturbed`: `g~ . v~`, the left side of (8). It is `g . v~ + rho1 g'H v~/||g|| - rho2 v~'H v~/||v~||`
      and terms of second order, with `H` the Hessian of `L_t`; the theorem bounds it from below by `g . v~` up to a
      factor, for radii that are small enough.
    - `predicted`: `lr * g~ . v~`, the decrease of `L_v` that follows from it: the step (6) is `-lr * g~`, and to first
      order `L_v` falls by `lr` times the product with its own gradient.
    - `measured`: `L_v(theta) - L_v(theta - lr * g~)`.

    With `rho1 = rho2 = 0` the step is plain gradient descent, with `rho2 = 0` SAM's.

    **Arguments:**

    - `lr`: the learning rate alpha of the step.
    - `rho1`, `rho2`: the radii on the training and on the validation gradient.
    """
    with torch.no_grad():
        train, val = autograd_gradient(train_loss, params), _validation(val_loss, params, rho2, adaptive=False)
        perturbed = add(params, agnostic_sam(params, train, val, rho1=rho1, rho2=rho2))
        step = autograd_gradient(train_loss, perturbed)
        after = {name: value - lr * step[name] for name, value in params.items()}
        measured = val_loss(params).item() - val_loss(after).item()
    product = _product(step, val)
    return ValidationDecrease(_product(train, val), product, lr * product, measured)


def ascent_radius(rule: Rule, otherwise: float = RADIUS) -> float:
    """The radius of equation (4): Agnostic-SAM's `rho2`, the `rho` of another rule, or `otherwise`."""
    own: Any = getattr(rule, "rho2", None)
    return float(getattr(rule, "rho", otherwise) if own is None else own)


def _validation(val_loss: Loss, params: Params, radius: float, adaptive: bool) -> Params:
    """`grad L_v(theta_v)`."""
    ascent = sam(params, autograd_gradient(val_loss, params), radius, adaptive=adaptive)
    return autograd_gradient(val_loss, add(params, ascent))


def _product(first: Params, second: Params) -> float:
    products = [(first[name].double() * second[name].double()).sum() for name in first]
    return torch.stack(products).sum().item()


def _norm(gradient: Params) -> float:
    return l2_norm({name: value.double() for name, value in gradient.items()}).item()
