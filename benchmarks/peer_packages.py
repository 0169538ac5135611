"""Imports of the peer packages that `scripts/install_peers.py` installs, mended for today's torch."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def require(name: str) -> None:
    """Raises `ImportError` with one line where a peer, or torchvision which it needs, is not installed."""
    if find_spec(name) is None or find_spec("torchvision") is None:
        raise ImportError(f"{name} is not installed; run scripts/install_peers.py")


def import_learn2learn() -> ModuleType:
    """learn2learn; raises `ImportError` where it is not installed."""
    return _import_peer("learn2learn")


def import_higher() -> ModuleType:
    """higher; raises `ImportError` where it is not installed."""
    return _import_peer("higher")


def import_torchmeta() -> ModuleType:
    """torchmeta; raises `ImportError` where it is not installed."""
    torchmeta = _import_peer("torchmeta")
    torchmeta.utils.data.SubsetTask.__getitems__ = _each_item
    return torchmeta


def _each_item(dataset: Any, indices: list[int]) -> list[Any]:
    """The method that today's `Subset` wants of a subclass with its own `__getitem__`."""
    return [dataset[index] for index in indices]


def _import_peer(name: str) -> ModuleType:
    require(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _torchvision_operators()
        _torchvision_downloads()
        return import_module(name)


@cache
def _torchvision_operators() -> Any:
    """Declare the operators whose absence stops torchvision's import, where its own library does not load.

    That is so beside a torch built for another device. The declarations live as long as what is returned.
    """
    untyped: Any = torch
    spec = find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    try:
        untyped.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = untyped.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(untyped.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def _torchvision_downloads() -> None:
    """Give torchvision the two names of an old release that torchmeta imports, and calls only to download."""
    utils = import_module("torchvision.datasets.utils")
    for name in ("_get_confirm_token", "_save_response_content"):
        if not hasattr(utils, name):
            setattr(utils, name, None)
