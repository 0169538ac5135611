"""MAML (Finn et al. 2017): `theta' = theta - alpha * grad L_t(theta)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewshot_asam.rules import Gradient, Rates
from fewshot_asam.rules.perturbations import Params, descended


@dataclass(frozen=True)
class MAMLRule:
    """One gradient a step, and no settings."""

    needs_validation: ClassVar[bool] = False

    def init(self, params: Params) -> Any:
        """Nothing is remembered."""
        return ()

    def step(
        self, params: Params, state: Any, train_grad: Gradient, val_grad: Gradient, lr: Rates
    ) -> tuple[Params, Any]:
        """See `Rule`."""
        return descended(params, train_grad(params), lr), state


RULE = MAMLRule
