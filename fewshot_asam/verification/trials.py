"""What is known of one model's derivatives: each mode to run it is tried once, at its first use."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fewshot_asam.engine.execution import ExecutionMode
from fewshot_asam.engine.inner_loop import InnerLoop
from fewshot_asam.errors import FewShotError
from fewshot_asam.models import MODELS, OURS, Adapted, adapted_names, hooked
from fewshot_asam.verification.diagnosis import Call, diagnosed, logits_from, own_function, part_diagnosed
from fewshot_asam.verification.finite_differences import Mode, Order


class Trials:
    """Trials of the model of `inner_loop`, none where `wanted` is False or the model is this package's own."""

    def __init__(self, inner_loop: InnerLoop, adapt: Adapted) -> None:
        self.inner_loop, self.adapt = inner_loop, adapt
        self.wanted = True
        self._ours = _is_ours(inner_loop.model.module)
        self._known: dict[object, str] = {}
        self._makers: set[str] | None = None

    def vectorises(self, call: Call) -> bool:
        """Whether the model can be run by `vmap`; warns, once, where it cannot."""
        before = len(self._known)
        problem = self._problem("vmap", call)
        if problem and len(self._known) > before:
            warnings.warn(f"tasks run one by one: {problem.rpartition('; ')[0]}", stacklevel=4)
        return not problem

    def require(self, mode: ExecutionMode, call: Call) -> None:
        """Raises `FewShotError` where the model cannot be run so, or where its head is not what it is taken for."""
        derivatives: Mode = "vmap" if mode.batching == "vmap" else "functional" if mode.torch_compile else "loop"
        if (
            problem := self._problem(derivatives, call)
            or self._wrong_head(call)
            or (mode.torch_compile and self._uncompilable(call))
        ):
            raise FewShotError(problem)

    def require_part(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `FewShotError` where a layer or a method that is called by itself is differentiated wrongly."""
        if self._unneeded():
            return
        key = (part, *self._asked())
        if key not in self._known:
            self._known[key] = part_diagnosed(self.inner_loop.model.module, part, key[1], (args, kwargs))
        if problem := self._known[key]:
            raise FewShotError(problem)

    def _asked(self) -> tuple[Order, tuple[bool, ...]]:
        """The derivatives that are needed, and the layers' modes."""
        order: Order = 2 if torch.is_grad_enabled() and not self.inner_loop.first_order else 1
        return order, tuple(layer.training for layer in self.inner_loop.model.module.modules())

    def _unneeded(self) -> bool:
        return not self.wanted or self._ours or torch.compiler.is_compiling()

    def _problem(self, mode: Mode, call: Call) -> str:
        if self._unneeded():
            return ""
        order, modes = self._asked()
        key = (mode, order, modes)
        if key not in self._known:
            problem = diagnosed(self.inner_loop.model, self.inner_loop.adapted, mode, order, call)
            if problem is None:
                return ""
            self._known[key] = problem
        return self._known[key]

    def _uncompilable(self, call: Call) -> str:
        if "compiled" not in self._known:
            self._known["compiled"] = "" if self._unneeded() else own_function(self.inner_loop.model, call)
        return self._known["compiled"]

    def _wrong_head(self, call: Call) -> str:
        """What to do where the head that is adapted is not the layer that the logits come from; else nothing."""
        zeroed = self.inner_loop.zeroed
        if (self.adapt not in ("head", "body") and not zeroed) or self._unneeded():
            return ""
        if self._makers is None:
            self._makers = logits_from(self.inner_loop.model, call)
        taken, makers = set(zeroed or adapted_names(self.inner_loop.model.module, "head")), self._makers
        if not makers or taken == makers:
            return ""
        if zeroed:
            return (
                f"zero_head takes {', '.join(sorted(taken))} for the head, but the logits come from "
                f"{', '.join(sorted(makers))}; pass zero_head={sorted(makers)}"
            )
        return (
            f"adapt {self.adapt!r} takes the layer registered last for the head ({', '.join(sorted(taken))}), but the "
            f"logits come from {', '.join(sorted(makers))}; pass the names to adapt as a list: adapt={sorted(makers)} "
            "for the head"
        )


def _is_ours(model: nn.Module) -> bool:
    """Whether it is one of this package's models as it was made, none of its layers replaced or hooked into."""
    return type(model) in MODELS.values() and all(
        type(layer) in OURS and not hooked(layer) for layer in model.modules()
    )
