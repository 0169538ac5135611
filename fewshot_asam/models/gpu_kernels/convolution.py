"""3x3 convolutions of several tasks, each with weights of its own, as one autograd function and three ways to run it.

A convolution and its two gradients are the derivatives of one form, linear in images `x`, weights `w` and outputs `y`:
`sum(y * conv2d(x, w))`. Each of the three is found from the two others, and so is its gradient, to any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

from fewshot_asam.models.gpu_kernels.tasks import merged

Convolution = Literal["grouped", "channels_last", "unfold", "each", "fastest"]
"""How convolutions with weights of several tasks are run.

- `grouped`: as one grouped convolution, which is what PyTorch's `vmap` makes of them.
- `channels_last`: the same, channels-last in memory.
- `unfold`: as products of matrices, batched over tasks and images, with their 3x3 patches written out.
- `each`: as one ordinary convolution a task.
- `fastest`: each layer's, and each of its gradients', by the clock at its first use.
"""
Role = Literal["x", "w", "y"]
ROLES: tuple[Role, ...] = ("x", "w", "y")


class Problem(NamedTuple):
    """What is asked of one convolution: the missing one of `ROLES`, and how many `groups` of channels there are."""

    missing: Role
    groups: int

    @property
    def given(self) -> tuple[Role, ...]:
        """The two others, in order."""
        return tuple(role for role in ROLES if role != self.missing)


def convolve(x: Tensor, w: Tensor, how: Convolution) -> Tensor:
    """`conv2d(x, w, padding=1)`; under `vmap` over tasks their convolutions are run together, as `how` says."""
    return _Contraction.apply(Problem("y", 1), how, x, w)  # type: ignore[no-any-return]


class _Contraction(Function):
    """`(problem, how, first, second)` to the missing one of the form's three."""

    @staticmethod
    def forward(problem: Problem, how: Convolution, first: Tensor, second: Tensor) -> Tensor:
        return contraction(problem, how, first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.problem, ctx.how, *values = inputs
        ctx.save_for_backward(*values)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        problem: Problem = ctx.problem
        values = {**dict(zip(problem.given, ctx.saved_tensors, strict=True)), problem.missing: cotangent}
        found: list[Tensor | None] = []
        for role, wanted in zip(problem.given, ctx.needs_input_grad[2:], strict=True):
            asked = problem._replace(missing=role)
            given = (values[other] for other in asked.given)
            found.append(_Contraction.apply(asked, ctx.how, *given) if wanted else None)
        return None, None, *found

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, how: Convolution, *values: Tensor) -> Any:
        tasks, asked = info.batch_size, problem._replace(groups=problem.groups * info.batch_size)
        sides = (
            merged(value, dim, tasks, _channels(role))
            for value, dim, role in zip(values, in_dims[2:], problem.given, strict=True)
        )
        at = _channels(problem.missing)
        return _Contraction.apply(asked, how, *sides).unflatten(at, (tasks, -1)), at


def _channels(role: Role) -> int:
    """Where a tensor has its groups' channels: images `[n, G*C, H, W]`, weights `[G*D, C, 3, 3]`."""
    return 0 if role == "w" else 1


def contraction(problem: Problem, how: Convolution, first: Tensor, second: Tensor) -> Tensor:
    """The missing one of `x [n, G*C, H, W]`, `w [G*D, C, 3, 3]`, `y [n, G*D, H, W]`, from the two others in order."""
    if how == "fastest":
        how = fastest(problem, first, second)
    return WAYS[how](problem, first, second)


def _grouped(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    groups = problem.groups
    if problem.missing == "y":
        return F.conv2d(first, second, padding=1, groups=groups)
    if problem.missing == "w":
        x, y = first, second
        shape = (y.shape[1], x.shape[1] // groups, 3, 3)
        return conv2d_weight(x, shape, y, padding=1, groups=groups)  # type: ignore[no-any-return]
    w, y = first, second
    images = (len(y), w.shape[1] * groups, *y.shape[2:])
    return conv2d_input(images, w, y, padding=1, groups=groups)  # type: ignore[no-any-return]


def _grouped_channels_last(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    return _grouped(problem, *(value.contiguous(memory_format=torch.channels_last) for value in (first, second)))


def _one_by_one(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    alone = problem._replace(groups=1)
    pairs = zip(
        *(
            value.chunk(problem.groups, _channels(role))
            for value, role in zip((first, second), problem.given, strict=True)
        ),
        strict=True,
    )
    return torch.cat([_grouped(alone, *pair) for pair in pairs], _channels(problem.missing))


def _unfolded(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    values = dict(zip(problem.given, (first, second), strict=True))
    groups, shape = problem.groups, values.get("x", values.get("y", first)).shape
    matrices: dict[Role, Tensor] = {}  # x [n, G, 9*C, H*W], w [G, D, 9*C], y [n, G, D, H*W]
    if "x" in values:
        matrices["x"] = F.unfold(values["x"], 3, padding=1).unflatten(1, (groups, -1))
    if "w" in values:
        matrices["w"] = values["w"].reshape(groups, -1, 9 * values["w"].shape[1])
    if "y" in values:
        matrices["y"] = values["y"].reshape(len(values["y"]), groups, -1, shape[2] * shape[3])
    if problem.missing == "y":
        return (matrices["w"] @ matrices["x"]).flatten(1, 2).unflatten(2, shape[2:])  # type: ignore[no-any-return]
    if problem.missing == "w":
        products = (matrices["y"] @ matrices["x"].transpose(2, 3)).sum(0)  # [G, D, 9*C]
        return products.flatten(0, 1).unflatten(1, (-1, 3, 3))  # type: ignore[no-any-return]
    patches = matrices["w"].transpose(1, 2) @ matrices["y"]
    return F.fold(patches.flatten(1, 2), shape[2:], 3, padding=1)


WAYS: dict[str, Callable[[Problem, Tensor, Tensor], Tensor]] = {
    "grouped": _grouped,
    "channels_last": _grouped_channels_last,
    "unfold": _unfolded,
    "each": _one_by_one,
}
REPEATS = 3
_known: dict[Any, Convolution] = {}


def seconds(run: Callable[[], object]) -> float:
    """What one run takes on the GPU, on the mean of a few after a first one; a stand-in clock in tests."""
    run()
    _wait()
    started = time.perf_counter()
    for _ in range(REPEATS):
        run()
    _wait()
    return (time.perf_counter() - started) / REPEATS


def fastest(problem: Problem, first: Tensor, second: Tensor, clock: Callable[..., float] | None = None) -> Convolution:
    """The way that takes least time for tensors of such shapes, measured once; `grouped` while a graph is recorded."""
    key = (problem, first.shape, second.shape, first.dtype, first.device, torch.is_autocast_enabled("cuda"))
    if key not in _known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "grouped"
        taken = {way: _tried(clock or seconds, run, problem, first, second) for way, run in WAYS.items()}
        _known[key] = min(taken, key=taken.__getitem__)  # type: ignore[arg-type]
    return _known[key]


def choices() -> dict[str, Convolution]:
    """What `fastest` has found so far: the way of each problem and its shapes, in words."""
    return {
        f"{problem.missing} of {problem.groups} groups, {[*first]} and {[*second]}, {str(dtype)[6:]}": way
        for (problem, first, second, dtype, *_), way in _known.items()
    }


def _tried(clock: Callable[..., float], run: Callable[..., Tensor], *arguments: Any) -> float:
    try:
        with torch.no_grad():
            return clock(lambda: run(*arguments))
    except RuntimeError:  # too little memory for the patches
        return float("inf")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
