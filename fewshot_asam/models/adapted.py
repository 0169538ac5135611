"""Which of a model's parameters the inner loop changes, and which models it can change."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from fewshot_asam.errors import FewShotError, require_one_of

Adapt = Literal["all", "head", "body", "no_norm"]
"""Which parameters the inner loop changes."""
Predicate = Callable[[str, nn.Parameter], bool]
"""The same as a function of a parameter's name and the parameter."""
Adapted = Adapt | Sequence[str] | Predicate
"""Any way to say it: in a word, by names and patterns, or by a function."""


def takes_support(model: nn.Module) -> bool:
    """Whether the model's `forward` can be told which images give the norm's statistics."""
    return "support" in inspect.signature(model.forward).parameters


def norm_layers(model: nn.Module) -> list[str]:
    """Names of the layers that normalise, by their class's name: BatchNorm2d, GroupNorm, TaskNorm ..."""
    return [name for name, layer in model.named_modules() if re.search(r"Norm(\dd)?$", type(layer).__name__)]


def adapted_names(model: nn.Module, adapt: Adapted) -> tuple[str, ...]:
    """Names of the trainable parameters that the inner loop changes; see `meta.MetaLearner`."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    if not names:
        raise FewShotError(f"{type(model).__name__} has no trainable parameter; there is nothing to adapt")
    if callable(adapt):
        return _fitting(model, adapt)
    if not isinstance(adapt, str):
        return _matching(names, adapt, model)
    require_one_of("adapt", adapt, get_args(Adapt))
    owners = {name: name.rpartition(".")[0] for name in names}
    head, norms = owners[names[-1]], set(norm_layers(model))
    chosen = {
        "all": names,
        "head": [name for name in names if owners[name] == head],
        "body": [name for name in names if owners[name] != head],
        "no_norm": [name for name in names if owners[name] not in norms],
    }[adapt]
    if not chosen:
        raise FewShotError(f"adapt {adapt!r} leaves {type(model).__name__} no parameter to adapt; choose another")
    return tuple(chosen)


def _fitting(model: nn.Module, adapt: Predicate) -> tuple[str, ...]:
    chosen = tuple(name for name, value in model.named_parameters() if value.requires_grad and adapt(name, value))
    if not chosen:
        raise FewShotError(f"adapt fits no trainable parameter of {type(model).__name__}; expected one that is true")
    return chosen


def _matching(names: Sequence[str], patterns: Sequence[str], model: nn.Module) -> tuple[str, ...]:
    """The names that one of the patterns fits, each of which must fit one."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise FewShotError(
                f"adapt has {pattern!r}, which fits no trainable parameter of {type(model).__name__}; expected names "
                f"or patterns such as {names[-1]!r} or '{names[-1].rpartition('.')[0] or names[-1]}*'"
            )
    chosen = tuple(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    if not chosen:
        raise FewShotError("adapt is empty; expected at least one name or pattern of parameters")
    return chosen


def require_replaceable(model: nn.Module) -> None:
    """Raises `FewShotError` for a model whose parameters cannot be put in by the inner loop."""
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise FewShotError(f"{kind} keeps its layers for itself; use the module in it: model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise FewShotError(f"{kind} is a TorchScript program, whose parameters stay; use the module as it is in Python")
    for name, value in model.named_parameters():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise FewShotError(f"parameter {name!r} has no shape yet; call the model on some images once, then pass it")
        if value.requires_grad and value.is_complex():
            raise FewShotError(
                f"parameter {name!r} is complex, for which the rules' norms are not made; use a real one with a last "
                "dimension of two, and torch.view_as_complex in forward"
            )


def require_stateless(model: nn.Module) -> None:
    """Raises `FewShotError` naming a layer that moves its running statistics, which every inner step would do.

    A layer in `eval()` mode uses them and leaves them alone.
    """
    for name, layer in running_norms(model):
        if layer.training:
            raise FewShotError(
                f"layer {name!r} ({type(layer).__name__}) keeps running statistics, which adaptation would leak from "
                "task to task; expected norm layers on batch statistics: pass track_running_stats=False to them, or "
                "the model to fewshot_asam.models.drop_running_statistics; to use them as they are, call .eval() on it"
            )


def hooked(layer: nn.Module) -> bool:
    """Whether a call of the layer does more than its `forward`."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def running_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that have running statistics, by name."""
    for name, layer in model.named_modules():
        if getattr(layer, "running_mean", None) is not None:
            yield name, layer


def drop_running_statistics(model: nn.Module) -> nn.Module:
    """Makes every norm layer of `model` use the statistics of its batch alone, in place; returns the model."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return model
