"""The numbers of a run: appended to `metrics.jsonl` and to TensorBoard's events, read strictly."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.files import open_regular
from fewshot_asam.training.checkpoint import write_text
from fewshot_asam.training.checks import LARGEST_COUNT, LARGEST_RATE

Row = dict[str, Any]

METRICS = "metrics.jsonl"
_SHARE = (0, 1.001)
"""A mean of shares, rounded."""
MEASURED: dict[str, tuple[float, float]] = {
    "iteration": (0, LARGEST_COUNT),
    "train_loss": (0, LARGEST_RATE),
    "train_accuracy": _SHARE,
    "seconds": (0, LARGEST_RATE),
    "val_accuracy": _SHARE,
    "val_ci95": _SHARE,
    "congruence_before": (-1.001, 1.001),
    "congruence_after": (-1.001, 1.001),
}
"""The numbers of a row of metrics, each with the least and the largest that it can be."""


def read_metrics(folder: Path) -> list[Row]:
    """The rows of `metrics.jsonl`, in order, up to one that a killed process left unfinished; none without a file.

    Raises `FewShotError` where it cannot be read.
    """
    path, rows = folder / METRICS, list[Row]()
    try:
        with open_regular(path) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FewShotError(f"{path} cannot be read ({error}); put the run's file back, or remove it") from error
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_row(row) or (rows and row["iteration"] < rows[-1]["iteration"]):
            break
        rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    """Whether it holds what `MetricsLog.add` is given."""
    if not isinstance(row, dict) or "iteration" not in row or not row.keys() <= MEASURED.keys():
        return False
    return all(_is_measured(name, value) for name, value in row.items())


def _is_measured(name: str, value: object) -> bool:
    """A cosine with a gradient of zero is no number; everything else is finite."""
    if isinstance(value, bool) or not isinstance(value, int if name == "iteration" else int | float):
        return False
    least, most = MEASURED[name]
    return least <= value <= most or (name.startswith("congruence") and value != value)


class MetricsLog:
    """Appends rows to `metrics.jsonl` and their numbers to TensorBoard's events.

    Rows beyond the first `rows` are dropped and the events are written anew from the others, so that a resumed run
    repeats none; where fewer are found, that is warned of, and `rows` says how many. Events carry the time that was
    spent on training, not what passed while a run was stopped.
    Raises `FewShotError` where they cannot be written.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.path = folder / METRICS
        kept = read_metrics(folder)[:rows]
        self.rows = len(kept)
        if self.rows < rows:
            warnings.warn(
                f"{self.path} has {self.rows} rows that can be read, where the checkpoint speaks of {rows}; the "
                "others are missing from the curves",
                stacklevel=2,
            )
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
        self._seconds = max((row.get("seconds", 0.0) for row in kept), default=0.0)
        self._began = time.time() - self._seconds
        self._lines = self.path.open("ab")
        self._events = (folder / f"events.out.tfevents.{self._began:.0f}.{socket.gethostname()}").open("ab")
        self._board = RecordWriter(self._events)
        self._write(self._event(file_version="brain.Event:2"))
        for row in kept:
            self._draw(row)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # of what could not be written before either
            self._lines.close()
        with suppress(OSError):
            self._events.close()

    def add(self, iteration: int, **values: float) -> None:
        """One row: the numbers known after `iteration` meta-batches."""
        row = {"iteration": iteration, **values}
        with self._reported():
            self._lines.write(json.dumps(row).encode() + b"\n")
            self._lines.flush()
            self._draw(row)

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        with self._reported():
            os.fsync(self._lines.fileno())

    def _draw(self, row: Row) -> None:
        self._seconds = row.get("seconds", self._seconds)
        numbers = [Summary.Value(tag=tag, simple_value=number) for tag, number in row.items() if tag != "iteration"]
        self._write(self._event(step=row["iteration"], summary=Summary(value=numbers)))

    def _event(self, **content: Any) -> Event:
        return Event(wall_time=self._began + self._seconds, **content)

    def _write(self, event: Event) -> None:
        self._board.write(event.SerializeToString())
        self._board.flush()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FewShotError(f"{self.path} cannot be written ({error}); the last checkpoint is intact") from error
