"""A run folder: settings, metrics, TensorBoard events, curves and summary."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fewshot_asam import distributed
from fewshot_asam.checkpoint import SCRATCH, tidy, write_atomically
from fewshot_asam.config import TrainConfig, to_yaml
from fewshot_asam.errors import FewShotError
from fewshot_asam.evaluate import Interval

Row = dict[str, Any]

LOCK = ".lock"
"""The file of a run folder that the process training into it holds locked."""


@contextmanager
def opened(config: TrainConfig, resume: bool) -> Iterator[Path]:
    """The run's folder, a new one unless `resume`, with its settings written; no other process may train into it.

    Raises `FewShotError` where it cannot be made or written, holds other things or is being trained into.
    """
    with ExitStack() as held:

        def claimed() -> Path:
            if not distributed.is_first():
                return Path()
            folder = config.output_dir if resume and config.output_dir else _made(config)
            held.enter_context(_locked(folder))
            if not resume:
                _require_empty(folder)
            tidy(folder)
            write_text(folder / "config.yaml", to_yaml(config))
            return folder

        yield distributed.from_first(distributed.agreed(claimed))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when the process ends, however it ends."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FewShotError(f"another process is training into {folder}; choose another folder") from error
    except (OSError, NotImplementedError) as error:
        raise FewShotError(
            f"the run folder {folder} cannot be written ({error}); choose another --output-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _made(config: TrainConfig) -> Path:
    folder = config.output_dir or _free(Path("runs"), config.title)
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.output_dir))
        _require_empty(folder)
    except OSError as error:
        raise FewShotError(f"the run folder {folder} cannot be made ({error}); choose another --output-dir") from error
    return folder


def _require_empty(folder: Path) -> None:
    if (folder / "config.yaml").exists():
        raise FewShotError(f"{folder} holds a run already; continue it with --resume, or choose another --output-dir")
    if {path.name for path in folder.iterdir()} - {LOCK, *(path.name for path in folder.glob(SCRATCH))}:
        raise FewShotError(f"{folder} is not empty; choose a new --output-dir")


def _free(parent: Path, title: str) -> Path:
    taken = parent / title
    number = 2
    while taken.exists():
        taken = parent / f"{title}-{number}"
        number += 1
    return taken


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, atomically."""
    write_atomically(path, lambda scratch: _write(scratch, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_summary(folder: Path, summary: Row) -> None:
    """`summary.json`."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> Row:
    """What `write_summary` wrote; raises `FewShotError` where that is not to be read."""
    path = folder / "summary.json"
    remedy = "remove it, and train_maml --resume makes it anew"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FewShotError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(summary, dict):
        raise FewShotError(f"{path} holds no summary of a run; {remedy}")
    return summary


def read_metrics(folder: Path) -> list[Row]:
    """The rows of `metrics.jsonl`, in order, up to one that a killed process left unfinished; none without a file."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
            break
        if not all(isinstance(value, int | float) for value in row.values()):
            break
        rows.append(row)
    return rows


class MetricsLog:
    """Appends rows to `metrics.jsonl` and their numbers to TensorBoard's events.

    Rows beyond the first `rows` are dropped and the events are written anew from the others, so that a resumed run
    repeats none. Events carry the time that was spent on training, not what passed while a run was stopped.
    Raises `FewShotError` where they cannot be written.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = read_metrics(folder)[:rows]
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


def draw_curves(folder: Path, title: str, test: Interval) -> None:
    """`curves.png`: loss and accuracy against meta-iterations, validation with its interval, the test result."""
    rows = read_metrics(folder)
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(*_series(rows, "train_loss"), color="tab:blue", alpha=0.25, linewidth=0.8)
    loss.plot(*_smoothed(*_series(rows, "train_loss")), color="tab:blue", label="training tasks")
    loss.set(xlabel="meta-iteration", ylabel="query loss", ylim=(0, None))
    steps, train = _series(rows, "train_accuracy")
    accuracy.plot(steps, [100 * v for v in train], color="tab:blue", alpha=0.25, linewidth=0.8)
    accuracy.plot(*_smoothed(steps, [100 * v for v in train]), color="tab:blue", label="training tasks")
    steps, mean = _series(rows, "val_accuracy")
    width = _series(rows, "val_ci95")[1]
    accuracy.errorbar(
        steps, [100 * v for v in mean], [100 * v for v in width], color="tab:orange", capsize=2, label="validation"
    )
    accuracy.axhline(100 * test.mean, color="tab:green", linestyle="--", label=f"test {test}")
    accuracy.axhspan(
        100 * (test.mean - test.half_width), 100 * (test.mean + test.half_width), color="tab:green", alpha=0.15
    )
    accuracy.set(xlabel="meta-iteration", ylabel="query accuracy, %")
    for panel in (loss, accuracy):
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.suptitle(title)
    write_atomically(folder / "curves.png", lambda scratch: figure.savefig(scratch, dpi=150, format="png"))


def _series(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    found = [(row["iteration"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _smoothed(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """A centred moving average over a fortieth of the curve."""
    half = max(1, len(values) // 80)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return steps, [sum(window) / len(window) for window in windows]
