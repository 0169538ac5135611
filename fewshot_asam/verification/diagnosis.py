"""Which layer of a model cannot be differentiated as asked, and what to do about it, in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from fewshot_asam.engine.functional import FunctionalModel, exclusive, found_in
from fewshot_asam.engine.gradients import graph_of
from fewshot_asam.models import cpu_kernels
from fewshot_asam.verification import requirements
from fewshot_asam.verification.finite_differences import IMAGES, Case, Mode, Order, Outcome, tried, undisturbed

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module for one task."""

BESIDE = 0.2
"""How far from its own values a model is tried too, relative, at most."""
CURES = {
    "loop": {
        "wrong gradient": "if that is meant so, as with a detached or straight-through gradient, pass check=False; use "
        "recompute=True in place of torch.utils.checkpoint",
        "wrong second derivative": "write it in basic operations, or pass check=False",
        "fails": "write it in basic operations that have dense derivatives (sparse=False)",
    },
    "functional": dict.fromkeys(("wrong gradient", "wrong second derivative", "fails"), "use torch_compile=False"),
    "vmap": dict.fromkeys(("wrong gradient", "wrong second derivative", "fails"), "use engine='loop'"),
}
UNKNOWN = "if you know that PyTorch differentiates it rightly, twice, pass check=False"
WORDS = {"loop": "PyTorch", "functional": "torch.func.grad", "vmap": "vmap"}


def diagnosed(model: FunctionalModel, adapted: tuple[str, ...], mode: Mode, order: Order, call: Call) -> str | None:
    """What is wrong with a model in one mode, for the user; nothing where it is right, None where nobody can tell.

    Tries `model` on the first images of a call, in double precision, and names the layer where that goes wrong. Without
    images, and where the model gives NaN for them, nothing is learned of it.

    Raises `FewShotError` where a forward pass changes the model's buffers, which would leak from task to task.
    """
    with exclusive, requirements.attributes_kept(model.module):
        images, tasks = _first_images(call), 2 if mode == "vmap" else 1
        case = _runnable(model, images, tasks, adapted)
        with undisturbed(next(iter(case.leaves.values()))):
            requirements.require_stateless(case)
            if not requirements.tells(case):
                return None
            requirements.require_repeatable(case)
            requirements.require_reached(case)
        outcome, own = _outcome(case, mode, order)
        if outcome.verdict == "right":
            return ""
        if mode != "loop" and (problem := diagnosed(model, adapted, "loop", order, call)):
            return problem  # no other mode would cure it
        layer, kind, outcome = _culprit(model.module, images, tasks, mode, order, own) or ("", model.module, outcome)
        first_order = order == 2 and tried(case, mode, 1).verdict == "right"
        return _in_words(layer, kind, mode, outcome, first_order)


def part_diagnosed(model: nn.Module, part: str, order: Order, call: Call) -> str:
    """What is wrong with a layer or a method that is called by itself, for the user; nothing where it is right.

    So is one that cannot be tried by itself, as with images in double precision: where it cannot be differentiated
    either, it says so.
    """
    module = _Part(model, part)
    function, images = FunctionalModel(module), _first_images(call)
    with exclusive, requirements.attributes_kept(model):
        try:
            case = _runnable(function, images, 1, tuple(function.parameters()), differentiate_inputs=True)
            with undisturbed(next(iter(case.leaves.values()))):
                outputs = pytree.tree_leaves(case.output(*case.of_task(0)))
        except Exception:  # of anyone's model
            return ""
        if not any(isinstance(value, Tensor) and value.is_floating_point() for value in outputs):
            return ""
        with undisturbed(next(iter(case.leaves.values()))):
            requirements.require_stateless(case)
            requirements.require_reached(case)
        outcome, own = _outcome(case, "loop", order)
        if not outcome.verdict.startswith("wrong"):
            return ""
        found = _culprit(module, images, 1, "loop", order, own) or ("", module, outcome)
        inner = found[0].removeprefix("module").removeprefix(".")
        layer, kind, outcome = (inner, found[1], found[2]) if inner else (part, model, outcome)
        return _in_words(layer, kind, "loop", outcome, order == 2 and tried(case, "loop", 1).verdict == "right")


class _Part(nn.Module):
    """A layer or a method of a module."""

    def __init__(self, module: nn.Module, part: str) -> None:
        super().__init__()
        self.module, self.part = module, part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return found_in(self.module, self.part)(*args, **kwargs)


def _outcome(case: Case, mode: Mode, order: Order) -> tuple[Outcome, bool]:
    """What is found at the model's own values and beside them, and whether it was found at its own.

    Beside them there is no kink that a bias of zero may stand on, and no head of zeros that hides the layers below it;
    and a backward pass shows that takes the model's own values in place of those it was given.
    """
    own = tried(case, mode, order)
    if own.verdict in ("fails", "unknown"):
        return own, True
    return tried(_moved(case), mode, order), False


def _runnable(
    model: FunctionalModel, call: Call, tasks: int, adapted: tuple[str, ...], differentiate_inputs: bool = False
) -> Case:
    """The case in double precision; as it is where a model runs in its own precision alone."""
    for precise in (_double, torch.clone):
        case = _case(model, call, tasks, adapted, differentiate_inputs, precise)
        with undisturbed(next(iter(case.leaves.values()))), requirements.attributes_kept(model.module):
            try:
                case.output(*case.of_task(0))
                return case
            except Exception:  # of anyone's model
                if precise is torch.clone:
                    raise
    raise AssertionError


def _in_words(layer: str, kind: nn.Module, mode: Mode, outcome: Outcome, first_order: bool) -> str:
    named = f"layer {layer!r} ({type(kind).__name__})" if layer else requirements.named(kind, "")
    if outcome.verdict == "unknown":
        return f"the derivatives of {named} cannot be checked, as {outcome.reason}; {UNKNOWN}"
    cure = CURES[mode][outcome.verdict] + (", or first_order=True" if first_order and mode == "loop" else "")
    if isinstance(kind, torch._dynamo.OptimizedModule):
        cure = "pass the module as it is before torch.compile; torch_compile=True compiles its gradient"
    if mode == "vmap" and isinstance(kind, nn.BatchNorm2d):
        cure += ", or fewshot_asam.models.TaskNorm in its place"
    if outcome.verdict == "fails":
        return f"{named} cannot be differentiated by {WORDS[mode]} as is needed: {outcome.reason}; {cure}"
    return (
        f"the {outcome.verdict.removeprefix('wrong ')} of {named} by {WORDS[mode]} is wrong ({outcome.reason}); {cure}"
    )


def _culprit(
    model: nn.Module, call: Call, tasks: int, mode: Mode, order: Order, own: bool
) -> tuple[str, nn.Module, Outcome] | None:
    """The innermost layer that goes wrong by itself, on the inputs that it has in the model."""
    for name, layer, inputs in _calls(model, call):
        function = FunctionalModel(layer)
        try:
            case = _case(function, inputs, tasks, tuple(dict(layer.named_parameters())), differentiate_inputs=True)
        except Exception:  # a layer that cannot be called by itself
            continue
        outcome = tried(case if own else _moved(case), mode, order) if case.leaves else Outcome("right")
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
    layers = [(n, m) for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]  # takes no hooks
    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _case(
    model: FunctionalModel,
    call: Call,
    tasks: int,
    adapted: tuple[str, ...],
    differentiate_inputs: bool = False,
    precise: Callable[[Tensor], Tensor] | None = None,
) -> Case:
    """A case in double precision; a second task has slightly other parameters."""
    precise = precise or _double
    data, structure = pytree.tree_flatten(call)
    data = [precise(value.detach()) if isinstance(value, Tensor) else value for value in data]
    named = model.parameters()
    leaves = {name: precise(value.detach()) for name, value in named.items() if value.requires_grad}
    rest = {name: value for name, value in named.items() if not value.requires_grad}
    fixed = {name: precise(value.detach()) for name, value in (rest | dict(model.module.named_buffers())).items()}
    if differentiate_inputs:
        inputs = {str(i): v for i, v in enumerate(data) if isinstance(v, Tensor) and v.is_floating_point()}
        leaves |= inputs
        adapted = tuple(leaves)
    stacked = {
        name: torch.stack([value * (1 + 0.01 * task) for task in range(tasks)]) for name, value in leaves.items()
    }
    batched = [torch.stack([value] * tasks) if isinstance(value, Tensor) else value for value in data]
    return Case(model, stacked, adapted, fixed, batched, structure)


def _moved(case: Case) -> Case:
    """The same beside its values, with the same signs; tensors of zeros, which would hide others, are filled."""
    generator = torch.Generator().manual_seed(1)
    return replace(case, leaves={name: _beside(value, generator) for name, value in case.leaves.items()})


def _beside(value: Tensor, generator: torch.Generator) -> Tensor:
    by = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
    if not value.any():
        return by - 0.5
    by = by * BESIDE
    return torch.where(value == 0, by, value * (1 - by))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.clone()


def _first_images(call: Call) -> Call:
    """The same call with the first few images alone, where all of its tensors have as many rows."""
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    if len({len(value) if value.ndim else 0 for value in tensors}) != 1:
        return call
    return pytree.tree_map(lambda value: value[:IMAGES] if isinstance(value, Tensor) else value, call)  # type: ignore[no-any-return]


def own_function(model: FunctionalModel, call: Call) -> str:
    """What to do where the model calls an `autograd.Function` of somebody's own and is to be compiled; else nothing.

    `torch.compile` takes the gradient of one for a constant within `torch.func.grad` (seen with torch 2.13).
    """
    for name, layer, inputs in _calls(model.module, _first_images(call)):
        case = _case(FunctionalModel(layer), inputs, 1, (), differentiate_inputs=True)
        with undisturbed(torch.empty(0)), cpu_kernels.disabled(), torch.enable_grad():
            leaves, data = case.of_task(0)
            outputs = pytree.tree_leaves(case.output({n: v.requires_grad_() for n, v in leaves.items()}, data))
        graph = graph_of([value.grad_fn for value in outputs if isinstance(value, Tensor)])
        if any(isinstance(node, BackwardCFunction) for level in graph for node in level):
            named = requirements.named(model.module, name)
            return (
                f"{named} calls an autograd.Function, which torch.compile differentiates wrongly; use "
                "torch_compile=False"
            )
    return ""


def logits_from(model: FunctionalModel, call: Call) -> set[str]:
    """The parameters of the layer that produces the model's output: those next to it in the graph."""
    case = _case(model, _first_images(call), 1, ())
    with undisturbed(next(iter(case.leaves.values()))), torch.enable_grad():
        leaves = {name: value[0].requires_grad_() for name, value in case.leaves.items()}
        outputs = pytree.tree_leaves(case.output(leaves, case.of_task(0)[1]))
        output = next(value for value in outputs if isinstance(value, Tensor))
    names = {id(value): name for name, value in leaves.items()}
    for level in graph_of([output.grad_fn]):
        if found := {names[id(node.variable)] for node in level if id(getattr(node, "variable", None)) in names}:
            owners = {name.rpartition(".")[0] for name in found}
            return {name for name in leaves if name.rpartition(".")[0] in owners}
    return set()
