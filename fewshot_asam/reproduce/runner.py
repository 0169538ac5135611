"""The queue: trains and tests the cells that the ledger lacks, one after another, and can be stopped anywhere.

A cell has a run folder of its own and goes on from its checkpoint. A test that is done is kept there too, so that
nothing is computed twice however often the queue is stopped.
"""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from signal import SIGALRM, Signals
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

from fewshot_asam.errors import FewShotError
from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.estimate import Estimate, estimate
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.plan import NOT_IN_PLANS, TEST_SETTINGS, Adaptation, Cell, Test, adaptation_command, command
from fewshot_asam.reproduce.registration import Stamp, commit_of
from fewshot_asam.runtime.signals import Stop, Stopped, deadline
from fewshot_asam.training import run_folder
from fewshot_asam.training.build import load_data, resolve_device, test_images
from fewshot_asam.training.checkpoint import read_weights
from fewshot_asam.training.config import TrainConfig, plain, with_rule
from fewshot_asam.training.evaluation import interval
from fewshot_asam.training.identity import from_json, identify, images_digest
from fewshot_asam.training.loop import train
from fewshot_asam.training.metrics import read_metrics
from fewshot_asam.training.processes import sharing
from fewshot_asam.training.state import Diverged
from fewshot_asam.training.trained import evaluated, processes_of_tests, trained_learner
from fewshot_asam.version import __version__

SHORT_TEST = 600
"""Tasks that papers test on; the first ones of a longer test."""
USUAL = Adaptation._field_defaults
DIGITS = 16
"""Hexadecimal digits of a fingerprint in a record."""


class Place(NamedTuple):
    """Where cells are run: the folders of the data, of the results and of the runs, and the device.

    - `test_data_root`: of the datasets that runs are tested on besides their own, if not `data_root`.
    - `init_from`: the weights that forks begin from.
    """

    data_root: Path | None
    results: Path
    runs: Path
    device: Literal["auto", "cpu", "cuda"] = "auto"
    test_data_root: Path | None = None
    init_from: Path | None = None

    @property
    def ledger(self) -> Path:
        """The file that results are written to."""
        return self.results / ledger.FILE


def run_queue(cells: Sequence[Cell], place: Place, minutes: float | None = None) -> None:
    """Runs the cells that are not in the ledger yet, for so many minutes at most.

    A cell that another process is at is left to it. A signal ends the queue as it ends a run of `train_maml`, with
    everything saved, and raises `Stopped`; the end of the minutes does the same and returns.
    """
    commit()  # now, as the package's files may change while the queue runs
    for file in {file for cell in cells for file, _ in cell.registered}:
        commit_of(file)
    if place.init_from is None and any(cell.config.init_digest for cell in cells):
        raise FewShotError("the plan's runs begin from the weights of another run; name it: --init-from RUN")
    try:
        with Stop() as stop, deadline(minutes):
            for number, cell in enumerate(cells, 1):
                stop.check()
                _run_unless_done(cell, f"cell {number} of {len(cells)}, {cell.name}", place, minutes, stop)
    except Stopped as stopped:
        if stopped.number != SIGALRM:
            name = Signals(stopped.number).name
            raise Stopped(stopped.number, f"stopped by {name}; {_progress(cells, place)}") from stopped
    print(_progress(cells, place), flush=True)


def _progress(cells: Sequence[Cell], place: Place) -> str:
    records = ledger.read_cells(place.ledger)
    done = sum(ledger.is_done(cell, records) for cell in cells)
    return f"{done} of {len(cells)} cells are done" + ("; the same command goes on" if done < len(cells) else "")


def _run_unless_done(cell: Cell, name: str, place: Place, minutes: float | None, stop: Stop) -> None:
    """Runs a cell unless it is done or another process is at it, and says first how long it will take."""
    if ledger.is_done(cell, ledger.read_cells(place.ledger)):
        return
    with _claimed(place.runs / f"{cell.name}.lock") as free:
        records = ledger.read_cells(place.ledger)
        if not free:
            print(f"{name}: another process is at it", flush=True)
        elif not ledger.is_done(cell, records):
            config = _placed(cell, place)
            expected = estimate(cell, config, records)
            print(f"{name}: {expected}{_pieces(expected, minutes)}", flush=True)
            stop.check()
            ledger.append(place.ledger, run(cell, config, stop))


def _pieces(expected: Estimate, minutes: float | None) -> str:
    """How many pieces of so many minutes a cell will take, where one is not enough."""
    pieces = math.ceil((expected.training + (expected.tests or 0.0)) / (60 * minutes)) if minutes else 1
    return f": {pieces} pieces of {minutes:g} minutes" if minutes and pieces > 1 else ""


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock, which the system releases when it ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _placed(cell: Cell, place: Place) -> TrainConfig:
    """A cell's settings with its run folder, the data and the device."""
    config = replace(cell.config, data_root=place.data_root, test_data_root=place.test_data_root, device=place.device)
    start = place.init_from if config.init_digest else None
    return replace(config, init_from=start, output_dir=place.runs / cell.name)


def run(cell: Cell, config: TrainConfig, stop: Stop) -> Record:
    """Trains and tests a cell, or what is left of that, by its settings in a place; its record for the ledger."""
    assert config.output_dir is not None
    folder = config.output_dir
    try:
        if not (folder / "summary.json").exists():
            train(config, resume=(folder / "config.yaml").exists(), stop=stop)
    except Diverged as error:
        return _heading(cell) | {"diverged": str(error), "tests": []}
    tests = _tests(cell, config, folder, stop)
    return _heading(cell) | _training(folder) | {"tests": tests}


def _heading(cell: Cell) -> Record:
    """What is known of a cell before it is run, and by what it is."""
    settings = {name: value for name, value in plain(cell.config).items() if name not in NOT_IN_PLANS}
    versions = {"package": __version__, "torch": torch.__version__, "python": platform.python_version()}
    head: Record = {"cell": cell.name, "command": command(cell.config), "commit": commit(), "versions": versions}
    stamps = [Stamp(file.stem, said, commit_of(file))._asdict() for file, said in cell.registered]
    return head | ({"registered": stamps} if stamps else {}) | {"seed": cell.config.seed, "settings": settings}


def _training(folder: Path) -> Record:
    """What the ledger keeps of a finished training: its summary, and the courses of validation and congruence."""
    summary, rows = run_folder.read_summary(folder), read_metrics(folder)
    names = ["device", "engine", "processes", "iterations", "best_iteration", "val_accuracy", "wall_seconds"]
    names += [name for name in summary if name.startswith(("test_", "last_test_"))]
    found: Record = {name: summary[name] for name in names}
    seconds = {row["iteration"]: row["seconds"] for row in rows if "seconds" in row}
    validations = [row for row in rows if "val_accuracy" in row]
    course: Record = {
        "iteration": [row["iteration"] for row in validations],
        "seconds": [round(seconds[row["iteration"]], 1) for row in validations],
        "accuracy": [round(row["val_accuracy"], 5) for row in validations],
    }
    for name in ("congruence_before", "congruence_after"):
        if all(name in row for row in validations):
            course[name] = [round(row[name], 5) for row in validations]
    return found | {"data": _data(folder), "threads": torch.get_num_threads(), "validation": course}


def _data(folder: Path) -> Record:
    """The fingerprint of the data that a run was made with: the first digits of what its weights are bound to."""
    file = folder / "best.safetensors"
    identity = from_json(read_weights(file)[1], str(file))
    return {"classes": identity.classes[:DIGITS], "images": identity.images[:DIGITS]}


def _tests(cell: Cell, config: TrainConfig, folder: Path, stop: Stop) -> list[Record]:
    """The records of a cell's tests, of which those that the folder has already are not repeated."""
    file = folder / "tests.jsonl"
    found: Record = {"tests": ledger.read_tests(file)}
    missing = [test for test in cell.tests if ledger.find(found, test) is None]
    dataset = load_data(config, resolve_device(config.device)) if missing else None
    for test in missing:
        stop.check()
        assert dataset is not None
        ledger.append(file, _tested(test, config, folder, dataset, stop.check))
    found = {"tests": ledger.read_tests(file)}
    return [record for test in cell.tests if (record := ledger.find(found, test)) is not None]


def _tested(test: Test, config: TrainConfig, folder: Path, dataset: Any, between: Callable[[], object]) -> Record:
    started = time.monotonic()
    adaptation = test.adaptation._asdict()
    adapting = with_rule(config, test.adaptation.inner)
    adapting = replace(adapting, **{name: adaptation[name] for name in TEST_SETTINGS})
    learner = trained_learner(folder, adapting, dataset, identify(config, dataset), test.adaptation.weights)
    images = test_images(adapting, dataset)
    with sharing(learner, processes_of_tests(learner, adapting, images, test.tasks, test.tasks)):
        found = evaluated(learner, adapting, images, test.tasks, between=between)
    said = {name: value for name, value in adaptation.items() if name == "weights" or value != USUAL.get(name)}
    record: Record = {"command": adaptation_command({**said, "tasks": test.tasks})}
    if adapting.test_dataset:
        record["test_images"] = images_digest(images)[:DIGITS]
    record |= said | {"rule": adapting.rule_text, "norm": config.norm, "queries": config.queries}
    for tasks in sorted({min(SHORT_TEST, test.tasks), test.tasks}):
        mean, half_width = interval(found[:tasks])
        record[f"of_{tasks}"] = {"mean": round(mean, 6), "ci95": round(half_width, 6)}
    queries = config.ways * config.queries
    record |= {"tasks": test.tasks, "query_images": queries, "right": ledger.pack(found, queries)}
    return record | {"seconds": round(time.monotonic() - started, 1)}


@cache
def commit() -> str:
    """The last commit that changed this package, and whether it was changed since; `unknown` outside a repository.

    As it was when this was first asked.
    """
    own = Path(__file__).parents[1]
    try:
        last, changes = (
            subprocess.run(["git", "-C", str(own), *words, "--", "."], capture_output=True, text=True, check=True)
            for words in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (last.stdout.strip() or "unknown") + (" with changes" if changes.stdout.strip() else "")
