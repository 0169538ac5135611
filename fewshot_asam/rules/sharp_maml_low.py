"""Sharp-MAML_low (Abbas et al. 2022): `theta' = theta - alpha * grad L_t(theta + rho * g / ||g||)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewshot_asam.rules import Gradient, Rates
from fewshot_asam.rules.checks import require_radius
from fewshot_asam.rules.graph import graph
from fewshot_asam.rules.perturbations import Params, add, descended, sam


@dataclass(frozen=True)
class SharpMAMLRule:
    """Two gradients a step.

    **Arguments:**

    - `rho`: radius of the perturbation.
    - `through_perturbation`: whether the meta-gradient flows through the perturbation or holds it constant.
    - `adaptive`: ASAM's scaling of each parameter's perturbation by its magnitude.

    Raises `FewShotError` for a radius out of range.
    """

    rho: float = 5e-4
    through_perturbation: bool = True
    adaptive: bool = False
    needs_validation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_radius("rho", self.rho)

    def init(self, params: Params) -> Any:
        """Nothing is remembered."""
        return ()

    def step(
        self, params: Params, state: Any, train_grad: Gradient, val_grad: Gradient, lr: Rates
    ) -> tuple[Params, Any]:
        """See `Rule`."""
        with graph(self.through_perturbation):
            perturbation = sam(params, train_grad(params), self.rho, adaptive=self.adaptive)
        return descended(params, train_grad(add(params, perturbation)), lr), state


RULE = SharpMAMLRule
