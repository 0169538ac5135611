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
class Counting:
    """Steps that become shorter, by a whole number in a nested state; parameters are returned in another order."""

    start: Any = 0
    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return {"deep": ({"steps": self.start},), "first": {name: value.detach() for name, value in params.items()}}

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        g = train_grad(dict(reversed(params.items())))
        steps = state["deep"][0]["steps"] + 1
        new = {name: value - lr[name] * g[name] / steps for name, value in reversed(params.items())}
        return new, {"first": state["first"], "deep": ({"steps": steps},)}


@dataclass(frozen=True)
class Partial:
    """Asks for the gradient at the head's parameters alone."""

    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return ()

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        g = train_grad({name: value for name, value in params.items() if name.startswith("head")})
        return {name: value - lr[name] * g.get(name, 0) for name, value in params.items()}, state


@dataclass(frozen=True)
class Curved:
    """Differentiates a gradient itself."""

    needs_validation: ClassVar[bool] = False

    def init(self, params: Any) -> Any:
        return ()

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        h = torch.func.grad(lambda at: sum(g.square().sum() for g in train_grad(at).values()))(params)
        return {name: value - lr[name] * h[name] for name, value in params.items()}, state


class Shrinking(torch.nn.Module):
    """Has a parameter of its own that is learned."""

    needs_validation: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def init(self, params: Any) -> Any:
        return ()

    def step(self, params: Any, state: Any, train_grad: Any, val_grad: Any, lr: Any) -> Any:
        g = train_grad(params)
        return {name: self.by * value - lr[name] * g[name] for name, value in params.items()}, state


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
