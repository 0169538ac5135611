"""Norm layers whose running statistics stand still for a while."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook


class StillStatistics:
    """Between `hold` and `release`, layers that are called use the batch at hand and remember nothing of it.

    The layers are found when a module is called that has them, whatever wraps it. They are PyTorch's own batch and
    instance norms and classes that inherit from those. In `eval()` mode a layer is as always.
    """

    def __init__(self) -> None:
        self._seen: set[nn.Module] = set()
        self._layers: list[_NormBase] = []
        self._hook: Any = None

    def hold(self) -> None:
        """Begins; a second call does nothing."""
        if self._hook is None:  # that a compiled module calls it twice, of which PyTorch warns, does no harm
            warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
            self._hook = register_module_forward_pre_hook(self._still)

    def release(self) -> None:
        """Ends: the layers remember again."""
        if self._hook is not None:
            self._hook.remove()
        for layer in self._layers:
            layer.track_running_stats = True
        self._hook, self._layers, self._seen = None, [], set()

    def _still(self, module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling():  # a hook is compiled with the model, and sets of modules cannot be
            self._stop(module)
        elif module not in self._seen:
            for layer in module.modules():
                self._seen.add(layer)
                self._stop(layer)

    def _stop(self, layer: nn.Module) -> None:
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            layer.track_running_stats = False
            self._layers.append(layer)
