"""How the tasks of a batch are run: one by one or vectorised, eager or compiled. The numbers are the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewshot_asam import inner
from fewshot_asam.engine import task
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.recompute import Recomputed
from fewshot_asam.engine.task import Batch, LowerLevel, State
from fewshot_asam.perturb import Params


@dataclass(frozen=True)
class Way:
    """One way to run a batch of tasks.

    **Arguments:**

    - `tasks`: `loop` runs one task after another, `vmap` all of them together.
    - `compiled`: one gradient of the inner loss and one query loss are compiled by `torch.compile`, and chained.
    - `recompute`: the backward pass runs each inner step anew instead of keeping its graph: a little more time, and
      memory that does not grow with the number of steps.
    """

    tasks: Literal["loop", "vmap"]
    compiled: bool = False
    recompute: bool = False


class Parts(NamedTuple):
    """An inner step and the query loss, of one task or of all."""

    step: Callable[[State, Params, float | Tensor, tuple[Tensor, ...]], State]
    query: Callable[[State, Params, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def run(lower: LowerLevel, batch: Batch, steps: int, way: Way) -> Iterator[tuple[Tensor, Tensor]]:
    """Query losses and logits: of one task after another, or once, with a leading dimension, of all."""
    state, shared = task.initial_state(lower), task.shared_parameters(lower)
    parts = _parts(lower, way if torch.is_grad_enabled() else Way(way.tasks))
    if way.tasks == "vmap":
        yield _chain(parts, _copies(state, (batch.tasks,)), shared, lower.lr, batch, steps)
    else:
        for index in range(batch.tasks):
            yield _chain(parts, _copies(state, ()), shared, lower.lr, batch.task(index), steps)


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


def _parts(lower: LowerLevel, way: Way) -> Parts:
    """Made once, since what is compiled belongs to the object that `torch.compile` returned."""
    if way not in lower.prepared:
        lower.prepared[way] = _made(lower, way)
    return lower.prepared[way]  # type: ignore[no-any-return]


def _made(lower: LowerLevel, way: Way) -> Parts:
    query: Callable[..., Any] = partial(task.query, lower)
    vectorise: Any = partial(torch.func.vmap, randomness="different") if way.tasks == "vmap" else _unchanged
    if way.tasks == "vmap":
        query = vectorise(query, in_dims=(0, None, 0))
    gradient: inner.Gradient = inner.autograd_gradient
    if way.tasks == "vmap" or way.compiled:
        gradient = _support_gradient(lower, way)
    if way.compiled:
        query = _Compiled(query, "query loss", lower.model)
    step = partial(task.step, lower, gradient, vectorise)
    return Parts(Recomputed(step) if way.recompute else step, query)


def _support_gradient(lower: LowerLevel, way: Way) -> inner.Gradient:
    """The gradient of a `SupportLoss` by `torch.func.grad`, of one task or of all, and compiled if wanted.

    Every rule is made of this one function, so compiling it takes as long for each rule and number of steps.
    """

    def gradient(params: Params, shared: Params, x: Tensor, y: Tensor) -> Params:
        # not a SupportLoss: PyTorch 2.7 cannot compile code that makes a frozen dataclass
        return inner.functional_gradient(lambda at: task.support_loss(lower.model, shared, x, y, at), params)

    function: Callable[..., Params] = gradient
    if way.tasks == "vmap":
        function = torch.func.vmap(gradient, in_dims=(0, None, 0, 0), randomness="different")
    if way.compiled:
        function = _Compiled(function, "inner gradient", lower.model)
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
