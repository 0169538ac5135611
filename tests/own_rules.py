"""Rules as users write them, from nothing but the public names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fewshot_asam.rules import perturbations


@dataclass(frozen=True)
class MySAM:
    """As in the documentation: Sharp-MAML_low once more, with another default."""

    rho: float = 0.05
    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return ()

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        g = train_grad(perturbations.add(params, perturbations.sam(params, train_grad(params), self.rho)))
        return {name: value - lr[name] * g[name] for name, value in params.items()}, state


@dataclass(frozen=True)
class HeavyBall:
    """A state of tensors, and settings that no rule of the package has."""

    decay: float = 0.9
    nesterov: bool = False
    kind: str = "plain"
    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        g = train_grad(params)
        state = {name: self.decay * state[name] + g[name] for name in params}
        move = {name: g[name] + self.decay * state[name] for name in params} if self.nesterov else state
        return {name: value - lr[name] * move[name] for name, value in params.items()}, state


@dataclass(frozen=True)
class Forgetful:
    """Returns half of the parameters."""

    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return ()

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        return dict(list(params.items())[::2]), state


@dataclass(frozen=True)
class Mistyped:
    """Asks for a parameter that is not there, or gives PyTorch what it cannot add."""

    inside_torch: bool = False
    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return ()

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        if self.inside_torch:
            return perturbations.add(params, dict.fromkeys(params, "far")), state
        return {name: params[f"{name}s"] for name in params}, state


NOT_A_RULE = 3
