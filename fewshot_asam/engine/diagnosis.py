"""Which layer of a model cannot be differentiated as asked, and what to do about it, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.trial import IMAGES, Case, Mode, Order, Outcome, first_line, tried, undisturbed
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
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm)
WORDS = {"loop": "PyTorch", "functional": "torch.func.grad", "vmap": "vmap"}


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a model in one mode, for the user; both empty where nothing is."""

    problem: str = ""
    warning: str = ""


def diagnosed(model: FunctionalModel, adapted: tuple[str, ...], mode: Mode, order: Order, call: Call) -> Diagnosis:
    """Tries `model` on the first images of a call, in double precision, and names the layer where that goes wrong.

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
        return Diagnosis("", f"{name} does not run in double precision ({first_line(error)}), so {_UNKNOWN}")
    outcome = tried(case, mode, order)
    if outcome.verdict == "right":
        return Diagnosis()
    if outcome.verdict == "unknown":
        return Diagnosis("", f"the derivatives of {name} cannot be compared ({outcome.reason}), so {_UNKNOWN}")
    layer, kind, outcome = _culprit(model.module, images, tasks, mode, order) or ("", model.module, outcome)
    return Diagnosis(_in_words(layer, kind, mode, outcome))


_UNKNOWN = "whether PyTorch differentiates it rightly is not known; check=False silences this"


def _in_words(layer: str, kind: nn.Module, mode: Mode, outcome: Outcome) -> str:
    named = f"layer {layer!r} ({type(kind).__name__})" if layer else f"{type(kind).__name__}.forward itself"
    cure = CURES[mode][outcome.verdict]
    if mode == "vmap" and isinstance(kind, nn.modules.batchnorm._NormBase):
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
    for name, layer, inputs in reversed(_calls(model, call)):
        function = FunctionalModel(layer)
        try:
            case = _case(function, inputs, tasks, tuple(dict(layer.named_parameters())), differentiate_inputs=True)
        except Exception:  # a layer that cannot be called by itself
            continue
        outcome = tried(case, mode, order) if case.leaves else Outcome("right")
        if outcome.verdict not in ("right", "unknown"):
            return name, layer, outcome
    return None


def _calls(model: nn.Module, call: Call) -> list[tuple[str, nn.Module, Call]]:
    """Each layer with its first inputs, outer layers before inner ones."""
    found: dict[str, tuple[str, nn.Module, Call]] = {}

    def note(name: str) -> Any:
        return lambda layer, args, kwargs: found.setdefault(name, (name, layer, (args, kwargs))) and None

    function = FunctionalModel(model)
    with function.alone(), _hooked(model, note):
        case = _case(function, call, 1, ())
        with undisturbed(next(iter(case.leaves.values()))):
            case.output(*case.of_task(0))
    return [found[name] for name, _ in model.named_modules() if name in found]


@contextmanager
def _hooked(model: nn.Module, note: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _case(
    model: FunctionalModel, call: Call, tasks: int, adapted: tuple[str, ...], differentiate_inputs: bool = False
) -> Case:
    """A case in double precision; a second task has slightly other parameters."""
    data, structure = pytree.tree_flatten(call)
    data = [_double(value) if isinstance(value, Tensor) else value for value in data]
    named = dict(model.module.named_parameters())
    leaves = {name: _double(value) for name, value in named.items() if value.requires_grad}
    rest = {name: value for name, value in named.items() if not value.requires_grad}
    fixed = {name: _double(value) for name, value in (rest | dict(model.module.named_buffers())).items()}
    if differentiate_inputs:
        inputs = {str(i): v for i, v in enumerate(data) if isinstance(v, Tensor) and v.is_floating_point()}
        leaves |= inputs
        adapted = tuple(leaves)
    stacked = {
        name: torch.stack([value * (1 + 0.01 * task) for task in range(tasks)]) for name, value in leaves.items()
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
    args, kwargs = case.arguments(*case.of_task(0))
    state = {name: value.clone() for name, value in case.fixed.items()}
    for name in case.model.replaced(state, *args, **kwargs):
        layer, _, buffer = name.rpartition(".")
        kind = type(case.model.module.get_submodule(layer)).__name__
        raise FewShotError(
            f"layer {layer!r} ({kind}) changes its buffer {buffer!r} in every forward pass, which would leak from "
            "task to task; call .eval() on that layer, or use one without such a state"
        )


def logits_from(model: FunctionalModel, call: Call) -> set[str]:
    """The parameters of the layer that produces the model's output: those next to it in the graph."""
    case = _case(model, _first_images(call), 1, ())
    with undisturbed(next(iter(case.leaves.values()))), torch.enable_grad():
        leaves = {name: value[0].requires_grad_() for name, value in case.leaves.items()}
        outputs = pytree.tree_leaves(case.output(leaves, case.of_task(0)[1]))
        output = next(value for value in outputs if isinstance(value, Tensor))
    names = {id(value): name for name, value in leaves.items()}
    level: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while level := [node for node in level if node is not None and node not in seen]:
        if found := {names[id(node.variable)] for node in level if id(getattr(node, "variable", None)) in names}:
            owners = {name.rpartition(".")[0] for name in found}
            return {name for name in leaves if name.rpartition(".")[0] in owners}
        seen.update(level)
        level = [after for node in level for after, _ in node.next_functions]
    return set()
