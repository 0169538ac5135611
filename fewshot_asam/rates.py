"""Inner learning rates of their own for parts of a model, learned with it or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fewshot_asam.errors import FewShotError, require_one_of

Per = Literal["tensor", "element", "layer_and_step"]


class LearnedRates(nn.Module):
    """Inner learning rates that are parameters: pass them as a learner's `lr`, and Adam trains them with the model.

    **Arguments:**

    - `model`: whose trainable parameters get rates.
    - `per`: one rate for each parameter `tensor`, one for each `element` of it (Meta-SGD, Li et al. 2017), or one for
      each `layer_and_step` (MAML++, Antoniou et al. 2019).
    - `lr`: the first value, above 0, or several by names and patterns, of which the first that fits counts:
      `{"head.*": 0.1, "*": 0.01}`.
    - `steps`: inner steps that have rates, for `layer_and_step`; further steps take those of the last one.
    - `learned`: False keeps the first values.

    Called with the number of a step, from 0, it gives the rates by parameter name, each broadcastable to its parameter.
    Raises `FewShotError` for values out of range and for patterns that leave a parameter without a rate.
    """

    def __init__(
        self,
        model: nn.Module,
        per: Per = "tensor",
        *,
        lr: float | Mapping[str, float] = 0.1,
        steps: int | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__()
        require_one_of("per", per, get_args(Per))
        if (per == "layer_and_step") != (steps is not None):
            raise FewShotError(
                f"per is {per!r} and steps {steps}; expected steps with 'layer_and_step', and only there"
            )
        if steps is not None and steps < 1:
            raise FewShotError(f"steps is {steps}; expected at least 1")
        self.per, self.steps = per, steps
        first = lr if isinstance(lr, Mapping) else {"*": lr}
        self._keys: dict[str, str] = {}
        self.values = nn.ParameterDict()
        for name, value in model.named_parameters():
            if value.requires_grad:
                layer = name.rpartition(".")[0] or name
                key = (layer if per == "layer_and_step" else name).replace(".", "/")
                if hasattr(nn.ParameterDict, key) or (key in vars(self.values) and key not in self.values):
                    key += "/"  # a name that the dictionary has for itself
                self._keys[name] = key
                if key not in self.values:
                    shape = {"tensor": (), "element": value.shape, "layer_and_step": (steps or 0,)}[per]
                    rate = torch.full(shape, _first_value(name, first), dtype=value.dtype, device=value.device)
                    self.values[key] = nn.Parameter(rate, requires_grad=learned)

    def forward(self, step: int) -> dict[str, Tensor]:
        """The rates of a step, by parameter name."""
        if self.steps is None:
            return {name: self.values[key] for name, key in self._keys.items()}
        index = min(step, self.steps - 1)
        return {name: self.values[key][index] for name, key in self._keys.items()}

    def extra_repr(self) -> str:
        """What they are for, in few words."""
        return f"per={self.per!r}" + (f", steps={self.steps}" if self.steps else "")


def _first_value(name: str, lr: Mapping[str, float]) -> float:
    found = next((value for pattern, value in lr.items() if fnmatchcase(name, pattern)), None)
    if found is None:
        raise FewShotError(f"lr has no rate for parameter {name!r}; expected its name, or a pattern such as '*'")
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise FewShotError(f"the inner learning rate is {found!r}; expected a finite number above 0")
    return found
