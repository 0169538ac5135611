"""Training a classifier: epochs, accuracy on held-out images, checkpoints, the final test."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from tqdm import tqdm

from fewshot_asam.engine.precision import precision
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.signals import Stop, Stopped
from fewshot_asam.supervised import datasets
from fewshot_asam.supervised.config import FREE_TO_CHANGE, ClassifierConfig, from_yaml, plain, to_yaml
from fewshot_asam.supervised.state import ClassifierState, build
from fewshot_asam.training import run_folder
from fewshot_asam.training.announcements import device_name
from fewshot_asam.training.build import resolve_device
from fewshot_asam.training.checkpoint import tidy, write_text
from fewshot_asam.training.evaluation import Interval, interval
from fewshot_asam.training.metrics import MetricsLog
from fewshot_asam.version import __version__


@torch.inference_mode(False)
@torch.enable_grad()
def train_classifier(config: ClassifierConfig, *, resume: bool = False, stop: Stop | None = None) -> dict[str, Any]:
    """Trains, tests and writes the run folder; prints one line with the test accuracy.

    **Arguments:**

    - `resume`: goes on with the run in `output_dir`. Settings that would alter it, other data and a folder without a
      run are refused before anything is written.
    - `stop`: SIGINT and SIGTERM end the step, save the state and raise `Stopped`, a `KeyboardInterrupt`; so does a
      request that reached `stop`, the caller's own.

    **Returns:** what `summary.json` holds. Raises `FewShotError` for settings that cannot be run, for a loss that is
    not finite and where the run folder cannot be written; the last checkpoint stays.
    """
    config = located(config)
    if resume:
        _require_resumable(config)
    device = resolve_device(config.device)
    state = build(config, *datasets.load(config.dataset, config.data_root, config.image_size), device)
    with precision(config.precision, device), run_folder.opened(config, resume) as state.folder:
        if resume:
            state.restore()
        tidy(state.folder)
        write_text(state.folder / run_folder.SETTINGS, to_yaml(config))
        state.rewrite()
        for line in _opening(state):
            print(line, flush=True)
        try:
            with nullcontext(stop) if stop else Stop() as heeded:
                _fit(state, heeded)
                summary = _test(state, heeded)
        except Stopped as stopped:
            reason = f"stopped by {Signals(stopped.number).name} after step {state.progress.step}"
            again = f"train_classifier --resume --output-dir {state.folder} goes on"
            raise Stopped(stopped.number, f"{reason}; {again}") from stopped
    print(_conclusion(state, summary), flush=True)
    return summary


def located(config: ClassifierConfig) -> ClassifierConfig:
    """The settings with the data's whole path, so that they hold in another folder too."""
    return replace(config, data_root=config.data_root.absolute()) if config.data_root else config


def stored_settings(folder: Path) -> ClassifierConfig:
    """The settings of the run in a folder, with that folder, which may be a copy, as their `output_dir`."""
    if not (folder / run_folder.SETTINGS).is_file():
        raise FewShotError(f"{folder} is not the folder of a run of train_classifier (it has no {run_folder.SETTINGS})")
    return replace(from_yaml(folder / run_folder.SETTINGS), output_dir=folder)


def _require_resumable(config: ClassifierConfig) -> None:
    """Raises `FewShotError` where `output_dir` is no run, or one that these settings would alter."""
    if config.output_dir is None:
        raise FewShotError("to resume needs the run to go on with; give its folder as output_dir")
    before, now = plain(stored_settings(config.output_dir)), plain(config)
    for name, value in now.items():
        if name not in FREE_TO_CHANGE and value != before[name]:
            raise FewShotError(
                f"{name} was {before[name]} and is {value}, which would alter the resumed run; leave it as it was, or "
                "start a new run"
            )
    if config.schedule == "cosine" and before["epochs"] != config.epochs:
        warnings.warn(
            f"lr falls to 0 after epoch {config.epochs} now, not {before['epochs']}: with schedule 'cosine' this is "
            "not the run that had so many epochs from the start",
            stacklevel=2,
        )


def _fit(state: ClassifierState, stop: Stop) -> None:
    progress, total = state.progress, state.steps_an_epoch * state.config.epochs
    pause = 0.5 if sys.stderr.isatty() else 60  # a log file keeps every update
    with (
        tqdm(total=total, initial=progress.step, unit="step", desc="training", mininterval=pause) as bar,
        MetricsLog(state.folder, progress.rows) as log,
    ):
        progress.rows = log.rows
        try:
            _epochs(state, stop, bar, log)
        except Stopped:
            _save(state, log)
            raise


def _epochs(state: ClassifierState, stop: Stop, bar: Any, log: MetricsLog) -> None:
    progress = state.progress
    started = time.monotonic() - progress.seconds
    while not state.finished:
        stop.check()
        state.train_step()
        progress.seconds = time.monotonic() - started
        bar.update()
        if progress.step % state.steps_an_epoch == 0:
            _end_epoch(state, log)
            progress.seconds = time.monotonic() - started
            if state.finished or state.epoch % state.config.checkpoint_every == 0:
                _save(state, log)


def _end_epoch(state: ClassifierState, log: MetricsLog) -> None:
    """A row of metrics, and the accuracy on the held-out images."""
    progress = state.progress
    loss, accuracy = state.read_sums()
    row = {"train_loss": loss, "train_accuracy": accuracy, "seconds": progress.seconds}
    if len(state.held_out.labels):
        held = interval(state.right(state.held_out).float())
        row |= {"val_accuracy": held.mean, "val_ci95": held.half_width}
        if held.mean > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = held.mean, state.epoch
            state.keep_best()
    log.add(progress.step, **row)
    progress.rows += 1


def _save(state: ClassifierState, log: MetricsLog) -> None:
    log.sync()
    state.save()


def _test(state: ClassifierState, stop: Stop) -> dict[str, Any]:
    """Tests the last weights and those of the best epoch."""
    config, progress = state.config, state.progress
    last = best = _tested(state, stop)
    if state.best and progress.best_epoch != state.epoch:
        state.network.load_state_dict(state.best)
        best = _tested(state, stop)
    summary = {
        **plain(config),
        "test_accuracy": best.mean,
        "test_ci95": best.half_width,
        "last_test_accuracy": last.mean,
        "last_test_ci95": last.half_width,
        "test_images": len(state.test.labels),
        "train_images": len(state.train.labels),
        "steps": progress.step,
        "gradients": progress.step * config.gradients_a_step,
        "best_epoch": progress.best_epoch or state.epoch,
        "val_accuracy": progress.best_accuracy if progress.best_epoch else None,
        "device": device_name(state.test.images.device),
        "wall_seconds": round(progress.seconds, 1),
        "package_version": __version__,
    }
    run_folder.write_summary(state.folder, summary)
    run_folder.draw_curves(state.folder, config.title, best, run_folder.SUPERVISED)
    return summary


def _tested(state: ClassifierState, stop: Stop) -> Interval:
    return interval(state.right(state.test, stop.check).float())


def _opening(state: ClassifierState) -> list[str]:
    config, size = state.config, sum(p.numel() for p in state.network.parameters())
    counts = [f"{len(data.labels):,}" for data in (state.train, state.held_out, state.test)]
    noise = f", {100 * config.label_noise:g} % of the labels of the first two replaced" if config.label_noise else ""
    lines = [
        f"{config.title} in {state.folder}: {config.model} of {size:,} parameters on {state.test.images.device}",
        f"{config.dataset}: {' / '.join(counts)} images for training / choosing the epoch / test{noise}",
        f"{config.optimizer}: {config.gradients_a_step:g} gradients of a training batch a step",
    ]
    if state.finished:
        lines.append(f"all {config.epochs} epochs are done; raise --epochs to go on")
    return lines


def _conclusion(state: ClassifierState, summary: dict[str, Any]) -> str:
    best, last = (Interval(summary[f"{kind}test_accuracy"], summary[f"{kind}test_ci95"]) for kind in ("", "last_"))
    return (
        f"test accuracy {best} of epoch {summary['best_epoch']}, {last} of the last one ({summary['test_images']:,} "
        f"images); see {state.folder / 'curves.png'}"
    )
