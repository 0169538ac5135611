"""How many processes share the tasks on a CPU: by cores, tasks, memory and the length of the work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch

from fewshot_asam.engine.side_by_side import one_thread
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.cores import usable_cores
from fewshot_asam.runtime.forks import AVAILABLE
from fewshot_asam.runtime.memory import available_memory, growth
from fewshot_asam.training.checks import MOST_PROCESSES, Asked

WORTH = 3.0
"""Seconds of work on one core from which on it is shared: the trial and the forks cost about a tenth of one."""
AS_ASKED = "as asked"
SPARE = 1.25
"""Memory that must be there, of what the processes are expected to take."""


class Processes(NamedTuple):
    """How many share the tasks, and why."""

    number: int
    reason: str

    @property
    def text(self) -> str:
        """In one line."""
        if self.number == 1:
            threads = torch.get_num_threads()
            return f"1 process of {threads} thread{'s' if threads > 1 else ''}: {self.reason}"
        return f"{self.number} processes of 1 thread share the tasks: {self.reason}"


def choose(
    asked: Asked, device: torch.device, at_once: int, total: int, compiles: bool, task: Callable[[], object]
) -> Processes:
    """The number that was asked for, or the best one by all that is known before the work begins.

    **Arguments:**

    - `at_once`, `total`: tasks of a batch, and of all batches.
    - `compiles`: whether `torch.compile` is used, whose own threads and caches are for one process.
    - `task`: computes one of them, to be timed and its memory counted.

    Raises `FewShotError` where so many as were asked for cannot be.
    """
    if asked != "auto":
        _require(asked, device, at_once)
        return Processes(asked, AS_ASKED)
    if distributed.size() > 1:
        return Processes(1, "this is one process of a job")
    if hindrance := _hindrance(device, compiles):
        return Processes(1, hindrance)
    count, reason = usable_cores(torch.get_num_threads())
    if at_once < count:
        count, reason = at_once, f"{at_once} task{'s' if at_once > 1 else ''} in a batch"
    if count == 1:
        return Processes(1, reason)
    with one_thread():
        memory = growth(task)  # which also loads what is loaded once
        started = time.monotonic()
        task()
        seconds = (time.monotonic() - started) * total
    if seconds < WORTH:
        return Processes(1, f"all tasks take about {seconds:.1f} s")
    fitting = _fitting(memory)
    return Processes(count, reason) if count <= fitting else Processes(fitting, "more would not fit the memory")


def _require(asked: int, device: torch.device, at_once: int) -> None:
    if asked == 1:
        return
    start = f"processes is {asked}, but "
    if distributed.size() > 1:
        raise FewShotError(f"{start}this is one process of a job already; use 1 or auto")
    if device.type != "cpu":
        raise FewShotError(f"{start}the device is {device.type}; use 1 or auto, or --device cpu")
    if asked > at_once:
        raise FewShotError(f"{start}there are {at_once} tasks in a batch; use at most {at_once}")


def _hindrance(device: torch.device, compiles: bool) -> str:
    """Why this process may not be forked without being told to."""
    if device.type != "cpu":
        return "the tasks are on a GPU"
    if not AVAILABLE:
        return "processes share tasks on Linux alone"
    if compiles:
        return "torch.compile uses the cores of its own accord"
    others = [one for one in threading.enumerate() if one is not threading.current_thread()]
    if any(type(one).__name__ != "TMonitor" for one in others):  # tqdm's, which no fork needs
        return "this program has other threads, so it is not forked unless told to"
    return ""


def _fitting(memory: int) -> int:
    """Processes for which there is memory, of which this one has what it needs."""
    with suppress(OSError):
        return 1 + int(available_memory() / (SPARE * memory)) if memory else MOST_PROCESSES
    return MOST_PROCESSES


@contextmanager
def sharing(learner: MetaLearner, processes: Processes) -> Iterator[Processes]:
    """Within, so many processes share the learner's tasks; this one alone where the system does not allow more.

    Threads of this one would be in the others' way between the batches too.
    """
    with ExitStack() as forked:
        try:
            forked.enter_context(learner.side_by_side(processes.number))
            if processes.number > 1:
                forked.enter_context(one_thread())
        except FewShotError as error:
            if processes.reason == AS_ASKED:
                raise
            processes = Processes(1, str(error))
        yield processes
