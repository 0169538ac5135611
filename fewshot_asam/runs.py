"""A run folder: settings, metrics, TensorBoard events, curves and summary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.figure import Figure

from fewshot_asam.checkpoint import write_atomically
from fewshot_asam.config import TrainConfig
from fewshot_asam.errors import FewShotError
from fewshot_asam.evaluate import Interval

Row = dict[str, Any]


def create(config: TrainConfig) -> Path:
    """A new, empty run folder; raises `FewShotError` where there is something already."""
    folder = config.output_dir or _free(Path("runs"), config.title)
    if (folder / "config.yaml").exists():
        raise FewShotError(f"{folder} holds a run already; continue it with --resume, or choose another --output-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FewShotError(f"{folder} is not empty; choose a new --output-dir")
    except OSError as error:
        raise FewShotError(f"the run folder {folder} cannot be made ({error}); choose another --output-dir") from error
    return folder


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


def read_metrics(folder: Path) -> list[Row]:
    """The rows of `metrics.jsonl`, in order, up to one that a killed process left unfinished; none without a file."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or "iteration" not in row:
            break
        rows.append(row)
    return rows


class MetricsLog:
    """Appends rows to `metrics.jsonl` and their numbers to TensorBoard's events.

    Rows beyond iteration `resumed_at` are dropped first, so that a resumed run repeats none.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # slow to import

        kept = [row for row in read_metrics(folder) if row["iteration"] <= resumed_at]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lines.close()
        self._board.close()

    def add(self, iteration: int, **values: float) -> None:
        """One row: the numbers known after `iteration` meta-batches."""
        self._lines.write(json.dumps({"iteration": iteration, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)


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
