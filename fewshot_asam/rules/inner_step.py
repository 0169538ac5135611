"""The lower level: one inner step for each rule, from `perturb` and a gradient function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.rules import perturbations
from fewshot_asam.rules.perturbations import Params

Loss = Callable[[Params], Tensor]
Gradient = Callable[[Loss, Params], Params]
Vectorise = Callable[[Callable[..., Params]], Callable[..., Params]]
RuleName = Literal["maml", "sharp_maml_low", "agnostic_sam"]


@dataclass(frozen=True)
class Rule:
    """Which lower-level step is taken, with all its switches.

    **Arguments:**

    - `name`: `maml`, `sharp_maml_low` or `agnostic_sam`.
    - `rho`: radius of plain SAM, the radius of `sharp_maml_low`.
    - `rho1`, `rho2`: Agnostic-SAM's radii on the training and validation gradient; `2 * rho` and `rho` where None.
    - `val_grad_point`: whether equation (5) takes the validation gradient at `theta_v` (`perturbed`) or at `theta`.
    - `val_norm`: whether (5) divides it by its `own` norm or by that of the `current` one, `grad L_v(theta)`.
    - `through_perturbation`: whether the meta-gradient flows through the perturbation or holds it constant.
    - `beta`: momentum on the validation gradient over the inner steps of one task.
    - `adaptive`: ASAM's scaling of each parameter's perturbation by its magnitude.
    - `first_order`: FOMAML and its sharpness-aware twins: the inner gradients are constants.

    Raises `FewShotError` for values out of range.
    """

    name: RuleName
    rho: float = 5e-4
    rho1: float | None = None
    rho2: float | None = None
    val_grad_point: Literal["perturbed", "current"] = "perturbed"
    val_norm: Literal["own", "current"] = "own"
    through_perturbation: bool = True
    beta: float = 0.0
    adaptive: bool = False
    first_order: bool = False

    def __post_init__(self) -> None:
        require_one_of("inner rule", self.name, get_args(RuleName))
        require_one_of("val_grad_point", self.val_grad_point, ("perturbed", "current"))
        require_one_of("val_norm", self.val_norm, ("own", "current"))
        for name in ("rho", "rho1", "rho2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise FewShotError(f"{name} is {value}; expected a finite radius of at least 0")
        if not 0 <= self.beta < 1:
            raise FewShotError(f"beta is {self.beta}; expected a momentum of at least 0 and below 1")

    @property
    def radii(self) -> tuple[float, float]:
        """Agnostic-SAM's `(rho1, rho2)`."""
        rho1 = 2 * self.rho if self.rho1 is None else self.rho1
        return rho1, self.rho if self.rho2 is None else self.rho2


def autograd_gradient(loss: Loss, params: Params) -> Params:
    """Gradients by `torch.autograd.grad`, for any Python closure; under `torch.no_grad` they carry no graph."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if not differentiable:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        grads = torch.autograd.grad(
            loss(params), list(params.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
    return dict(zip(params, grads, strict=True))


def functional_gradient(loss: Loss, params: Params) -> Params:
    """Gradients by `torch.func.grad`, which also works inside `vmap`; under `torch.no_grad` they carry no graph."""
    grads: Params = torch.func.grad(loss)(params)
    return grads


def _of_one_task(function: Callable[..., Params]) -> Callable[..., Params]:
    return function


def step(
    rule: Rule,
    params: Params,
    memory: Params,
    train_loss: Loss,
    val_loss: Loss | None,
    lr: float | Tensor,
    gradient: Gradient,
    vectorise: Vectorise = _of_one_task,
) -> tuple[Params, Params]:
    """One lower-level step: `theta' = theta - alpha * grad L_t(theta + perturbation)`.

    **Arguments:**

    - `memory`: the momentum of the validation gradient that the previous step returned, empty at first.
    - `val_loss`: `L_v`; None where the validation set is a duplicate of the support set, which saves one gradient.
    - `vectorise`: `torch.func.vmap` where all tensors have a leading dimension of tasks, since norms are a task's own.

    **Returns:** the new parameters and the new momentum.
    """
    point = params
    if rule.name != "maml":
        with _graph(rule.through_perturbation and not rule.first_order):
            perturbation, memory = perturbed(rule, params, memory, train_loss, val_loss, gradient, vectorise)
        point = perturbations.add(params, perturbation)
    with _graph(not rule.first_order):
        grad = gradient(train_loss, point)
    return descended(params, grad, lr), memory


def descended(params: Params, grad: Params, lr: float | Tensor) -> Params:
    """`params - lr * grad`, each tensor of the shape and precision that it had."""
    rate = lr.reshape(()) if isinstance(lr, Tensor) else lr
    return {name: value - (rate * grad[name]).to(value.dtype) for name, value in params.items()}


def perturbed(
    rule: Rule,
    params: Params,
    memory: Params,
    train_loss: Loss,
    val_loss: Loss | None,
    gradient: Gradient,
    vectorise: Vectorise = _of_one_task,
) -> tuple[Params, Params]:
    """The perturbation of a sharpness-aware rule at `params`, and the new momentum."""
    train_grad = gradient(train_loss, params)
    if rule.name == "sharp_maml_low":
        return vectorise(partial(perturbations.sam, rho=rule.rho, adaptive=rule.adaptive))(params, train_grad), memory
    rho1, rho2 = rule.radii
    current = train_grad if val_loss is None else gradient(val_loss, params)
    val_grad = current
    if rule.val_grad_point == "perturbed":
        ascent = vectorise(partial(perturbations.sam, rho=rho2, adaptive=rule.adaptive))(params, current)
        val_grad = gradient(val_loss or train_loss, perturbations.add(params, ascent))
    if rule.beta > 0:
        val_grad = memory = perturbations.momentum(memory, val_grad, rule.beta)
    measured = current if rule.val_norm == "current" else val_grad
    difference = vectorise(partial(perturbations.agnostic_sam, rho1=rho1, rho2=rho2, adaptive=rule.adaptive))
    return difference(params, train_grad, val_grad, measured), memory


def _graph(wanted: bool) -> torch.set_grad_enabled:
    """Records a graph only where it is wanted and was recorded outside."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())
