"""Stand-ins for the large libraries, with which a command says what it can do in a fraction of a second.

`--help`, `--version` and a shell's completion need the settings' names, types and texts, but no tensor. PyTorch alone
takes seconds to import. So modules of these libraries are replaced by empty ones, each name in which is one class that
can be inherited from, called, subscripted and used as a decorator. Sphinx reads modules for its pages in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LARGE = ("torch", "numpy", "matplotlib", "tensorboard", "PIL", "h5py", "pooch", "safetensors", "tqdm")


class _Named(type):
    """The class of classes whose every attribute is a stand-in too."""

    def __getattr__(cls, name: str) -> Any:
        return _attribute(name)


class StandIn(metaclass=_Named):
    """Any class, function or constant of a library."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return object.__new__(cls)

    def __init_subclass__(cls, **_: object) -> None: ...

    def __class_getitem__(cls, _: object) -> type[StandIn]:
        return cls

    def __call__(self, *arguments: Any, **_: object) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)


class _Empty(ModuleType):
    """A module that has whatever is imported from it."""

    __path__: MutableSequence[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        return _attribute(name)


class _Finder(MetaPathFinder, Loader):
    """Finds the large libraries before anyone else does."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in LARGE else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, _: ModuleType) -> None: ...


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn


def install() -> None:
    """From here on nothing in this process can compute; it is to print and end."""
    sys.meta_path.insert(0, _Finder())
