"""Friendly SAM (Li et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fewshot_asam.errors import FewShotError
from fewshot_asam.optim.sam import SAM
from fewshot_asam.optim.sharpness_aware import Parameters
from fewshot_asam.rules import perturbations


class FriendlySAM(SAM):
    """SAM perturbed along `g - sigma * m`, `m` being an average of the gradients of earlier steps.

    Two gradients a step. As in the authors' code the first step is SAM's own and `m` starts with its gradient.

    **Arguments:** as of `SAM`, and

    - `sigma`: how much of the average is taken away.
    - `beta`: of the average, `m = beta * m + (1 - beta) * g`.
    """

    def __init__(
        self,
        params: Parameters,
        base: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        beta: float = 0.9,
        adaptive: bool = False,
        scaler: GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> None:
        if not 0 <= beta < 1:
            raise FewShotError(f"beta is {beta}; expected at least 0 and below 1")
        self.sigma, self.beta = sigma, beta
        super().__init__(params, base, rho, adaptive=adaptive, scaler=scaler, no_sync=no_sync, **options)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """After the gradient at the weights: moves them to where the second one is taken."""
        grad = self._gradient(0)
        average = self._stored("average")
        direction = perturbations.friendly(grad, average, self.sigma) if average else grad
        self._remembered["average"] = perturbations.momentum(average or grad, grad, self.beta)
        radius = self._radius(lambda group: group["rho"])
        self._move(perturbations.sam(self._weights(), direction, radius, adaptive=self.adaptive), zero_grad)
