"""A model as a function of its parameters: the one place where it is called with other values than its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fewshot_asam.errors import FewShotError

exclusive = threading.RLock()
"""Held while a model has other values, as PyTorch puts them into the module itself, and while its own are read."""

Tried = Callable[[str, tuple[Any, ...], dict[str, Any]], object]
READ = ("forward", "parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "extra_repr")
"""What any module can be asked for while it has other values; the rest changes modules or gives them away."""


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
        self._instead: dict[str, Tensor] = {}

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the module returns; `params` by the names of `named_parameters` and `named_buffers`."""
        values = self._placed(params)
        if torch.compiler.is_compiling():  # within `alone`, which cannot be compiled
            return functional_call(self.module, values, args, kwargs, tie_weights=False)
        with self.alone():
            return functional_call(self.module, values, args, kwargs, tie_weights=False)

    def attribute(self, params: dict[str, Tensor], name: str, tried: Tried = lambda *_: None) -> Any:
        """What the module has by that name, a dotted path: values with `params` in place, what can be called as such.

        - `tried`: called with that name and the arguments before a layer or a method is.

        Raises `AttributeError` where it has nothing, and `FewShotError` for what would have the module's own values.
        """
        found = self._within(params, lambda module: found_in(module, name))
        if isinstance(found, nn.Module):
            return _Layer(self, params, name, tried)
        if not callable(found) or isinstance(found, type):
            return _independent(found, name)
        owner = found_in(self.module, name.rpartition(".")[0])
        own = name.rpartition(".")[2]
        if own not in READ and getattr(type(owner), own, None) is getattr(nn.Module, own, self):
            raise FewShotError(
                f"{name}() was called on a task, which has no modules of its own; call it on the learner's model"
            )
        return _Method(self, params, name, tried)

    def called(self, params: dict[str, Tensor], name: str, *args: Any, **kwargs: Any) -> Any:
        """What a layer or a method of that name returns."""

        def call(module: nn.Module) -> Any:
            found = found_in(module, name)(*args, **kwargs)
            return _Drawn(found) if isinstance(found, Iterator) else found  # while the values are in place

        found = _independent(self._within(params, call), name)
        return iter(found) if isinstance(found, _Drawn) else found

    def _within(self, params: dict[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """A function of the module with `params` in place of its own values."""
        values = {f"module.{place}": value for place, value in self._placed(params).items()}
        with self.alone():
            return functional_call(_Holder(self.module), values, (function,), tie_weights=False)

    def parameters(self) -> dict[str, Tensor]:
        """The module's own parameters, by name."""
        with exclusive:
            return {**dict(self.module.named_parameters()), **self._instead}

    def starting_from(self, params: dict[str, Tensor]) -> FunctionalModel:
        """The same function, that gives `params` as its own parameters of these names."""
        other = copy.copy(self)
        other._instead = params
        return other

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
class _Method:
    """What a module can be asked for, with other values for its parameters."""

    model: FunctionalModel
    params: dict[str, Tensor]
    name: str
    tried: Tried

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tried(self.name, args, kwargs)
        return self.model.called(self.params, self.name, *args, **kwargs)


class _Layer(_Method):
    """A layer, or another part, of a module with other values for its parameters."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.model.attribute(self.params, f"{self.name}.{name}", self.tried)

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, str(index if isinstance(index, str) else range(len(self))[index]))

    def __len__(self) -> int:
        return len(found_in(self.model.module, self.name))


class _Drawn(list[Any]):
    """What an iterator gave."""


class _Holder(nn.Module):
    """Gives a module to a function."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


def found_in(module: nn.Module, path: str) -> Any:
    """What a module has by a dotted path, itself by an empty one."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = getattr(found, name)
    return found


def _independent(found: Any, name: str) -> Any:
    """The same; raises `FewShotError` where it leads to a module, which has its own values again by now."""
    for leaf in pytree.tree_leaves(list(found) if isinstance(found, _Drawn) else found):
        behind = [leaf, getattr(leaf, "__self__", None), *getattr(leaf, "__dict__", {}).values()]
        behind += [cell.cell_contents for cell in getattr(leaf, "__closure__", None) or ()]
        if not isinstance(leaf, Tensor) and any(isinstance(value, nn.Module) for value in behind):
            raise FewShotError(
                f"{name} of a task gives modules, in which its parameters are no longer; call layers by their names, "
                "as in net.features(x), or the whole network"
            )
    return found


def _places(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Where each parameter and buffer stands, by its first name: one name for each module that holds it."""
    places: dict[int, list[str]] = {}
    for path, layer in module.named_modules():
        for name, value in (*layer._parameters.items(), *layer._buffers.items()):
            if value is not None:
                places.setdefault(id(value), []).append(f"{path}.{name}" if path else name)
    return {found[0]: tuple(found) for found in places.values()}
