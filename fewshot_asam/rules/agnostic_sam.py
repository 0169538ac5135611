"""Agnostic-SAM (Nguyen et al., equations 4 to 6): against the training gradient, along the validation gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.rules import Gradient, Rates
from fewshot_asam.rules.checks import require_radius
from fewshot_asam.rules.graph import graph
from fewshot_asam.rules.perturbations import Params, add, agnostic_sam, descended, momentum, sam


@dataclass(frozen=True)
class AgnosticSAMRule:
    """Four gradients a step, three where the validation set is a duplicate of the support set.

    **Arguments:**

    - `rho`: radius of plain SAM, from which the other two come.
    - `rho1`, `rho2`: radii on the training and on the validation gradient; `2 * rho` and `rho` where None.
    - `val_grad_point`: whether equation (5) takes the validation gradient at `theta_v` (`perturbed`) or at `theta`.
    - `val_norm`: whether (5) divides it by its `own` norm or by that of the `current` one, `grad L_v(theta)`.
    - `through_perturbation`: whether the meta-gradient flows through the perturbation or holds it constant.
    - `beta`: momentum on the validation gradient over the inner steps of one task.
    - `adaptive`: ASAM's scaling of each parameter's perturbation by its magnitude.

    Raises `FewShotError` for values out of range.
    """

    rho: float = 5e-4
    rho1: float | None = None
    rho2: float | None = None
    val_grad_point: Literal["perturbed", "current"] = "perturbed"
    val_norm: Literal["own", "current"] = "own"
    through_perturbation: bool = True
    beta: float = 0.0
    adaptive: bool = False
    needs_validation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_one_of("val_grad_point", self.val_grad_point, ("perturbed", "current"))
        require_one_of("val_norm", self.val_norm, ("own", "current"))
        for name in ("rho", "rho1", "rho2"):
            require_radius(name, getattr(self, name))
        if not 0 <= self.beta < 1:
            raise FewShotError(f"beta is {self.beta}; expected a momentum of at least 0 and below 1")

    @property
    def radii(self) -> tuple[float, float]:
        """`(rho1, rho2)`."""
        rho1 = 2 * self.rho if self.rho1 is None else self.rho1
        return rho1, self.rho if self.rho2 is None else self.rho2

    def init(self, params: Params) -> Params:
        """The momentum of the validation gradient: zero, and empty where there is none."""
        return {name: torch.zeros_like(value) for name, value in params.items()} if self.beta > 0 else {}

    def step(
        self, params: Params, state: Params, train_grad: Gradient, val_grad: Gradient, lr: Rates
    ) -> tuple[Params, Params]:
        """See `Rule`."""
        with graph(self.through_perturbation):
            perturbation, state = self._perturbation(params, state, train_grad, val_grad)
        return descended(params, train_grad(add(params, perturbation)), lr), state

    def _perturbation(
        self, params: Params, state: Params, train_grad: Gradient, val_grad: Gradient
    ) -> tuple[Params, Params]:
        rho1, rho2 = self.radii
        train = train_grad(params)
        current = train if val_grad is train_grad else val_grad(params)
        val = current
        if self.val_grad_point == "perturbed":
            val = val_grad(add(params, sam(params, current, rho2, adaptive=self.adaptive)))  # (4)
        if self.beta > 0:
            val = state = momentum(state, val, self.beta)
        measured = current if self.val_norm == "current" else val
        return agnostic_sam(params, train, val, measured, rho1=rho1, rho2=rho2, adaptive=self.adaptive), state  # (5)


RULE = AgnosticSAMRule
