"""Which layer of a model cannot be differentiated as asked, and what to do about it, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from fewshot_asam import fused
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.trial import (
    IMAGES,
    Case,
    Mode,
    Order,
    Outcome,
    first_line,
    sized_noise,
    tried,
    undisturbed,
)
from fewshot_asam.errors import FewShotError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module for one task."""

CURES = {
    "loop": {
        "wrong gradient": "if that is meant so, as with a detached or straight-through gradient, pass check=False",
        "wrong second derivative": "write it in basic operations, use first_order=True, or pass check=False",
        "fails": "use a layer with a second derivative, or first_order=True",
    },
    "functional": dict.fromkeys(("wrong gradient", "wrong second derivative", "fails"), "use compiled=False"),
    "vmap": dict.fromkeys(("wrong gradient", "wrong second derivative", "fails"), "use engine='loop'"),
}
UNKNOWN = "if you know that PyTorch differentiates it rightly, twice, pass check=False"
WORDS = {"loop": "PyTorch", "functional": "torch.func.grad", "vmap": "vmap"}


def diagnosed(model: FunctionalModel, adapted: tuple[str, ...], mode: Mode, order: Order, call: Call) -> str:
    """What is wrong with a model in one mode, for the user; nothing where it is right.

    Tries `model` on the first images of a call, in double precision, and names the layer where that goes wrong.

    Raises `FewShotError` where a forward pass changes the model's buffers, which would leak from task to task.
    """
    name = type(model.module).__name__
    images, tasks = _first_images(call), 2 if mode == "vmap" else 1
    try:
        case = _case(model, images, tasks, adapted)
        with undisturbed(next(iter(case.leaves.values()))):
            _require_stateless(case)
    except FewShotError:
        raise
    except Exception as error:  # of anyone's model
        return f"{name} cannot be run in double precision to be checked ({first_line(error)}); {UNKNOWN}"
    outcome = tried(case, mode, order)
    if outcome.verdict == "right":
        return ""
    layer, kind, outcome = _culprit(model.module, images, tasks, mode, order) or ("", model.module, outcome)
    return _in_words(layer, kind, mode, outcome)


def _in_words(layer: str, kind: nn.Module, mode: Mode, outcome: Outcome) -> str:
    named = f"layer {layer!r} ({type(kind).__name__})" if layer else f"{type(kind).__name__}.forward itself"
    if outcome.verdict == "unknown":
        return f"the derivatives of {named} cannot be checked, as {outcome.reason}; {UNKNOWN}"
    cure = CURES[mode][outcome.verdict]
    if mode == "vmap" and isinstance(kind, nn.BatchNorm2d):
        cure += ", or fewshot_asam.models.TaskNorm in its place"
    if outcome.verdict == "fails":
        return f"{named} cannot be differentiated by {WORDS[mode]} as is needed: {outcome.reason}; {cure}"
    return (
        f"the {outcome.verdict.removeprefix('wrong ')} of {named} by {WORDS[mode]} is wrong ({outcome.reason}); {cure}"
    )


def _culprit(
    model: nn.Module, call: Call, tasks: int, mode: Mode, order: Order
) -> tuple[str, nn.Module, Outcome] | None:
    """The innermost layer that goes wrong by itself, on the inputs that it has in the model."""
    for name, layer, inputs in _calls(model, call):
        function = FunctionalModel(layer)
        try:
            case = _case(function, inputs, tasks, tuple(dict(layer.named_parameters())), differentiate_inputs=True)
        except Exception:  # a layer that cannot be called by itself
            continue
        outcome = tried(case, mode, order) if case.leaves else Outcome("right")
        if outcome.verdict != "right":
            return name, layer, outcome
    return None


def _calls(model: nn.Module, call: Call) -> list[tuple[str, nn.Module, Call]]:
    """Each layer with its first inputs, in the order in which they end: inner layers before outer ones."""
    found: dict[str, tuple[str, nn.Module, Call]] = {}

    def note(name: str) -> Any:
        return lambda layer, args, kwargs, output: found.setdefault(name, (name, layer, (args, kwargs))) and None

    function = FunctionalModel(model)
    with function.alone(), _hooked(model, note):
        case = _case(function, call, 1, ())
        with undisturbed(next(iter(case.leaves.values()))):
            case.output(*case.of_task(0))
    return list(found.values())


@contextmanager
def _hooked(model: nn.Module, note: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _case(
    model: FunctionalModel, call: Call, tasks: int, adapted: tuple[str, ...], differentiate_inputs: bool = False
) -> Case:
    """A case in double precision, somewhat off the stored weights: at a head of zeros, nothing else has a gradient."""
    data, structure = pytree.tree_flatten(call)
    data = [_double(value) if isinstance(value, Tensor) else value for value in data]
    named = model.parameters()
    leaves = {name: _double(value) for name, value in named.items() if value.requires_grad}
    rest = {name: value for name, value in named.items() if not value.requires_grad}
    fixed = {name: _double(value) for name, value in (rest | dict(model.module.named_buffers())).items()}
    if differentiate_inputs:
        inputs = {str(i): v for i, v in enumerate(data) if isinstance(v, Tensor) and v.is_floating_point()}
        leaves |= inputs
        adapted = tuple(leaves)
    generator = torch.Generator().manual_seed(1)
    stacked = {
        name: torch.stack([value + 0.1 * sized_noise(value, generator) for _ in range(tasks)])
        for name, value in leaves.items()
    }
    batched = [torch.stack([value] * tasks) if isinstance(value, Tensor) else value for value in data]
    return Case(model, stacked, adapted, fixed, batched, structure)


def _double(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value.detach().clone()


def _first_images(call: Call) -> Call:
    """The same call with the first few images alone, where all of its tensors have as many rows."""
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    if len({len(value) if value.ndim else 0 for value in tensors}) != 1:
        return call
    return pytree.tree_map(lambda value: value[:IMAGES] if isinstance(value, Tensor) else value, call)  # type: ignore[no-any-return]


def _require_stateless(case: Case) -> None:
    """Raises for a buffer that a forward pass changes."""
    leaves, data = case.of_task(0)
    args, kwargs = case.arguments(leaves, data)
    state = {name: value.clone() for name, value in case.fixed.items()}
    for name in case.model.replaced(state | leaves, *args, **kwargs):
        layer, _, buffer = name.rpartition(".")
        kind = type(case.model.module.get_submodule(layer)).__name__
        raise FewShotError(
            f"layer {layer!r} ({kind}) changes its buffer {buffer!r} in every forward pass, which would leak from "
            "task to task; call .eval() on that layer, or use one without such a state"
        )


def own_function(model: FunctionalModel, call: Call) -> str:
    """What to do where the model calls an `autograd.Function` of somebody's own and is to be compiled; else nothing.

    `torch.compile` takes the gradient of one for a constant within `torch.func.grad` (seen with torch 2.13).
    """
    for name, layer, inputs in _calls(model.module, _first_images(call)):
        case = _case(FunctionalModel(layer), inputs, 1, (), differentiate_inputs=True)
        with undisturbed(torch.empty(0)), fused.disabled(), torch.enable_grad():
            leaves, data = case.of_task(0)
            outputs = pytree.tree_leaves(case.output({n: v.requires_grad_() for n, v in leaves.items()}, data))
        graph = _graph([value.grad_fn for value in outputs if isinstance(value, Tensor)])
        if any(isinstance(node, BackwardCFunction) for level in graph for node in level):
            named = f"layer {name!r} ({type(layer).__name__})" if name else f"{type(layer).__name__}.forward itself"
            return f"{named} calls an autograd.Function, which torch.compile differentiates wrongly; use compiled=False"
    return ""


def logits_from(model: FunctionalModel, call: Call) -> set[str]:
    """The parameters of the layer that produces the model's output: those next to it in the graph."""
    case = _case(model, _first_images(call), 1, ())
    with undisturbed(next(iter(case.leaves.values()))), torch.enable_grad():
        leaves = {name: value[0].requires_grad_() for name, value in case.leaves.items()}
        outputs = pytree.tree_leaves(case.output(leaves, case.of_task(0)[1]))
        output = next(value for value in outputs if isinstance(value, Tensor))
    names = {id(value): name for name, value in leaves.items()}
    for level in _graph([output.grad_fn]):
        if found := {names[id(node.variable)] for node in level if id(getattr(node, "variable", None)) in names}:
            owners = {name.rpartition(".")[0] for name in found}
            return {name for name in leaves if name.rpartition(".")[0] in owners}
    return set()


def _graph(level: list[Any]) -> Iterator[list[Any]]:
    """The nodes of an autograd graph, from its results on, by their distance."""
    seen: set[Any] = set()
    while level := [node for node in dict.fromkeys(level) if node is not None and node not in seen]:
        yield level
        seen.update(level)
        level = [after for node in level for after, _ in node.next_functions]
