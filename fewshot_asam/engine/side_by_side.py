"""The tasks of a batch side by side on the cores, in forks of this process with one thread each.

A core that computes one task gains nothing from the threads of others, and everything from having no other to wait
for. Each fork has a copy of the learner. It is sent the parameters, the buffers and its tasks, and returns losses,
logits and the gradient of each task; here they are added in the order of the tasks, so that the numbers are those of
one thread, bit for bit. What a fork cannot do is done here.
"""

from __future__ import annotations

import operator
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewshot_asam import engine
from fewshot_asam.engine.execution import ExecutionMode
from fewshot_asam.engine.functional import exclusive
from fewshot_asam.engine.gradients import variables
from fewshot_asam.engine.inner_loop import Batch, InnerLoop
from fewshot_asam.models import cpu_kernels
from fewshot_asam.runtime.forks import Fork, Place, SharedMemory, forks

LAST_MOMENT = 1.0
"""Seconds that a fork which answers no more has to end by itself, so that it is known how."""
Kind = Literal["gradients", "losses"]
Found = tuple[Tensor, Tensor]
"""Query losses `[T]` and logits `[T, n, N]`."""


class Request(NamedTuple):
    """What a fork is asked for. Its tasks are those of `batch` from `start` to `stop`, which lie in shared memory."""

    kind: Kind
    state: list[Place]
    training: list[bool]
    batch: tuple[list[Place], ...]
    start: int
    stop: int
    steps: int
    mode: ExecutionMode
    num_tasks: int
    gradients: list[list[Place]]
    """of each piece, by parameter"""


class SideBySide:
    """Processes that share the tasks of a learner's batches; use as a context manager, which ends the forks.

    **Arguments:**

    - `learner`: whose parameters are differentiated.
    - `inner_loop`: gives its settings.
    - `count`: processes, this one included, at least 2.

    Raises `OSError` where they cannot be made.
    """

    def __init__(self, learner: nn.Module, inner_loop: Callable[[], InnerLoop], count: int) -> None:
        self.learner, self.inner_loop, self.count = learner, inner_loop, count
        self.memory = SharedMemory()
        self._forks: list[Fork | None] = []
        self._examined: tuple[InnerLoop | None, bool] = (None, True)
        self._circumstances: list[Any] = []
        self._owner, self._turn = os.getpid(), threading.Lock()
        self._start()

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends the forks."""
        if os.getpid() == self._owner:
            for one in self._forks:
                if one is not None:
                    one.end()
        self._forks = []

    def takes(self, batch: Batch) -> bool:
        """Whether it is for these processes, and not for the one that called."""
        return (
            os.getpid() == self._owner
            and self.count > 1
            and batch.num_tasks > 1
            and all(map(_copies, (*chain(*batch), *self._state())))
            and not any(value.requires_grad for value in chain(*batch))
            and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters())
            and self._has_all(batch)
        )

    def _has_all(self, batch: Batch) -> bool:
        """Whether all that has gradients is of the learner, so that forks are sent it and send its gradients back."""
        inner_loop = self.inner_loop()
        if self._examined[0] is not inner_loop:
            other = _other(inner_loop, batch, {id(value) for value in self.learner.parameters()})
            self._examined = inner_loop, other is None
            if other is not None:
                warnings.warn(
                    f"the tasks are computed by this process alone: the loss, the rule or lr has a tensor of shape "
                    f"{list(other.shape)} that is no parameter of the learner",
                    stacklevel=7,
                )
        return self._examined[1]

    def run(self, kind: Kind, batch: Batch, steps: int, mode: ExecutionMode) -> Found | None:
        """What `engine.task_gradients` or `engine.task_losses` return; None where another thread has its turn."""
        if not self._turn.acquire(blocking=False):
            return None
        try:
            if not self._is_present():  # a fork inherits whatever has changed
                self.end()
                try:
                    self._start()
                except OSError as error:
                    warnings.warn(f"the tasks are computed by this process alone from here on: {error}", stacklevel=2)
                    self.count = 1
                    return None
            with one_thread():
                return self._shared(kind, batch, steps, mode)
        except BaseException:
            self.end()  # those still computing; the next call makes others
            self._circumstances = []
            raise
        finally:
            self._turn.release()

    def _start(self) -> None:
        self._circumstances = self._present()
        with one_thread():
            self._forks = list(forks(self.count - 1, self._serve))

    def _present(self) -> list[Any]:
        """All that changes what a fork would compute, but for what it is sent."""
        with exclusive:
            state = self._state()
        return [
            *(self.inner_loop(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
            *(torch.get_default_dtype(), cpu_kernels.available(), torch.are_deterministic_algorithms_enabled()),
            *state,
        ]

    def _is_present(self) -> bool:
        now = self._present()
        return len(now) == len(self._circumstances) and all(map(operator.is_, now, self._circumstances))

    def _shared(self, kind: Kind, batch: Batch, steps: int, mode: ExecutionMode) -> Found:
        total, shares = batch.num_tasks, min(self.count, batch.num_tasks)
        edges = [total * index // shares for index in range(shares + 1)]
        own, rest = batch.part(slice(0, edges[1])), batch.part(slice(edges[1], total))
        requests = self._requests(kind, rest, [edge - edges[1] for edge in edges[1:]], steps, mode, total)
        asked = [self._ask(index, request) for index, request in enumerate(requests)]
        found = [_compute(kind, self.inner_loop(), own, steps, mode, total)]
        for index, request in enumerate(requests):
            answer = self._answer(index) if asked[index] else None
            if answer is None:
                tasks = rest.part(slice(request.start, request.stop))
                found.append(_compute(kind, self.inner_loop(), tasks, steps, mode, total))
            else:
                found.append(self._taken(request, answer))
        losses, logits = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(logits)

    def _requests(
        self, kind: Kind, rest: Batch, edges: list[int], steps: int, mode: ExecutionMode, total: int
    ) -> list[Request]:
        memory = self.memory
        memory.clear()
        with exclusive:
            state = [memory.put(value) for value in self._state()]
        training = [layer.training for layer in self.learner.modules()]
        places = tuple([memory.put(value) for value in values] for values in rest)
        requests, parameters = [], self._parameters()
        for start, stop in pairwise(edges):
            pieces = len(_pieces(stop - start, mode)) if kind == "gradients" else 0
            gradients = [[memory.place(p.dtype, p.shape) for p in parameters] for _ in range(pieces)]
            requests.append(Request(kind, state, training, places, start, stop, steps, mode, total, gradients))
        return requests

    def _ask(self, index: int, request: Request) -> bool:
        one = self._forks[index]
        if one is None:
            return False
        try:
            one.ask((request, torch.randint(2**62, ()).item()))
        except OSError:
            self._lost(index)
            return False
        return True

    def _answer(self, index: int) -> Any:
        one = self._forks[index]
        try:
            return one.answer() if one is not None else None
        except (EOFError, OSError):
            self._lost(index)
            return None

    def _lost(self, index: int) -> None:
        one = self._forks[index]
        number, self._forks[index] = one.end(LAST_MOMENT) if one is not None else 0, None
        how = f" (killed by signal {number}; if nobody did that, the memory was full)" if number else ""
        left = 1 + sum(other is not None for other in self._forks)
        warnings.warn(
            f"one of the processes that share the tasks has ended{how}; its tasks are computed by the first one, and "
            f"{left} of {self.count} go on. Nothing is lost",
            stacklevel=2,
        )

    def _taken(self, request: Request, answer: tuple[Found, list[list[bool]]]) -> Found:
        """A fork's results, its gradients added one after another."""
        found, differentiated = answer
        parameters = self._parameters()
        for places, flags in zip(request.gradients, differentiated, strict=True):
            for parameter, place, has_gradient in zip(parameters, places, flags, strict=True):
                if has_gradient:
                    gradient = self.memory.at(place)
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        return found

    def _parameters(self) -> list[nn.Parameter]:
        return [value for value in self.learner.parameters() if value.requires_grad]

    def _state(self) -> list[Tensor]:
        return [*self.learner.parameters(), *self.learner.buffers()]

    def _serve(self, asked: tuple[Request, int] | None) -> Any:
        """In a fork: what it answers; None where it cannot."""
        if asked is None:
            with exclusive:
                return None
        request, seed = asked
        try:
            torch.manual_seed(seed)
            return self._served(request)
        except Exception:  # the first process meets it too, and says so
            return None

    def _served(self, request: Request) -> tuple[Found, list[list[bool]]]:
        with torch.no_grad():
            for value, place in zip(self._state(), request.state, strict=True):
                value.copy_(self.memory.at(place))
        for layer, training in zip(self.learner.modules(), request.training, strict=True):
            layer.training = training
        tasks = Batch(*(tuple(self.memory.at(place) for place in places) for places in request.batch))
        tasks = tasks.part(slice(request.start, request.stop))
        parameters, found, flags = self._parameters(), [], []
        pieces = _pieces(tasks.num_tasks, request.mode) if request.kind == "gradients" else [slice(0, tasks.num_tasks)]
        for index, piece in enumerate(pieces):
            self.learner.zero_grad()
            found.append(
                _compute(
                    request.kind, self.inner_loop(), tasks.part(piece), request.steps, request.mode, request.num_tasks
                )
            )
            if request.kind == "gradients":
                flags.append([value.grad is not None for value in parameters])
                for value, place in zip(parameters, request.gradients[index], strict=True):
                    if value.grad is not None:
                        self.memory.at(place).copy_(value.grad)
        losses, logits = zip(*found, strict=True)
        return (torch.cat(losses), torch.cat(logits)), flags


def _compute(kind: Kind, inner_loop: InnerLoop, tasks: Batch, steps: int, mode: ExecutionMode, num_tasks: int) -> Found:
    if kind == "gradients":
        with torch.enable_grad():
            return engine.task_gradients(inner_loop, tasks, steps, mode, num_tasks)
    with torch.no_grad():
        return engine.task_losses(inner_loop, tasks, steps, mode)


def _other(inner_loop: InnerLoop, batch: Batch, own: set[int]) -> Tensor | None:
    """A tensor with a gradient that a step of one task depends on, of none of these identities."""
    if isinstance(inner_loop.lr, Tensor) and id(inner_loop.lr) not in own:
        return inner_loop.lr
    from_own_head, task = replace(inner_loop, zeroed=(), prepared={}), Batch(*batch.part(slice(0, 1))[:2])
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        losses, _ = engine.task_losses(from_own_head, task, 1, ExecutionMode("loop"))
        return next((value for value in variables([losses]) if id(value) not in own), None)


def _copies(value: Tensor) -> bool:
    """Whether its numbers can be copied into shared memory."""
    return value.device.type == "cpu" and value.layout == torch.strided


def _pieces(tasks: int, mode: ExecutionMode) -> list[slice]:
    """What is computed, and its gradient added, as one."""
    return [slice(0, tasks)] if mode.batching == "vmap" else [slice(index, index + 1) for index in range(tasks)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, PyTorch uses one thread."""
    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)
