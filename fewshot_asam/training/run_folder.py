"""A run folder: settings, curves and summary."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.files import open_regular
from fewshot_asam.runtime.locks import LOCK, locked
from fewshot_asam.runtime.yaml_settings import conforming
from fewshot_asam.training.checkpoint import is_scratch, tidy, write_atomically, write_text
from fewshot_asam.training.checks import LARGEST_COUNT
from fewshot_asam.training.config import TrainConfig, from_yaml, to_yaml
from fewshot_asam.training.evaluation import Interval
from fewshot_asam.training.identity import require_same_settings
from fewshot_asam.training.metrics import Row, read_metrics

OUTCOME: dict[str, type] = {
    **dict.fromkeys(("test_accuracy", "test_ci95", "val_accuracy", "wall_seconds"), float),
    **dict.fromkeys(("iterations", "best_iteration", "processes"), int),
    **dict.fromkeys(("engine", "device"), str),
}
"""What a summary holds beside the settings, as far as it is used."""
SETTINGS = "config.yaml"
"""The file that makes a folder that of a run."""


class Settings(Protocol):
    """What a run folder needs to know of the settings of a run."""

    @property
    def output_dir(self) -> Path | None:
        """The folder; None for a new one."""

    @property
    def title(self) -> str:
        """The run in a few words, fit for a file name."""


class AxisLabels(NamedTuple):
    """What the curves of a run are called."""

    step: str
    trained: str
    loss: str
    accuracy: str


META = AxisLabels("meta-iteration", "training tasks", "query loss", "query accuracy, %")
SUPERVISED = AxisLabels("step", "training images", "loss", "accuracy, %")


def stored_settings(folder: Path) -> TrainConfig:
    """The settings of the run in a folder, with that folder, which may be a copy, as their `output_dir`.

    Raises `FewShotError` where there is none.
    """
    if not (folder / SETTINGS).is_file():
        raise FewShotError(f"{folder} is not the folder of a run of train_maml (it has no {SETTINGS})")
    return replace(from_yaml(folder / SETTINGS), output_dir=folder)


def require_resumable(config: TrainConfig) -> None:
    """Raises `FewShotError` where `output_dir` is no run, or one that these settings would alter; reads alone.

    Warns where a course of the learning rate is stretched.
    """
    if config.output_dir is None:
        raise FewShotError("to resume needs the run to go on with; give its folder as output_dir")
    stored = stored_settings(config.output_dir)
    require_same_settings(config, stored)
    read_metrics(config.output_dir)  # so that a file that cannot be read is met before anything is written
    if stored.schedule == "cosine" and stored.iterations != config.iterations:
        warnings.warn(
            f"meta_lr falls to 0 at iteration {config.iterations} now, not {stored.iterations}: with schedule "
            "'cosine' this is not the run that had so many iterations from the start",
            stacklevel=2,
        )


@contextmanager
def opened(config: Settings, resume: bool) -> Iterator[Path]:
    """The run's folder, a new and empty one unless `resume`; no other process may train into it meanwhile.

    Nothing is written into it, as what it holds may turn out to be of another run. Raises `FewShotError` where it
    cannot be made, holds other things or is being trained into.
    """
    with ExitStack() as held:

        def claimed() -> Path:
            if not distributed.is_first():
                return Path()
            folder = config.output_dir if resume and config.output_dir else _made(config)
            held.enter_context(locked(folder))
            if not resume:
                _require_empty(folder)
            return folder

        yield distributed.broadcast(distributed.all_succeed(claimed))


def begin(folder: Path, config: TrainConfig) -> None:
    """Makes an opened folder ready to be trained into: tidied, its settings written."""
    if distributed.is_first():
        tidy(folder)
        write_text(folder / SETTINGS, to_yaml(config))


def _made(config: Settings) -> Path:
    folder = config.output_dir or _free(Path("runs"), config.title)
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.output_dir))
        _require_empty(folder)
    except OSError as error:
        raise FewShotError(f"the run folder {folder} cannot be made ({error}); choose another --output-dir") from error
    return folder


def _require_empty(folder: Path) -> None:
    if (folder / SETTINGS).exists():
        raise FewShotError(f"{folder} holds a run already; continue it with --resume, or choose another --output-dir")
    if any(path.name != LOCK and not is_scratch(path) for path in folder.iterdir()):
        raise FewShotError(f"{folder} is not empty; choose a new --output-dir")


def _free(parent: Path, title: str) -> Path:
    taken = parent / title
    number = 2
    while taken.exists():
        taken = parent / f"{title}-{number}"
        number += 1
    return taken


def write_summary(folder: Path, summary: Row) -> None:
    """`summary.json`."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> Row:
    """What `write_summary` wrote; raises `FewShotError` where that is not to be read."""
    path = folder / "summary.json"
    remedy = "remove it, and train_maml --resume makes it anew"
    try:
        with open_regular(path) as file:
            summary = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        raise FewShotError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(summary, dict) or not summary.keys() >= OUTCOME.keys():
        raise FewShotError(f"{path} holds no summary of a run; {remedy}")
    try:
        return summary | {name: _possible(name, summary[name], kind) for name, kind in OUTCOME.items()}
    except FewShotError as error:
        raise FewShotError(f"{path} holds no summary of a run ({error}); {remedy}") from error


def _possible(name: str, value: object, kind: Any) -> Any:
    found = conforming(name, value, kind)
    if kind is not str and not 0 <= found <= (1 if kind is float and name != "wall_seconds" else LARGEST_COUNT):
        raise FewShotError(f"{name} is {found}")
    return found


def draw_curves(folder: Path, title: str, test: Interval, labels: AxisLabels = META) -> None:
    """`curves.png`: loss and accuracy against steps, validation with its interval, the test result."""
    rows = read_metrics(folder)
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(*_series(rows, "train_loss"), color="tab:blue", alpha=0.25, linewidth=0.8)
    loss.plot(*_smoothed(*_series(rows, "train_loss")), color="tab:blue", label=labels.trained)
    loss.set(xlabel=labels.step, ylabel=labels.loss, ylim=(0, None))
    steps, train = _series(rows, "train_accuracy")
    accuracy.plot(steps, [100 * v for v in train], color="tab:blue", alpha=0.25, linewidth=0.8)
    accuracy.plot(*_smoothed(steps, [100 * v for v in train]), color="tab:blue", label=labels.trained)
    steps, mean = _series(rows, "val_accuracy")
    width = _series(rows, "val_ci95")[1]
    accuracy.errorbar(
        steps, [100 * v for v in mean], [100 * v for v in width], color="tab:orange", capsize=2, label="validation"
    )
    accuracy.axhline(100 * test.mean, color="tab:green", linestyle="--", label=f"test {test}")
    accuracy.axhspan(
        100 * (test.mean - test.half_width), 100 * (test.mean + test.half_width), color="tab:green", alpha=0.15
    )
    accuracy.set(xlabel=labels.step, ylabel=labels.accuracy)
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
