"""Whether PyTorch differentiates a model rightly, and twice: tried in double precision on a few images.

Some operations have a second derivative that is wrong without a word: `F.batch_norm` and `F.layer_norm` under `vmap`
(https://github.com/pytorch/functorch/issues/534), `torch._weight_norm` everywhere. No list of them is complete, so the
gradient is compared with finite differences of the output, and the second derivative with those of the gradient. One
trial takes two forward passes and about five gradients of four images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.rules.perturbations import Params

Mode = Literal["loop", "functional", "vmap"]
"""Gradients by `torch.autograd.grad`, by `torch.func.grad`, or by that under `vmap`."""
Order = Literal[1, 2]
"""Derivatives that are needed: a second one for meta-gradients of second order."""
Verdict = Literal["right", "wrong gradient", "wrong second derivative", "fails", "unknown"]


class Differences(NamedTuple):
    """How finite differences are taken, and what they must agree with, both relative."""

    step: float
    tolerance: float


FINE = Differences(1e-8, 1e-4)
"""So short that a ReLU's kink is rarely met; PyTorch's wrong derivatives are off by 1e-2, these by about 1e-6."""
COARSE = Differences(1e-3, 1e-2)
"""For models that compute in single precision inside."""
ATTEMPTS = 3
"""Directions that are tried where a kink was met."""
IMAGES = 4


class Outcome(NamedTuple):
    """What a trial found and, where it did not go well, why."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """A module, the values of its parameters and what it is called with, with a leading dimension of tasks.

    - `leaves`: what is differentiated, `[T, ...]` each; `wanted` are the names that the inner loop changes.
    - `fixed`: parameters and buffers that are not, without that dimension.
    - `data`: the call's arguments, flattened; `structure` puts them together. Those that are differentiated stand in
      `leaves` under their place's number.
    """

    model: FunctionalModel
    leaves: Params
    wanted: tuple[str, ...]
    fixed: Params
    data: list[Any]
    structure: Any

    def arguments(self, leaves: Params, data: list[Any]) -> Any:
        """The call's positional and keyword arguments for one task."""
        inputs = {
            int(name): value.clone() for name, value in leaves.items() if name.isdigit()
        }  # may be changed in place
        given = [inputs.get(place, value) for place, value in enumerate(data)]
        return pytree.tree_unflatten(given, self.structure)

    def output(self, leaves: Params, data: list[Any]) -> Any:
        """The module's output for one task."""
        args, kwargs = self.arguments(leaves, data)
        params = {name: value for name, value in leaves.items() if not name.isdigit()}
        return self.model({name: value.clone() for name, value in self.fixed.items()} | params, *args, **kwargs)

    def of_task(self, task: int) -> tuple[Params, list[Any]]:
        """One task's leaves and data."""
        data = [value[task] if isinstance(value, Tensor) else value for value in self.data]
        return {name: value[task] for name, value in self.leaves.items()}, data

    def objective(self, leaves: Params, data: list[Any]) -> Tensor:
        """A number that depends on all outputs, and not linearly."""
        outputs = [value for value in pytree.tree_leaves(self.output(leaves, data)) if _is_float(value)]
        parts = []
        for value in outputs:
            weights = torch.arange(1, value.numel() + 1, device=value.device, dtype=value.dtype).cos().view_as(value)
            parts.append((weights * (value + value.square())).mean())
        return torch.stack(parts).sum()

    def gradient(self, leaves: Params, mode: Mode) -> tuple[Params, Tensor]:
        """The objective's gradient at `leaves`, `[T, ...]` each, with a graph where they have one; and its value."""
        take = _by_autograd if mode == "loop" else torch.func.grad_and_value
        return self.of_each_task(take(self.objective), leaves, mode)  # type: ignore[no-any-return]

    def of_each_task(self, function: Callable[..., Any], leaves: Params, mode: Mode) -> Any:
        """What `function(leaves, data)` gives for each task, stacked; every call draws the same random numbers."""
        torch.manual_seed(0)
        if mode == "vmap":
            places = [0 if isinstance(value, Tensor) else None for value in self.data]
            return torch.func.vmap(function, in_dims=(0, places), randomness="different")(leaves, self.data)
        here, found = replace(self, leaves=leaves), []
        for task in range(len(next(iter(leaves.values())))):
            found.append(function(*here.of_task(task)))
        return pytree.tree_map(lambda *values: torch.stack(values), *found)


def _by_autograd(objective: Callable[..., Tensor]) -> Callable[..., tuple[Params, Tensor]]:
    def gradient(leaves: Params, data: list[Any]) -> tuple[Params, Tensor]:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            own = leaves if graph else {name: value.detach().requires_grad_() for name, value in leaves.items()}
            value = objective(own, data)
            grads = torch.autograd.grad(
                value, list(own.values()), create_graph=graph, allow_unused=True, materialize_grads=True
            )
        return dict(zip(own, grads, strict=True)), value.detach()

    return gradient


def tried(case: Case, mode: Mode, order: Order) -> Outcome:
    """Whether the derivatives of `case` are right in this mode."""
    with undisturbed(next(iter(case.leaves.values()))):
        try:
            return _compared(case, mode, order)
        except Exception as error:  # of anyone's model
            return Outcome("fails", first_line(error))


@contextmanager
def undisturbed(tensor: Tensor) -> Iterator[None]:
    """Within, neither the random generators nor autocast nor warnings have to do with the world outside."""
    devices = [tensor.device] if tensor.device.type == "cuda" else []
    with ExitStack() as held:
        held.enter_context(torch.random.fork_rng(devices))
        held.enter_context(torch.autocast(tensor.device.type, enabled=False))
        held.enter_context(torch.no_grad())
        held.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    """What an error says, on one line of moderate length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _compared(case: Case, mode: Mode, order: Order) -> Outcome:
    case.of_each_task(case.objective, case.leaves, mode)  # what cannot be predicted without a gradient says so
    first, again = (case.gradient(case.leaves, mode)[0] for _ in range(2))
    if _apart(first, again, first) > FINE.tolerance:
        return Outcome("unknown", "its forward pass draws numbers that torch.manual_seed does not control")
    generator, outcome = torch.Generator().manual_seed(0), Outcome("unknown")
    for by in (FINE, COARSE):
        for _ in range(ATTEMPTS):
            direction = {name: sized_noise(value, generator) for name, value in case.leaves.items()}
            outcome = _slope(case, mode, by, first, direction)
            if outcome.verdict == "right" and order == 2:
                outcome = _curvature(case, mode, by, {n: v * (n in case.wanted) for n, v in direction.items()})
            if outcome.verdict == "right":
                return outcome
        if outcome.verdict != "unknown":
            return outcome
    return outcome


def _slope(case: Case, mode: Mode, by: Differences, gradient: Params, direction: Params) -> Outcome:
    """The gradient along `direction` against differences of the objective, task by task."""

    def slope(step: float) -> Params:
        points = (_moved(case.leaves, direction, sign * step) for sign in (1, -1))
        ahead, behind = (case.gradient(point, mode)[1] for point in points)
        return {"": (ahead - behind) / (2 * step)}

    along = [(gradient[name] * direction[name]).reshape(len(gradient[name]), -1) for name in gradient]
    products = torch.cat(along, dim=1)
    size = {"": products.norm(dim=1)}
    return _judged("wrong gradient", by, {"": products.sum(1)}, slope, size)


def _curvature(case: Case, mode: Mode, by: Differences, direction: Params) -> Outcome:
    """The second derivative along `direction` against differences of the gradient."""

    def curvature(step: float) -> Params:
        ahead, behind = (case.gradient(_moved(case.leaves, direction, sign * step), mode)[0] for sign in (1, -1))
        return {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}

    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in case.leaves.items()}
        gradient, _ = case.gradient(leaves, mode)
        along = torch.stack([(gradient[name] * direction[name]).sum() for name in gradient]).sum()
        found = torch.autograd.grad(along, list(leaves.values()), allow_unused=True, materialize_grads=True)
    exact = dict(zip(leaves, found, strict=True))
    return _judged("wrong second derivative", by, exact, curvature, exact)


def _judged(wrong: Verdict, by: Differences, exact: Params, taken: Callable[[float], Params], size: Params) -> Outcome:
    """Right where the differences agree with `exact`; wrong where they agree with themselves alone."""
    near = taken(by.step)
    apart = _apart(exact, near, size)
    if apart < by.tolerance:
        return Outcome("right")
    if _apart(near, taken(4 * by.step), size) < min(100 * by.tolerance, 0.1 * apart):
        return Outcome(wrong, f"a relative error of {apart:.0e}")
    return Outcome("unknown", "finite differences of it are too rough: it is not smooth, or computed in few digits")


def _apart(one: Params, other: Params, size: Params) -> float:
    """The largest difference of a tensor, relative to its own size and a hundredth of that of all."""
    whole = torch.stack([value.norm() for value in (*size.values(), *other.values())]).max()
    parts = [
        (one[name] - other[name]).norm()
        / (torch.maximum(size[name].norm(), other[name].norm()) + 0.01 * whole + 1e-300)
        for name in one
    ]
    return torch.stack(parts).max().item()


def _moved(leaves: Params, direction: Params, by: float) -> Params:
    return {name: value + by * direction[name] for name, value in leaves.items()}


def sized_noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers as large as the tensor that they move, or as 1 where that is zero."""
    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    size = value.square().mean().sqrt()
    return noise * torch.where(size > 0, size, torch.ones_like(size))


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
