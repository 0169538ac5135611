"""The ledger: one JSON line for each cell that was run, from which everything else is computed."""

from __future__ import annotations

import base64
import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewshot_asam.errors import FewShotError
from fewshot_asam.reproduce.plan import NOT_IN_NAMES, Adaptation, Cell, Test
from fewshot_asam.reproduce.schema import cell_problem, test_problem, unpacked
from fewshot_asam.training.config import plain

Record = dict[str, Any]
FILE = "ledger.jsonl"


def append(path: Path, record: Record) -> None:
    """One line more, on the disk when this returns; a line that a killed process left unfinished is ended first."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FewShotError(f"{path} cannot be written ({error}); what it held before is intact") from error


def read(path: Path, problem: Callable[[Record], str] = lambda record: "") -> list[Record]:
    """The lines of a ledger, in order; none without a file. Warns of a line that is none, and leaves it out.

    Raises `FewShotError` naming the first line of which `problem` says something.
    """
    records = []
    for number, line in enumerate(_lines(path), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            warnings.warn(f"{path} line {number} is broken and left out, as a killed process leaves one", stacklevel=2)
        elif found := problem(record):
            raise FewShotError(
                f"{path} line {number}: {found}; expected a line as reproduce_maml writes it: remove it, and it is run "
                "again"
            )
        else:
            records.append(record)
    return records


def _lines(path: Path) -> list[bytes]:
    try:
        if path.exists() and not path.is_file():
            raise FewShotError(f"{path} is no file; expected lines as reproduce_maml writes them")
        return path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise FewShotError(f"{path} cannot be read ({error})") from error


def read_cells(path: Path) -> dict[str, Record]:
    """The last record of each cell, by its name; raises `FewShotError` for a line that is no cell's."""
    return {record["cell"]: record for record in read(path, cell_problem)}


def read_tests(path: Path) -> list[Record]:
    """The records of a run folder's tests; raises `FewShotError` for a line that is no test's."""
    return read(path, test_problem)


def is_done(cell: Cell, records: Mapping[str, Record]) -> bool:
    """Whether a cell was run and tested in all ways that are wanted, or cannot be as its training diverged.

    Raises `FewShotError` where it was run with other settings, as a default may change that its name does not tell.
    """
    record = records.get(cell.name)
    if record is not None:
        _require_settings(cell, record["settings"])
    return record is not None and ("diverged" in record or all(find(record, test) is not None for test in cell.tests))


def _require_settings(cell: Cell, settings: Mapping[str, object]) -> None:
    for name, value in plain(cell.config).items():
        if name not in NOT_IN_NAMES and name in settings and json.dumps(settings[name]) != json.dumps(value):
            raise FewShotError(
                f"the ledger has {cell.name} with {name} {settings[name]!r}, but the plan or the package's default is "
                f"{value!r}; say {name} in the plan as it was, or remove that line and the run's folder"
            )


def find(record: Record, test: Test) -> Record | None:
    """The record of a test with the same adaptation and as many tasks or more."""
    same = (one for one in record["tests"] if _adaptation(one) == test.adaptation)
    return next((one for one in same if one["tasks"] >= test.tasks), None)


def _adaptation(test: Record) -> Adaptation:
    """Of a test's record, which leaves out what is as by default."""
    return Adaptation(**{name: test[name] for name in Adaptation._fields if name in test})


def pack(accuracies: Tensor, queries: int) -> str:
    """Accuracies `[tasks]` of tasks with so many query images, as text: how many answers were right in each."""
    counts = (accuracies.double() * queries).round().numpy().astype("<u2")
    return base64.b64encode(zlib.compress(counts.tobytes(), 9)).decode()


def accuracies(test: Record, tasks: int | None = None) -> Tensor:
    """The accuracies of a test's record, float64 `[tasks]`: the first ones, or all."""
    counts = unpacked(test["right"], test["tasks"])
    assert counts is not None, "records are checked when they are read"
    return torch.tensor(counts[:tasks].astype(np.float64) / test["query_images"])
