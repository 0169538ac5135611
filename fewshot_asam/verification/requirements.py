"""What a model must be like before its derivatives are looked at: each forward pass by itself, on what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewshot_asam.engine.gradients import variables
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.verification.finite_differences import Case


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards the layers' attributes and buffers are as before, whatever their forward passes left there."""
    layers = [layer for layer in module.modules() if not isinstance(layer, torch.jit.ScriptModule)]
    places = [place for layer in layers for place in (layer.__dict__, layer._buffers)]
    before, transient = [dict(place) for place in places], [set(layer._non_persistent_buffers_set) for layer in layers]
    try:
        yield
    finally:
        for place, values in zip(places, before, strict=True):
            for name in set(place) - set(values):
                del place[name]
            place.update(values)
        for layer, names in zip(layers, transient, strict=True):
            layer._non_persistent_buffers_set.intersection_update(names)


def require_stateless(case: Case) -> None:
    """Raises for a buffer, a parameter or an image that a forward pass changes."""
    leaves, data = case.of_task(0)
    given = [value.clone() if isinstance(value, Tensor) else value for value in data]
    args, kwargs = case.arguments(leaves, given)
    state = {name: value.clone() for name, value in case.fixed.items()}
    with attributes_kept(case.model.module):
        params = {place: value for place, value in leaves.items() if not place.isdigit()}
        replaced = case.model.replaced(state | params, *args, **kwargs)
    for name in replaced:
        layer, _, own = name.rpartition(".")
        if name in case.leaves:
            raise FewShotError(
                f"{named(case.model.module, layer)} changes its parameter {own!r} in every forward pass, which would "
                "leak from task to task; use the changed value in forward and leave the parameter as it is"
            )
        raise FewShotError(
            f"{named(case.model.module, layer)} changes its buffer {own!r} in every forward pass, which would leak "
            "from task to task; call .eval() on that layer, or use one without such a state"
        )
    if not all(_same(before, after) for before, after in zip(data, given, strict=True)):
        raise FewShotError(
            f"{named(case.model.module, '')} changes its input in place, which every inner step would do again; "
            "use a copy of it, x.clone()"
        )


def tells(case: Case) -> bool:
    """Whether there are outputs, and none of them is NaN."""
    with attributes_kept(case.model.module):
        outputs = [value for value in pytree.tree_leaves(case.output(*case.of_task(0))) if isinstance(value, Tensor)]
    return not outputs or all(value.numel() > 0 and not value.isnan().any() for value in outputs)


def require_repeatable(case: Case) -> None:
    """Raises where two forward passes differ: on numbers drawn elsewhere, or on what an earlier one left behind."""
    leaves, data = case.of_task(0)

    def outputs(at: Params) -> list[Any]:
        torch.manual_seed(0)
        copies = [value.clone() if isinstance(value, Tensor) else value for value in data]
        return pytree.tree_leaves(case.output(at, copies))

    found = []
    for _ in range(2):
        with attributes_kept(case.model.module):
            found.append(outputs(leaves))
    name = named(case.model.module, "")
    if not all(map(_same, *found)):
        raise FewShotError(
            f"{name} draws numbers that torch.manual_seed does not control, which cannot be checked; use PyTorch's "
            "default generator, or pass check=False"
        )
    with attributes_kept(case.model.module):
        outputs({name: 1.1 * value for name, value in leaves.items()})
        if not all(map(_same, outputs(leaves), found[0])):
            raise FewShotError(
                f"{name} depends on what an earlier forward pass left in an attribute, which would leak from task to "
                "task; use no such state, or pass check=False"
            )


def require_reached(case: Case) -> None:
    """Raises where no output has a gradient, and for a parameter that is taken from elsewhere than its place."""
    leaves, data = case.of_task(0)
    own = {id(value): name for name, value in case.model.parameters().items()}
    with torch.enable_grad():
        outputs = pytree.tree_leaves(case.output(leaves, data))
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in outputs):
        raise FewShotError(
            f"{named(case.model.module, '')} returned no tensor of floating point ({type(outputs[0]).__name__}); use "
            "a tensor, or tensors in tuples, lists and dictionaries; or pass check=False"
        )
    for held in variables(value for value in outputs if isinstance(value, Tensor)):
        if name := own.get(id(held)):
            layer, _, parameter = name.rpartition(".")
            raise FewShotError(
                f"{named(case.model.module, layer)} has a parameter {parameter!r} that forward takes from somewhere "
                "else, such as a list, where adaptation does not reach it; use the attribute itself"
            )


def named(module: nn.Module, layer: str) -> str:
    kind = type(module.get_submodule(layer)).__name__
    return f"layer {layer!r} ({kind})" if layer else f"{kind}.forward itself"


def _same(one: object, other: object) -> bool:
    """Whether two outputs are the same but for the order in which a device adds."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True)
