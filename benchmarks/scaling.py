"""What more cores gain: meta-iterations of one process of one thread against those of several, one thread each.

*Forks* share the tasks as `train_maml` does by itself, *processes* as a job of torchrun's, which may span machines. All
compute the same meta-batch, reduction and Adam step included; the benchmark fails where their losses differ. The
jobs take turns run by run and a job that waits sleeps. A run of several processes takes as long as its slowest one.

- *Efficiency* is the time of one process over that of `n`, divided by `n`: 1 where nothing is lost.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks import table
from benchmarks.interleave import Process, Times, WorkerError
from benchmarks.presets import PRESETS, Preset, episodes

_job = ExitStack()
"""What a worker is part of until it ends."""
WARM_UPS = 2
LARGEST_DIFFERENCE = 1e-5
"""Of the losses before the first step, relative. Later ones differ more, as Adam's first steps blow up rounding."""


class Job:
    """Processes that run iterations together; use as a context manager, which ends them."""

    def __init__(self, count: int, rule: str, preset: Preset, device: str, forks: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.stack, self.processes = ExitStack(), []
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            self.processes.append(self.stack.enter_context(Process(place)))
        arguments = {"rule": rule, "preset": asdict(preset), "device": device, "forks": forks}
        order = {"do": "build", "factory": "benchmarks.scaling:iteration", "arguments": arguments}
        self.together(lambda one: one(**order, device=device, keep_freed_memory=True))
        self.first = self.run()
        self.times = Times(self.first["seconds"])

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def together(self, order: Callable[[Process], dict[str, Any]]) -> list[dict[str, Any]]:
        """Gives all processes an order at once; their answers."""
        with ThreadPoolExecutor(len(self.processes)) as pool:
            return list(pool.map(order, self.processes))

    def run(self) -> dict[str, Any]:
        """One iteration: the seconds of the slowest process, and the loss."""
        answers = self.together(lambda one: one.timed(0))
        return {"seconds": max(answer["seconds"] for answer in answers), "loss": answers[0]["loss"]}


def iteration(rule: Any, preset: dict[str, Any], device: str, forks: int = 1) -> Callable[[], dict[str, float]]:
    """What a worker runs: one meta-iteration, this process's share of it."""
    from benchmarks import baselines, learn2learn_reference
    from fewshot_asam.learners import MetaLearner
    from fewshot_asam.models import build_model
    from fewshot_asam.rules import rule_class
    from fewshot_asam.runtime import distributed
    from fewshot_asam.training import meta_step
    from fewshot_asam.training.build import resolve_device
    from fewshot_asam.training.config import TrainConfig

    problem = Preset(**preset)
    _job.enter_context(distributed.joined())
    place = resolve_device(device)
    model = build_model("conv4", problem.ways, problem.image_shape, problem.hidden, seed=0).to(place)
    learner = MetaLearner(model, learn2learn_reference.LR, rule_class(rule)())
    config = TrainConfig(inner_steps=problem.steps, meta_lr=1e-4)
    iterate = meta_step.iteration(learner, meta_step.optimizer(learner, config), config)
    batch = episodes(problem, place)
    baselines.share_for_good(learner, forks)

    def run() -> dict[str, float]:
        return {"loss": iterate(learner.batch(batch))[0].item()}

    return run


def measure(rule: str, preset: Preset, most: int, rounds: int, device: str) -> dict[str, Times]:
    """Times iterations of one process, of `most` forks and of a job of `most`, turn by turn.

    Raises `WorkerError` where losses differ.
    """
    with ExitStack() as stack:
        shapes = {_name(1): (1, 1), _forks(most): (1, most), _name(most): (most, 1)}
        if device != "cpu":
            del shapes[_forks(most)]
        jobs = {
            name: stack.enter_context(Job(count, rule, preset, device, forks))
            for name, (count, forks) in shapes.items()
        }
        losses = [job.first["loss"] for job in jobs.values()]
        if max(losses) - min(losses) > LARGEST_DIFFERENCE * min(losses):
            raise WorkerError(f"the losses are {losses}; the jobs do not compute the same")
        for turn in range(WARM_UPS + rounds):
            for job in jobs.values():
                answer = job.run()
                if turn >= WARM_UPS:
                    job.times.seconds.append(answer["seconds"])
                    job.times.losses.append(answer["loss"])
        return {name: job.times for name, job in jobs.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    parser = table.parser("scaling", __doc__, presets=("mini_5w1s", "omniglot_5w1s", "omniglot_5w1s_small"))
    parser.add_argument("--processes", type=table.count, default=2, help="of the larger job (%(default)s)")
    parser.add_argument("--rule", default="maml", help="lower-level rule (%(default)s)")
    options = parser.parse_args(argv)
    if options.device == "cpu" and options.processes > (os.cpu_count() or 1):
        print(f"{options.processes} processes share {os.cpu_count()} cores", file=sys.stderr)
    report, most = table.Report(options.device), options.processes
    report.tables["efficiency"] = []
    for name in options.presets:
        print(f"{name}: {PRESETS[name].text}", file=sys.stderr)
        times = measure(options.rule, PRESETS[name], most, options.rounds, options.device)
        pairs = [(_name(1), many) for many in times if many != _name(1)]
        for found in report.add(name, "one thread each", times, pairs)["ratios"]:
            row = {"preset": name, "rule": options.rule, "of": found["to"]}
            row |= {"speed-up": found["median"], "efficiency": found["median"] / most}
            report.tables["efficiency"].append(row)
    report.data["efficiency"] = report.tables["efficiency"]
    return report.finish(options.output)


def _forks(count: int) -> str:
    return f"{count} forks"


def _name(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


if __name__ == "__main__":
    table.command("scaling", main)
