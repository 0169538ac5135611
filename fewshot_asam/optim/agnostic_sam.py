"""Agnostic-SAM (Nguyen et al., equations 4 to 6) in its supervised form, and Agnostic-ASAM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fewshot_asam.errors import FewShotError
from fewshot_asam.optim.sharpness_aware import Closure, Parameters, SharpnessAware
from fewshot_asam.rules import perturbations
from fewshot_asam.rules.perturbations import Params


class AgnosticSAM(SharpnessAware):
    """Steps with the training gradient at `theta + rho1 * g / ||g|| - rho2 * m / ||m||`.

    `m` averages the gradients of a second, smaller batch (the validation batch), each taken at the weights that ascend
    by `rho2` along the validation gradient. Four gradients a step, two of them of the validation batch.

    **Arguments:** as of `SAM`, and

    - `rho`: radius of plain SAM, from which the other two come. A group may have radii of its own.
    - `rho1`, `rho2`: radii on the training and on the validation gradient; `2 * rho` and `rho` where None.
    - `val_momentum`: the average's `beta` in `m = beta * m + (1 - beta) * g_v`; 0 for the present batch alone.
    """

    def __init__(
        self,
        params: Parameters,
        base: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        *,
        rho1: float | None = None,
        rho2: float | None = None,
        val_momentum: float = 0.9,
        adaptive: bool = False,
        scaler: GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> None:
        if not 0 <= val_momentum < 1:
            raise FewShotError(f"val_momentum is {val_momentum}; expected at least 0 and below 1")
        self.val_momentum = val_momentum
        self._train_grad: Params = {}
        radii = {"rho": rho, "rho1": rho1, "rho2": rho2}
        super().__init__(params, base, radii, adaptive, scaler, no_sync, options)

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._train_grad = {}

    @torch.no_grad()
    def step(self, train_closure: Closure, val_closure: Closure) -> Any:  # type: ignore[override]
        """One step. **Returns:** the training loss at the weights before it.

        **Arguments:**

        - `train_closure`, `val_closure`: for the training and the validation batch: clear the gradients, compute the
          loss, call `backward` and return the loss. Each is called twice and must compute the same loss both times. If
          one raises, the weights are put back.
        """
        return self._run([train_closure, val_closure, val_closure, train_closure])

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """After the training gradient, which is remembered; the next one is the validation gradient, as here."""
        self._train_grad = {name: value.clone() for name, value in self._gradient(0).items()}
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """After the validation gradient: ascends along it, equation (4); the next one is the validation gradient."""
        ascent = perturbations.sam(self._weights(), self._gradient(1), self._radius(_rho2), adaptive=self.adaptive)
        self._move(ascent, zero_grad)

    @torch.no_grad()
    def third_step(self, zero_grad: bool = False) -> None:
        """After that: moves to where the last training gradient is taken, equation (5)."""
        average = perturbations.momentum(self._stored("val_momentum"), self._gradient(2), self.val_momentum)
        self._remembered["val_momentum"] = average
        perturbation = perturbations.agnostic_sam(
            *(self._weights(), self._train_grad, average),
            rho1=self._radius(_rho1),
            rho2=self._radius(_rho2),
            adaptive=self.adaptive,
        )
        self._move(perturbation, zero_grad)

    @torch.no_grad()
    def fourth_step(self, zero_grad: bool = False) -> None:
        """After the last training gradient: puts the weights back and makes the step, equation (6)."""
        self._last(3, zero_grad)


def _rho1(group: Any) -> float:
    radius: float = 2 * group["rho"] if group["rho1"] is None else group["rho1"]
    return radius


def _rho2(group: Any) -> float:
    radius: float = group["rho"] if group["rho2"] is None else group["rho2"]
    return radius
