"""How the tasks of a batch are run: one by one or vectorised, eager or compiled. The numbers are the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewshot_asam.engine import inner_loop as of_one_task
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.gradients import autograd_gradient, functional_gradient, of_all_tasks
from fewshot_asam.engine.inner_loop import Batch, DataGradient, InnerLoop, State, SupportLoss
from fewshot_asam.engine.recompute import Recomputed
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules import Rates
from fewshot_asam.rules.perturbations import Params


@dataclass(frozen=True)
class ExecutionMode:
    """One way to run a batch of tasks.

    **Arguments:**

    - `batching`: `loop` runs one task after another, `vmap` all of them together.
    - `torch_compile`: one gradient of the inner loss and one query loss are compiled by `torch.compile`, and chained.
    - `recompute`: the backward pass runs each inner step anew instead of keeping its graph: a little more time, and
      memory that does not grow with the number of steps.
    """

    batching: Literal["loop", "vmap"]
    torch_compile: bool = False
    recompute: bool = False


class Parts(NamedTuple):
    """An inner step and the query loss, of one task or of all."""

    step: Callable[[State, Params, Rates, tuple[Tensor, ...]], State]
    query: Callable[[Params, Params, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def run(inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode) -> Iterator[tuple[Tensor, Tensor]]:
    """Query losses and logits: of one task after another, or once, with a leading dimension, of all."""
    params, shared = of_one_task.initial_parameters(inner_loop), of_one_task.shared_parameters(inner_loop)
    parts = _parts(inner_loop, mode if torch.is_grad_enabled() else ExecutionMode(mode.batching))

    def chain(batch: Batch, tasks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        state = _copies((params, inner_loop.rule.init(params)), tasks)
        return _chain(parts, state, shared, [of_one_task.rates(inner_loop, step) for step in range(steps)], batch)

    if mode.batching == "vmap":
        yield chain(batch, (batch.num_tasks,))
    else:
        for index in range(batch.num_tasks):
            yield chain(batch.task(index), ())


def _copies(state: State, tasks: tuple[int, ...]) -> State:
    """The meta-parameters with a leading dimension of tasks, as non-leaf tensors like those of the later steps."""

    def copied(value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise FewShotError(f"the rule remembers {value!r}, a {type(value).__name__}; expected tensors alone")
        return value.expand((*tasks, *value.shape)).contiguous()

    return pytree.tree_map(copied, state)  # type: ignore[no-any-return]


def _chain(parts: Parts, state: State, shared: Params, rates: list[Rates], batch: Batch) -> tuple[Tensor, Tensor]:
    """The query loss after the last step or, with weights of the steps, the weighted sum of those after each."""
    losses = []
    for lr in rates:
        state = parts.step(state, shared, lr, batch.support)
        if batch.step_weights:
            losses.append(parts.query(state[0], shared, batch.query))
    if not losses:
        return parts.query(state[0], shared, batch.query)
    weighted = [weight * loss for weight, (loss, _) in zip(batch.step_weights[0], losses, strict=True)]
    return torch.stack(weighted).sum(0), losses[-1][1]


def _parts(inner_loop: InnerLoop, mode: ExecutionMode) -> Parts:
    """Made once, since what is compiled belongs to the object that `torch.compile` returned."""
    if mode not in inner_loop.prepared:
        inner_loop.prepared[mode] = _made(inner_loop, mode)
    return inner_loop.prepared[mode]  # type: ignore[no-any-return]


def _made(inner_loop: InnerLoop, mode: ExecutionMode) -> Parts:
    query: Callable[..., Any] = partial(of_one_task.query, inner_loop)
    if mode.batching == "vmap":
        query = torch.func.vmap(query, in_dims=(0, None, 0), randomness="different")
    if mode.torch_compile:
        query = _Compiled(query, "query loss", inner_loop.model)
    step = partial(_step_of_all if mode.batching == "vmap" else _step, inner_loop, _gradient(inner_loop, mode))
    return Parts(Recomputed(step) if mode.recompute else step, query)


def _step(
    inner_loop: InnerLoop, gradient: DataGradient, state: State, shared: Params, lr: Rates, data: tuple[Tensor, ...]
) -> State:
    return of_one_task.step(inner_loop, state, of_one_task.gradients(inner_loop, gradient, shared, data), lr)


def _step_of_all(
    inner_loop: InnerLoop, gradient: DataGradient, state: State, shared: Params, lr: Rates, data: tuple[Tensor, ...]
) -> State:
    """The rule is vectorised; where it asks for a gradient, that of all tasks is taken outside `vmap`."""
    train, val = of_one_task.gradients(inner_loop, gradient, shared, data)
    inside = of_all_tasks(train)
    grads = inside, inside if val is train else of_all_tasks(val)

    def step(*own: Any) -> State:
        return of_one_task.step(inner_loop, own, grads, lr)

    return torch.func.vmap(step, randomness="different")(*state)


def _gradient(inner_loop: InnerLoop, mode: ExecutionMode) -> DataGradient:
    """The gradient of a `SupportLoss`, of one task or of all, and compiled if wanted.

    Every rule is made of this one function, so compiling it takes as long for each rule and number of steps.
    """

    def gradient(params: Params, shared: Params, x: Tensor, y: Tensor) -> Params:
        # not a SupportLoss: PyTorch 2.7 cannot compile code that makes a frozen dataclass
        return functional_gradient(lambda at: of_one_task.support_loss(inner_loop, shared, x, y, at), params)

    if mode.batching == "loop" and not mode.torch_compile:
        return lambda params, shared, x, y: autograd_gradient(SupportLoss(inner_loop, shared, x, y), params)
    function: DataGradient = gradient
    if mode.batching == "vmap":
        function = torch.func.vmap(gradient, in_dims=(0, None, 0, 0), randomness="different")
    return _Compiled(function, "inner gradient", inner_loop.model) if mode.torch_compile else function


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
