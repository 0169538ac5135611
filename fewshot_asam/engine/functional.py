"""A model as a function of its parameters: the one place where it is called with other values than its own."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

exclusive = threading.RLock()
"""Held while a model has other values, as PyTorch puts them into the module itself, and while its own are read."""


class FunctionalModel:
    """`model(params, *args)`: what a module returns with `params` in place of its own values.

    **Arguments:**

    - `module`: any module. One that is registered under two names, and a parameter that several modules share, are
      replaced everywhere they stand. `torch.func.functional_call` by itself puts a module of two names back wrongly.

    Attention runs by kernels that have a second derivative, and recurrent layers outside cuDNN, which has none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._places = _places(module)
        self._recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the module returns; `params` by the names of `named_parameters` and `named_buffers`."""
        values = self._placed(params)
        if torch.compiler.is_compiling():  # within `alone`, which cannot be compiled
            return functional_call(self.module, values, args, kwargs, tie_weights=False)
        with self.alone():
            return functional_call(self.module, values, args, kwargs, tie_weights=False)

    def attribute(self, params: dict[str, Tensor], name: str) -> Any:
        """What the module has by that name, a dotted path: values with `params` in place, what can be called as such.

        Raises `AttributeError` where it has nothing.
        """
        if any(name in places for places in self._places.values()):
            return next(value for place, value in self._values(params).items() if place == name)
        found = _found(self.module, name)
        if isinstance(found, nn.Module):
            return _Layer(self, params, name)
        return partial(self._called, params, name) if inspect.ismethod(found) else found

    def _values(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        own = dict((*self.module.named_parameters(), *self.module.named_buffers()))
        return self._placed(own | params)

    def _called(self, params: dict[str, Tensor], name: str, *args: Any, **kwargs: Any) -> Any:
        values = {f"module.{place}": value for place, value in self._placed(params).items()}
        with self.alone():
            return functional_call(_Caller(self.module), values, (name, *args), kwargs, tie_weights=False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's own parameters, by name."""
        with exclusive:
            return dict(self.module.named_parameters())

    def replaced(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> set[str]:
        """The names of those `params` that a call changes, in place or for other tensors."""
        values = self._placed(params)
        before = {place: (value, value._version) for place, value in values.items()}
        with self.alone():
            functional_call(self.module, values, args, kwargs, tie_weights=False)
        changed = {
            place
            for place, (value, version) in before.items()
            if values[place] is not value or value._version > version
        }
        return {name for name in params if changed.intersection(self._places[name])}

    def _placed(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {place: value for name, value in params.items() for place in self._places[name]}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other thread has values of its own in the module, and kernels can be differentiated twice."""
        with ExitStack() as held:
            held.enter_context(exclusive)
            held.enter_context(sdpa_kernel(SDPBackend.MATH))
            if mha.get_fastpath_enabled():
                mha.set_fastpath_enabled(False)
                held.callback(mha.set_fastpath_enabled, True)
            if self._recurrent:
                held.enter_context(cudnn.flags(enabled=False))
            yield


@dataclass(frozen=True)
class _Layer:
    """A layer, or another part, of a module with other values for its parameters."""

    model: FunctionalModel
    params: dict[str, Tensor]
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model._called(self.params, self.name, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.model.attribute(self.params, f"{self.name}.{name}")

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, str(index if isinstance(index, str) else range(len(self))[index]))

    def __len__(self) -> int:
        return len(_found(self.model.module, self.name))


class _Caller(nn.Module):
    """Calls a part of a module by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return _found(self.module, name)(*args, **kwargs)


def _found(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _places(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Where each parameter and buffer stands, by its first name: one name for each module that holds it."""
    places: dict[int, list[str]] = {}
    for path, layer in module.named_modules():
        for name, value in (*layer._parameters.items(), *layer._buffers.items()):
            if value is not None:
                places.setdefault(id(value), []).append(f"{path}.{name}" if path else name)
    return {found[0]: tuple(found) for found in places.values()}
