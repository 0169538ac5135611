"""The gradient of a loss with respect to a task's parameters, in each of the forms that the engine needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fewshot_asam.errors import FewShotError
from fewshot_asam.rules import Gradient
from fewshot_asam.rules.perturbations import Params

Loss = Callable[[Params], Tensor]
NO_GRADIENT = "the loss has no gradient; expected one that was computed with the task's network"


def autograd_gradient(loss: Loss, params: Params) -> Params:
    """Gradients by `torch.autograd.grad`, for any Python closure; under `torch.no_grad` they carry no graph."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if not differentiable:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
        return found_gradients(loss(params), params, create_graph=differentiable)


def found_gradients(loss: object, params: Params, create_graph: bool) -> Params:
    """The gradients of a loss that was computed from `params`, zeros for those that it does not depend on.

    Raises `FewShotError` for what is no loss, and for one that depends on none of them.
    """
    grads = torch.autograd.grad(scalar(loss), list(params.values()), create_graph=create_graph, allow_unused=True)
    if all(grad is None for grad in grads):
        raise FewShotError(NO_GRADIENT)
    pairs = zip(params.items(), grads, strict=True)
    return {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in pairs}


def scalar(loss: object) -> Tensor:
    """The loss; raises `FewShotError` for what has no gradient."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise FewShotError(f"the loss is {found}; expected a tensor of one number")
    if not loss.requires_grad:
        raise FewShotError(NO_GRADIENT)
    return loss


def variables(values: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that gradients of `values` would be added to."""
    for level in graph_of([value.grad_fn for value in values]):
        for node in level:
            if (held := getattr(node, "variable", None)) is not None:
                yield held


def graph_of(level: list[Any]) -> Iterator[list[Any]]:
    """The nodes of an autograd graph, from its results on, by their distance."""
    seen: set[Any] = set()
    while level := [node for node in dict.fromkeys(level) if node is not None and node not in seen]:
        yield level
        seen.update(level)
        level = [after for node in level for after, _ in node.next_functions]


def functional_gradient(loss: Loss, params: Params) -> Params:
    """Gradients by `torch.func.grad`, which also works inside `vmap`; under `torch.no_grad` they carry no graph."""
    grads: Params = torch.func.grad(loss)(params)
    return grads


def of_all_tasks(gradient: Gradient) -> Gradient:
    """A gradient of all tasks at once as one to be called inside `vmap` over them.

    What is compiled cannot run inside `vmap`, and need not: a rule is vectorised, and where it asks for a gradient all
    tasks' parameters leave `vmap` together.

    **Arguments:**

    - `gradient`: takes and returns tensors with a leading dimension of tasks.
    """

    def inside(params: Params) -> Params:
        grads = _Outside.apply(gradient, tuple(params), *params.values())  # type: ignore[no-untyped-call]
        return dict(zip(params, grads, strict=True))

    return inside


class _Outside(torch.autograd.Function):
    """Calls a function with the tensors that `vmap` has wrapped; never differentiated itself."""

    @staticmethod
    def forward(gradient: Gradient, names: tuple[str, ...], *values: Tensor) -> Any:
        raise FewShotError("a rule asked for the gradient at parameters that do not depend on the task's own")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise FewShotError("a rule differentiates a gradient itself, which vmap cannot do; use engine='loop'")

    @staticmethod
    def vmap(info: Any, in_dims: Any, gradient: Gradient, names: tuple[str, ...], *values: Tensor) -> Any:
        moved = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(values, in_dims[2:], strict=True)
        )
        grads = gradient(dict(zip(names, moved, strict=True)))
        return tuple(grads[name] for name in names), (0,) * len(names)
