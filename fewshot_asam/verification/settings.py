"""Whether a learner's settings fit its model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from fewshot_asam.engine import InnerLoop, Objective
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.models import Adapted, adapted_names, require_replaceable, require_stateless, takes_support
from fewshot_asam.rules import Rule, require_rule
from fewshot_asam.rules.validation_sets import Validation

Norm = Literal["transductive", "inductive"]
InnerRate = float | Tensor | nn.Module
"""A number, a parameter that is learned, or a module that gives each parameter's rate in a step by name."""


def checked_inner_loop(
    model: nn.Module,
    lr: InnerRate,
    rule: Rule,
    adapt: Adapted,
    validation: Validation,
    norm: Norm,
    zero_head: bool | Sequence[str],
    first_order: bool,
    loss: Objective,
) -> InnerLoop:
    """The inner loop of these settings; raises `FewShotError` where they do not fit together."""
    require_rule(rule)
    require_replaceable(model)
    require_stateless(model)
    require_one_of("validation", validation, get_args(Validation))
    require_one_of("norm", norm, get_args(Norm))
    if not callable(loss):
        raise FewShotError(f"loss is {loss!r}; expected a function of predictions and labels")
    if norm == "inductive" and not takes_support(model):
        raise FewShotError(
            f"{type(model).__name__}.forward takes no `support`, the number of images that give the statistics, "
            "which norm 'inductive' needs; Conv4 and ResNet12 do. A model without batch norm needs no such mode"
        )
    adapted = adapted_names(model, adapt)
    zeroed = adapted_names(model, "head" if zero_head is True else zero_head) if zero_head else ()
    if not set(zeroed) <= set(adapted):
        raise FewShotError(
            f"with adapt {adapt!r} a head that starts every task from zeros would stay there; expected an adapt "
            "that includes the head, such as 'all', or zero_head False (--head-init default or zeros)"
        )
    _require_rate(lr, adapted)
    return InnerLoop(
        FunctionalModel(model), rule, lr, adapted, validation, norm == "inductive", zeroed, first_order, loss
    )


def _require_rate(lr: InnerRate, adapted: Sequence[str]) -> None:
    if isinstance(lr, nn.Module):
        if missing := [name for name in adapted if name not in lr(0)]:
            raise FewShotError(f"lr gives no inner learning rate for parameter {missing[0]!r}; expected one of each")
        return
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise FewShotError(
            f"the inner learning rate is a {lr.dtype} tensor of shape {list(lr.shape)}; expected one number, or "
            "LearnedRates for several"
        )
    value = float(lr.detach()) if isinstance(lr, Tensor) else lr
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise FewShotError(f"the inner learning rate is {lr!r}; expected a number above 0")
    if not math.isfinite(value) or (value <= 0 and not isinstance(lr, nn.Parameter)):
        raise FewShotError(f"the inner learning rate is {value}; expected a finite number above 0")
