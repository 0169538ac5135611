"""The rules of the lower level: a file each, found by its name, or anyone's own as `package.module:Rule`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from fewshot_asam.errors import FewShotError
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.runtime.imports import imported
from fewshot_asam.runtime.yaml_settings import nearest

Gradient = Callable[[Params], Params]
"""The gradient of a loss by parameter name, at the parameters that it is given."""
Rates = Mapping[str, float | Tensor]
"""Inner learning rates by parameter name, each broadcastable to its parameter."""


@runtime_checkable
class Rule(Protocol):
    """One step of the lower level, written for one task.

    A rule is a small frozen dataclass; its fields are its settings, and options of `train_maml`. The engine runs it for
    one task or, by `vmap`, for many, so it uses tensor operations and no numbers taken out of tensors.
    """

    needs_validation: ClassVar[bool]
    """Whether `step` calls `val_grad`."""

    def init(self, params: Params) -> Any:
        """What is remembered between the steps of a task, before the first one: any tree of tensors, such as `()`."""

    def step(
        self, params: Params, state: Any, train_grad: Gradient, val_grad: Gradient, lr: Rates
    ) -> tuple[Params, Any]:
        """The new parameters, of the same names and shapes, and the new state.

        **Arguments:**

        - `train_grad`: of the support loss. It can be differentiated, unless the learner is of first order.
        - `val_grad`: of the validation loss; `train_grad` itself where the validation set is a duplicate.
        """


@cache
def rule_names() -> tuple[str, ...]:
    """The rules of this package."""
    tools = ("checks", "graph", "perturbations", "trees", "validation_sets")
    return tuple(module.name for module in iter_modules(__path__) if module.name not in tools)


def rule_class(name: str) -> type[Rule]:
    """The rule of that name, or the class `package.module:Class`; raises `FewShotError` where there is none."""
    if ":" not in name:
        if name not in rule_names():
            known = ", ".join(rule_names())
            raise FewShotError(
                f"inner is {name!r}; expected one of {known}, or package.module:Rule{nearest(name, rule_names())}"
            )
        return import_module(f"{__name__}.{name}").RULE  # type: ignore[no-any-return]
    found = imported(name, "inner")
    if not isinstance(found, type) or not hasattr(found, "init") or not hasattr(found, "step"):
        raise FewShotError(f"inner {name} has no init and step; expected a class like those of fewshot_asam.rules")
    return found


def rule_name(rule: Rule | type[Rule]) -> str:
    """The name that `rule_class` finds a rule by."""
    kind = rule if isinstance(rule, type) else type(rule)
    room, _, name = kind.__module__.rpartition(".")
    return name if room == __name__ else f"{kind.__module__}:{kind.__qualname__}"


def require_rule(rule: object) -> None:
    """Raises `FewShotError` for what is no rule."""
    if isinstance(rule, type) and hasattr(rule, "step"):
        raise FewShotError(f"the rule is the class {rule.__name__}; expected an instance: {rule.__name__}(...)")
    if not isinstance(rule, Rule):
        raise FewShotError(
            f"the rule is {rule!r}; expected one of fewshot_asam.rules, or a dataclass with needs_validation, init and "
            "step"
        )
