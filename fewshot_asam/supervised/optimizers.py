"""The optimizer that a training's settings stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fewshot_asam.optim import SAM, AgnosticSAM, FriendlySAM
from fewshot_asam.supervised.config import ClassifierConfig

Tensors = dict[str, Tensor]


def build_optimizer(config: ClassifierConfig, parameters: Iterable[Tensor]) -> Optimizer:
    """SGD, by itself or with what is named around it."""
    options: dict[str, Any] = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay")}
    adaptive = config.optimizer in ("asam", "agnostic_asam")
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **options)
    if config.optimizer == "friendly_sam":
        return FriendlySAM(parameters, torch.optim.SGD, config.rho, **options)
    if config.optimizer in ("sam", "asam"):
        return SAM(parameters, torch.optim.SGD, config.rho, adaptive=adaptive, **options)
    radii = {"rho1": config.rho1, "rho2": config.rho2, "val_momentum": config.val_momentum}
    return AgnosticSAM(parameters, torch.optim.SGD, config.rho, **radii, adaptive=adaptive, **options)  # type: ignore[arg-type]


def step(optimizer: Optimizer, train: Callable[[], Tensor], val: Callable[[], Tensor]) -> None:
    """One step; the validation closure is called by an optimizer that takes one."""
    if isinstance(optimizer, AgnosticSAM):
        optimizer.step(train, val)
    else:
        optimizer.step(train)  # type: ignore[arg-type]


def tensors(optimizer: Optimizer) -> Tensors:
    """The tensors of an optimizer's state by name, without its groups, which the settings and the step tell."""
    state = optimizer.state_dict()
    return {
        f"{kind}/{number}/{name}": value
        for kind in ("state", "base_state")
        for number, values in state.get(kind, {}).items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def put_back(optimizer: Optimizer, found: Mapping[str, Tensor]) -> None:
    """Puts in what `tensors` gave, in the parameters' own memory format, on which the rounding of norms depends."""
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for kind in ("state", "base_state"):
        if kind in state:
            state[kind] = {}
    for key, value in found.items():
        kind, number, name = key.split("/")
        parameter = parameters[int(number)]
        own = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state[kind].setdefault(int(number), {})[name] = own.detach()
    optimizer.load_state_dict(state)
