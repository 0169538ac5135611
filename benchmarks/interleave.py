"""Timing of contestants one after the other, round by round, so that a machine that slows down slows all of them.

Two forms:

- `own processes`, as their users run them: each contestant has a process of its own, alive throughout, with the
  allocator that its users have (ours calls `keep_freed_memory` first, as `train_maml` does; the others do not).
- `one process`, the algorithm alone: all share a process, its allocator (which keeps freed memory, for all of them),
  its thread pool and its libraries.

The threads of an idle process do no harm: after a parallel region OpenMP's threads spin before they sleep, 1 to 5 ms
with GNU's library under its default policy, and the harness rests `REST` seconds before each run.
`OMP_WAIT_POLICY=PASSIVE` would end the spinning at once, but slows what is timed: an addition of 65,536 numbers on two
threads from 8 to 21 microseconds. So the policy is left as users have it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.baselines import Contestant
from benchmarks.presets import Preset

REST = 0.02
"""Seconds, longer than a thread of OpenMP spins."""
FORMS = ("own processes", "one process")
LARGEST_DIFFERENCE = 0.01
"""Of the losses of contestants with one rule, in float32 after several steps, relative; more means other numbers."""


class WorkerError(RuntimeError):
    """A contestant failed in its process."""


class Process:
    """A worker process; use as a context manager, which ends it.

    **Arguments:**

    - `environment`: variables beside those of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            text=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self, **order: Any) -> dict[str, Any]:
        """The answer to an order; raises `WorkerError` where the worker failed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"a worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def timed(self, index: int) -> dict[str, Any]:
        """A run of a contestant, after a rest."""
        time.sleep(REST)
        return self(do="run", index=index)


@dataclass
class Times:
    """One contestant's runs: the first, with all that is compiled or chosen once, and each of the others.

    `peak_bytes` is its process's largest memory above that before the first call; None in a shared process.
    """

    first_call_s: float
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def summary(self) -> dict[str, Any]:
        """As plain data, with median and spread."""
        spread = {"median_s": median(self.seconds), "min_s": min(self.seconds), "max_s": max(self.seconds)}
        return {**spread, **asdict(self)}


def measure(
    contestants: Mapping[str, Contestant],
    preset: Preset,
    *,
    form: str,
    device: str = "cpu",
    rounds: int = 10,
    warmups: int = 2,
    warm_up: bool = False,
) -> dict[str, Times]:
    """Times one meta-gradient of each contestant in every round, after one first call and `warmups` more.

    **Arguments:**

    - `warm_up`: initialise the libraries on the smoke preset before the first call, so that the peak memory has
        nothing of that; the time of the first call has none of it either.

    Raises `WorkerError` where a contestant fails, or its loss is not that of the others with its rule.
    """
    own = form == "own processes"
    with ExitStack() as stack:
        processes = [stack.enter_context(Process()) for _ in range(len(contestants) if own else 1)]
        places = {name: (processes[i], 0) if own else (processes[0], i) for i, name in enumerate(contestants)}
        for name, (process, _) in places.items():
            arguments = {"contestant": asdict(contestants[name]), "preset": asdict(preset)}
            process(
                do="build",
                factory="benchmarks.baselines:from_order",
                arguments={**arguments, "device": device, "warm_up": warm_up},
                device=device,
                keep_freed_memory=contestants[name].keeps_memory or not own,
            )
        times = _rounds(places, rounds, warmups)
        if own:
            for name, (process, _) in places.items():
                times[name].peak_bytes = process(do="memory")["peak_bytes"]
    _check_losses(contestants, times)
    return times


def _rounds(places: Mapping[str, tuple[Process, int]], rounds: int, warmups: int) -> dict[str, Times]:
    times = {name: Times(process.timed(index)["seconds"]) for name, (process, index) in places.items()}
    for turn in range(warmups + rounds):
        for name, (process, index) in places.items():
            answer = process.timed(index)
            if turn >= warmups:
                times[name].seconds.append(answer["seconds"])
                times[name].losses.append(answer["loss"])
    return times


def _check_losses(contestants: Mapping[str, Contestant], times: Mapping[str, Times]) -> None:
    first: dict[str, str] = {}
    for name, contestant in contestants.items():
        other = first.setdefault(contestant.rule, name)
        mine, theirs = times[name].losses[-1], times[other].losses[-1]
        if not abs(mine - theirs) <= LARGEST_DIFFERENCE * abs(theirs):
            raise WorkerError(f"{name} has the loss {mine}, {other} {theirs}; they do not compute the same")


def ratio(times: Mapping[str, Times], of: str, to: str) -> dict[str, Any]:
    """How many times as long as `to` `of` takes: of the medians, and median and quartiles of the rounds' own ratios."""
    rounds = [a / b for a, b in zip(times[of].seconds, times[to].seconds, strict=True)]
    lower, middle, upper = _quartiles(rounds)
    of_medians = median(times[of].seconds) / median(times[to].seconds)
    return {"of": of, "to": to, "of_medians": of_medians, "median": middle, "quartiles": [lower, upper]}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return lower, middle, upper
