"""SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fewshot_asam.optim.sharpness_aware import Closure, Parameters, SharpnessAware
from fewshot_asam.rules import perturbations


class SAM(SharpnessAware):
    """Steps with the gradient at `theta + rho * g / ||g||`; two gradients a step.

    **Arguments:**

    - `params`: what any optimizer takes. A group may have a `rho` of its own; the norm is one over all groups.
    - `base`: the optimizer that makes the step: its class, or one that was made of the same parameters.
    - `rho`: radius of the perturbation, in the units of the parameters.
    - `adaptive`: ASAM: scale each parameter's perturbation by its magnitude (its radius is about ten times SAM's).
    - `scaler`: the `GradScaler` by which the closure scales its loss. Every gradient is unscaled by it; where one
      overflows, the whole step is left out. Call `scaler.update()` after `step`, as always.
    - `no_sync`: with DistributedDataParallel, `model.no_sync`: each process then perturbs the weights by the gradient
      of its own part of the batch, and the last gradient alone is averaged. Without it all gradients are averaged.
    - `options`: of the base optimizer, where its class is given.

    `param_groups` are the base optimizer's own, so schedulers work as usual. Raises `FewShotError` for a radius out of
    range and for a base optimizer of other parameters. A gradient that is not finite reaches the base optimizer as
    without SAM, unless there is a `scaler`.
    """

    def __init__(
        self,
        params: Parameters,
        base: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        scaler: GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> None:
        super().__init__(params, base, {"rho": rho}, adaptive, scaler, no_sync, options)

    @torch.no_grad()
    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """One step. **Returns:** the loss at the weights before it.

        **Arguments:**

        - `closure`: clears the gradients, computes the loss, calls `backward` and returns the loss. It is called twice
          and must compute the same loss both times. If it raises, the weights are put back.
        """
        return self._run([closure, closure])

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """After the gradient at the weights: moves them to where the second one is taken."""
        grad = self._gradient(0)
        radius = self._radius(lambda group: group["rho"])
        self._move(perturbations.sam(self._weights(), grad, radius, adaptive=self.adaptive), zero_grad)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """After the second gradient: puts the weights back and makes the step."""
        self._last(1, zero_grad)
