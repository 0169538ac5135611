"""How long a cell will take: as its own run has taken so far, as the same cell of another seed took, or measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from fewshot_asam.engine.precision import precision
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.plan import Cell, cell_name
from fewshot_asam.training.build import load_data, resolve_device
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import TASKS_AT_ONCE
from fewshot_asam.training.metrics import read_metrics
from fewshot_asam.training.state import build
from fewshot_asam.training.trained import evaluated

TRIED = 3
"""Iterations that are timed, after as many that are not: kernels and graphs are made in them."""


class Estimate(NamedTuple):
    """Seconds of training, its validations included, and of the tests, None where they are not known; and how so."""

    training: float
    tests: float | None
    source: str

    def __str__(self) -> str:
        tests = "tests besides" if self.tests is None else f"{_clock(self.tests)} of tests"
        return f"about {_clock(self.training)} of training and {tests} ({self.source})"


def estimate(cell: Cell, config: TrainConfig, records: Mapping[str, Record]) -> Estimate:
    """What is left of a cell, by its settings in the place where it is to run."""
    return _from_own_run(config) or _from_ledger(cell, config, records) or _measured(cell, config)


def _from_own_run(config: TrainConfig) -> Estimate | None:
    folder = config.output_dir or Path()
    rows = [row for row in read_metrics(folder) if "seconds" in row] if (folder / "config.yaml").exists() else []
    if not rows:
        return None
    done, spent = rows[-1]["iteration"], rows[-1]["seconds"]
    return Estimate(spent / done * (config.iterations - done), None, f"as its first {done:,} iterations")


def _from_ledger(cell: Cell, config: TrainConfig, records: Mapping[str, Record]) -> Estimate | None:
    """From another seed of the same cell on the same device."""
    device = resolve_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for record in records.values():
        same = cell_name(replace(cell.config, seed=record["seed"])) == record["cell"] and "diverged" not in record
        if same and record["device"] == name and (name != "cpu" or record["threads"] == torch.get_num_threads()):
            tests = [test["seconds"] / test["tasks"] for test in record["tests"] if "seconds" in test]
            pace = sum(tests) / len(tests) if tests else 0.0
            wanted = pace * sum(test.tasks for test in cell.tests)
            return Estimate(record["wall_seconds"], wanted, f"as seed {record['seed']} on this device")
    return None


def _measured(cell: Cell, config: TrainConfig) -> Estimate:
    """From a few iterations and test tasks of an untrained model, which is then thrown away."""
    device = resolve_device(config.device)
    dataset = load_data(config, device)
    state = build(config, dataset, device)
    with precision(config.precision, device):
        _seconds(state.train_step, device)
        iteration = _seconds(state.train_step, device)
    task = _seconds(lambda: evaluated(state.learner, config, dataset.test, TASKS_AT_ONCE), device) / TASKS_AT_ONCE
    validations = -(-config.iterations // config.validate_every)
    training = iteration * config.iterations + task * validations * config.validate_tasks
    source = f"measured: {iteration:.2g} s an iteration, {task:.2g} s a test task"
    return Estimate(training, task * (sum(test.tasks for test in cell.tests) + 2 * config.test_tasks), source)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call of `work`, the mean of several."""
    began = time.monotonic()
    for _ in range(TRIED):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.monotonic() - began) / TRIED


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
