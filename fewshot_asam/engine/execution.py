"""How the tasks of a batch are run: one by one or vectorised, eager or compiled. The numbers are the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewshot_asam.engine import inner_loop as one_task
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.inner_loop import Batch, InnerLoop, State
from fewshot_asam.engine.recompute import Recomputed
from fewshot_asam.rules import inner_step
from fewshot_asam.rules.perturbations import Params


@dataclass(frozen=True)
class ExecutionMode:
    """One mode to run a batch of tasks.

    **Arguments:**

    - `batching`: `loop` runs one task after another, `vmap` all of them together.
    - `compiled`: one gradient of the inner loss and one query loss are compiled by `torch.compile`, and chained.
    - `recompute`: the backward pass runs each inner step anew instead of keeping its graph: a little more time, and
      memory that does not grow with the number of steps.
    """

    batching: Literal["loop", "vmap"]
    torch_compile: bool = False
    recompute: bool = False


class Parts(NamedTuple):
    """An inner step and the query loss, of one task or of all."""

    step: Callable[[State, Params, float | Tensor, tuple[Tensor, ...]], State]
    query: Callable[[State, Params, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def run(inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode) -> Iterator[tuple[Tensor, Tensor]]:
    """Query losses and logits: of one task after another, or once, with a leading dimension, of all."""
    state, shared = one_task.initial_state(inner_loop), one_task.shared_parameters(inner_loop)
    parts = _parts(inner_loop, mode if torch.is_grad_enabled() else ExecutionMode(mode.batching))
    if mode.batching == "vmap":
        yield _chain(parts, _copies(state, (batch.num_tasks,)), shared, inner_loop.lr, batch, steps)
    else:
        for index in range(batch.num_tasks):
            yield _chain(parts, _copies(state, ()), shared, inner_loop.lr, batch.task(index), steps)


def _copies(state: State, tasks: tuple[int, ...]) -> State:
    """The meta-parameters with a leading dimension of tasks, as non-leaf tensors like those of the later steps."""
    params, memory = (
        {name: value.expand((*tasks, *value.shape)).contiguous() for name, value in part.items()} for part in state
    )
    return params, memory


def _chain(
    parts: Parts, state: State, shared: Params, lr: float | Tensor, batch: Batch, steps: int
) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        state = parts.step(state, shared, lr, batch.inner)
    return parts.query(state, shared, batch.query)


def _parts(inner_loop: InnerLoop, mode: ExecutionMode) -> Parts:
    """Made once, since what is compiled belongs to the object that `torch.compile` returned."""
    if mode not in inner_loop.prepared:
        inner_loop.prepared[mode] = _made(inner_loop, mode)
    return inner_loop.prepared[mode]  # type: ignore[no-any-return]


def _made(inner_loop: InnerLoop, mode: ExecutionMode) -> Parts:
    query: Callable[..., Any] = partial(one_task.query, inner_loop)
    vectorise: Any = partial(torch.func.vmap, randomness="different") if mode.batching == "vmap" else _unchanged
    if mode.batching == "vmap":
        query = vectorise(query, in_dims=(0, None, 0))
    gradient: inner_step.Gradient = inner_step.autograd_gradient
    if mode.batching == "vmap" or mode.torch_compile:
        gradient = _support_gradient(inner_loop, mode)
    if mode.torch_compile:
        query = _Compiled(query, "query loss", inner_loop.model)
    step = partial(one_task.step, inner_loop, gradient, vectorise)
    return Parts(Recomputed(step) if mode.recompute else step, query)


def _support_gradient(inner_loop: InnerLoop, mode: ExecutionMode) -> inner_step.Gradient:
    """The gradient of a `SupportLoss` by `torch.func.grad`, of one task or of all, and compiled if wanted.

    Every rule is made of this one function, so compiling it takes as long for each rule and number of steps.
    """

    def gradient(params: Params, shared: Params, x: Tensor, y: Tensor) -> Params:
        # not a SupportLoss: PyTorch 2.7 cannot compile code that makes a frozen dataclass
        return inner_step.functional_gradient(
            lambda at: one_task.support_loss(inner_loop.model, shared, x, y, at), params
        )

    function: Callable[..., Params] = gradient
    if mode.batching == "vmap":
        function = torch.func.vmap(gradient, in_dims=(0, None, 0, 0), randomness="different")
    if mode.torch_compile:
        function = _Compiled(function, "inner gradient", inner_loop.model)
    return lambda loss, params: function(params, loss.shared, loss.x, loss.y)  # type: ignore[attr-defined]


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class _Compiled:
    """A function compiled at its first call; where that cannot be done it says so and stays eager."""

    def __init__(self, function: Callable[..., Any], name: str, model: FunctionalModel) -> None:
        self.eager, self.name, self.model = function, name, model
        self.function: Callable[..., Any] = torch.compile(function, fullgraph=True)
        self.works = False

    def __call__(self, *arguments: Any) -> Any:
        if self.function is self.eager:
            return self.eager(*arguments)
        try:
            with self.model.alone(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
                result = self.function(*arguments)
            self.works = True
            return result
        except Exception as error:
            if self.works and not type(error).__module__.startswith("torch._dynamo"):
                raise
            result = self.eager(*arguments)
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            warnings.warn(f"the {self.name} runs eagerly, as it could not be compiled: {lines[0]}", stacklevel=2)
            self.function = self.eager
            return result
