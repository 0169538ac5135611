"""A step of which the graph is not kept: the backward pass runs it again, on the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from fewshot_asam.engine.gradients import variables
from fewshot_asam.errors import FewShotError


class Recomputed:
    """The same function of nested tensors, whose inputs alone are kept for its gradient; differentiable once.

    Where the function draws random numbers, its generators' states are kept too: dropout drops the same units again.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.random = False

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        if not torch.is_grad_enabled():
            return self.function(*arguments)
        leaves, structure = pytree.tree_flatten(arguments)
        made: list[Any] = []
        found = _Recomputed.apply(self, structure, made, *leaves)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(list(found), made[0])


class Randomness:
    """The random generators' states at one moment, of the CPU and of the devices where tensors are."""

    def __init__(self, *tensors: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    def drawn_since(self, *tensors: Tensor) -> bool:
        """Whether numbers were drawn from one of them since."""
        now = Randomness(*tensors)
        pairs = zip((self.cpu, *self.states), (now.cpu, *now.states), strict=True)
        return any(not torch.equal(before, after) for before, after in pairs)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, the same numbers are drawn once more; afterwards the generators are as before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Recomputed, structure: Any, made: list[Any], *leaves: Any) -> Any:
        ctx.step, ctx.structure = step, structure
        ctx.autocast = _autocast(next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.numbers = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*tensors)
        randomness = None if _recording(step) else Randomness(*tensors)
        values, spec = pytree.tree_flatten(step.function(*pytree.tree_unflatten(list(leaves), structure)))
        drawn = randomness is not None and randomness.drawn_since(*tensors)
        step.random |= drawn
        ctx.again = randomness.again if randomness is not None and drawn else nullcontext
        made.append(spec)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        saved = iter(ctx.saved_tensors)
        leaves = [
            next(saved).detach().requires_grad_(need) if number is None else number
            for number, need in zip(ctx.numbers, needed, strict=True)
        ]
        with torch.enable_grad(), ctx.again(), ctx.autocast():
            values = pytree.tree_leaves(ctx.step.function(*pytree.tree_unflatten(leaves, ctx.structure)))
        pairs = [(value, grad) for value, grad in zip(values, grads, strict=True) if value.requires_grad]
        if not pairs:
            return (None,) * len(ctx.needs_input_grad)
        _require_own([value for value, _ in pairs], leaves)
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        outputs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)


def _require_own(values: list[Tensor], leaves: list[Any]) -> None:
    """Raises `FewShotError` where a gradient would be lost, being of a parameter that is no input of the step."""
    own = {id(leaf) for leaf in leaves}
    for held in variables(values):
        if id(held) not in own:
            raise FewShotError(
                f"the inner steps use a parameter of shape {list(held.shape)} that is neither the model's nor an inner "
                "rate, such as one of the loss or of the rule, whose gradient recompute would lose; use "
                "recompute=False"
            )


def _autocast(kind: str) -> Callable[[], torch.autocast]:
    """Autocast as it is now, for a backward pass that runs outside it."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype, enabled, torch.is_autocast_cache_enabled())


def _recording(step: Recomputed) -> bool:
    """Whether a CUDA graph is being recorded, which reads no generator's state; raises where `step` needs that."""
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if recording and step.random:
        raise FewShotError(
            "the model draws random numbers (dropout), which a recorded CUDA graph cannot draw twice for recompute; "
            "use cuda_graph false or recompute false"
        )
    return recording
