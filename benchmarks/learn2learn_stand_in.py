"""What `learn2learn_reference` uses of learn2learn, for machines where it cannot be built: the same operations.

A clone is a new module whose parameters are `clone()`s in the graph; an update adds to each parameter in its place. The
network is a Conv4 with a bias in each convolution and PyTorch's own batch norm with running statistics, as `CNN4` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def _rebuilt(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    made = module.__new__(type(module))
    made.__dict__ = module.__dict__.copy()
    made.__dict__["_parameters"] = {name: change(p) for name, p in module._parameters.items() if p is not None}
    made.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    made.__dict__["_modules"] = {name: _rebuilt(child, change) for name, child in module._modules.items() if child}
    return made


def clone_module(module: nn.Module) -> nn.Module:
    """The same module with clones of its parameters, differentiable back to them."""
    return _rebuilt(module, torch.clone)


def update_module(module: nn.Module, updates: Iterable[Tensor]) -> nn.Module:
    """The module with `updates` added to its parameters, in their order."""
    left: Iterator[Tensor] = iter(updates)
    return _rebuilt(module, lambda parameter: parameter + next(left))


def maml_update(module: nn.Module, lr: float, gradients: Iterable[Tensor]) -> nn.Module:
    """A step of gradient descent."""
    return update_module(module, [-lr * gradient for gradient in gradients])


class MAML(nn.Module):
    """`clone`, `adapt` with a loss, and the module itself."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        super().__init__()
        self.module, self.lr = module, lr

    def clone(self) -> MAML:
        return MAML(clone_module(self.module), self.lr)

    def adapt(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.module.parameters()), create_graph=True)
        self.module = maml_update(self.module, self.lr, gradients)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A block of `CNN4`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, padding=1)
        self.normalize = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU()
        self.max_pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(self.relu(self.normalize(self.conv(x))))  # type: ignore[no-any-return]


class CNN4(nn.Module):
    """Four blocks and a linear layer, by learn2learn's names."""

    def __init__(self, ways: int, *, hidden_size: int, channels: int, embedding_size: int, **_: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(*(Block(channels if i == 0 else hidden_size, hidden_size) for i in range(4)))
        self.classifier = nn.Linear(embedding_size, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


learn2learn = SimpleNamespace(
    algorithms=SimpleNamespace(MAML=MAML, maml_update=maml_update),
    vision=SimpleNamespace(models=SimpleNamespace(CNN4=CNN4)),
    clone_module=clone_module,
    update_module=update_module,
)
