"""What more cores cannot share: processor time of the first process in a meta-iteration, its tasks and all else.

All else is drawing and copying the tasks, adding gradients and the step of Adam. *1*, *2* ... are the milliseconds that
so many cores would then take: the serial part and a whole number of tasks. That is a calculation: cores also share
memory and lower their clock together. Processor time is that of the process alone, so other load disturbs it little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import table
from benchmarks.baselines import share_for_good
from benchmarks.learn2learn_reference import LR
from benchmarks.presets import PRESETS, Preset
from fewshot_asam.data.images import ImageSet
from fewshot_asam.engine import side_by_side
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.runtime.allocator import keep_freed_memory
from fewshot_asam.training import meta_step
from fewshot_asam.training.config import TrainConfig

CORES = (1, 2, 4, 8, 16, 64)
CLASSES, PER_CLASS = 64, 40
"""Of the random images, that tasks are drawn from."""


def iteration(preset: Preset, processes: int) -> Callable[[], object]:
    """A whole meta-iteration, its tasks shared among so many processes that end with this one."""
    images = torch.randint(0, 256, (CLASSES * PER_CLASS, *preset.image_shape), dtype=torch.uint8)
    names = tuple(f"class{index:03d}" for index in range(CLASSES))
    drawn = ImageSet(images, torch.full((CLASSES,), PER_CLASS), names)
    sampler = EpisodeSampler(drawn, preset.ways, preset.shots, preset.queries, seed=0)
    model = build_model("conv4", preset.ways, preset.image_shape, preset.hidden, seed=0)
    learner, config = MetaLearner(model, LR, MAMLRule(), engine="loop"), TrainConfig(inner_steps=preset.steps)
    iterate = meta_step.iteration(learner, meta_step.optimizer(learner, config), config)
    share_for_good(learner, processes)
    return lambda: iterate(learner.batch(sampler.sample(preset.tasks), sampler.augmentation))


def measure(preset: Preset, rounds: int) -> tuple[float, float]:
    """Seconds of the serial part and of a task: the medians of `rounds` iterations."""
    processes = min(preset.tasks, 4)
    run, own = iteration(preset, processes), preset.tasks // processes
    inside: list[float] = []

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        found = compute(*arguments)
        inside.append(time.process_time() - started)
        return found

    compute = side_by_side._compute
    run()
    with patch.object(side_by_side, "_compute", timed):
        whole = [_seconds(run) for _ in range(rounds)]
    serial = [one - tasks for one, tasks in zip(whole, inside, strict=True)]
    return median(serial), median(inside) / own


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    options = table.parser("serial_part", __doc__).parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    report = table.Report("cpu")
    rows = report.tables["serial part, ms"] = []
    for name in options.presets:
        preset = PRESETS[name]
        serial, task = measure(preset, options.rounds)
        cores = {str(n): 1000 * (serial + math.ceil(preset.tasks / n) * task) for n in CORES}
        rows.append({"preset": name, "tasks": preset.tasks, "serial": 1000 * serial, "a task": 1000 * task, **cores})
    report.data["serial_part_ms"] = rows
    return report.finish(options.output)


if __name__ == "__main__":
    table.command("serial_part", main)
