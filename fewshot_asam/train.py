"""The meta-training loop: Adam at the upper level, validation on fixed tasks, checkpoints, the final test."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewshot_asam import __version__, engine, runs
from fewshot_asam.checkpoint import load_state, load_weights, save_state, save_weights
from fewshot_asam.config import TrainConfig, build_learner, load_data, plain, resolve_device, to_yaml
from fewshot_asam.data import Dataset
from fewshot_asam.data.images import ImageSet
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.evaluate import Interval, evaluate, interval
from fewshot_asam.meta import MetaLearner

EVALUATION_SEED = 0
"""Of the validation and test tasks: the same for every run, whatever its own seed."""
ROWS = 500
"""About as many lines of training metrics are kept of a run."""


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    iteration: int = 0
    best_accuracy: float = -1.0
    best_iteration: int = 0
    seconds: float = 0.0


@dataclass
class Trainer:
    """All that changes while training, and what it needs."""

    config: TrainConfig
    folder: Path
    learner: MetaLearner
    dataset: Dataset
    train_tasks: EpisodeSampler
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    progress: Progress = field(default_factory=Progress)

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "package_version": __version__,
            "progress": vars(self.progress),
            "model": self.learner.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "train_tasks": self.train_tasks.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` gave; raises `FewShotError` where it is of another run."""
        try:
            self.progress = Progress(**state["progress"])
            self.learner.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.train_tasks.load_state_dict(state["train_tasks"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FewShotError(
                f"{self.folder / 'state.pt'} is not of a run with these settings, this package ({__version__}) and "
                f"this kind of device ({' '.join(str(error).split())})"
            ) from error


def train(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """Trains, tests and writes the run folder; prints one line with the test accuracy.

    **Returns:** what `summary.json` holds. Raises `FewShotError` for settings that cannot be run and for a loss that is
    not finite; the last checkpoint stays.
    """
    device = resolve_device(config.device)
    dataset = load_data(config, device)
    trainer = _trainer(config, dataset, device, resume)
    _announce(trainer, device)
    _fit(trainer)
    summary = _test(trainer, device)
    accuracy = Interval(summary["test_accuracy"], summary["test_ci95"])
    print(f"test accuracy {result_text(config, accuracy, config.test_tasks)}; see {trainer.folder / 'curves.png'}")
    return summary


def result_text(config: TrainConfig, accuracy: Interval, tasks: int) -> str:
    """An accuracy with everything it must not be quoted without."""
    steps = f"{config.inner_steps} step{'s' if config.inner_steps > 1 else ''} of {config.inner_lr:g}"
    return (
        f"{accuracy} ({tasks} tasks, {config.ways}-way {config.shots}-shot, {config.queries} queries a class, "
        f"{config.norm} norm, {config.rule_text}, {steps})"
    )


def evaluation_sampler(config: TrainConfig, images: ImageSet, seed: int = EVALUATION_SEED) -> EpisodeSampler:
    """A fresh sampler of validation or test tasks."""
    return EpisodeSampler(images, config.ways, config.shots, config.queries, seed=seed)


def _trainer(config: TrainConfig, dataset: Dataset, device: torch.device, resume: bool) -> Trainer:
    learner = build_learner(config, dataset.train.shape).to(device)
    train_tasks = EpisodeSampler(dataset.train, config.ways, config.shots, config.queries, seed=config.seed)
    for images in (dataset.val, dataset.test):
        evaluation_sampler(config, images)
    optimizer = torch.optim.Adam(learner.parameters(), lr=config.meta_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(config, i))
    folder = config.output_dir if resume and config.output_dir else runs.create(config)
    trainer = Trainer(config, folder, learner, dataset, train_tasks, optimizer, schedule)
    if resume and (folder / "state.pt").exists():
        trainer.load(load_state(folder / "state.pt"))
    runs.write_text(folder / "config.yaml", to_yaml(config))
    return trainer


def _rate(config: TrainConfig, iteration: int) -> float:
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / config.iterations)))


def _announce(trainer: Trainer, device: torch.device) -> None:
    config, dataset = trainer.config, trainer.dataset
    choice = engine.choose(config.engine, trainer.learner.model, device, dataset.train.shape[-1])
    classes = " / ".join(str(len(images.names)) for images in (dataset.train, dataset.val, dataset.test))
    size = sum(p.numel() for p in trainer.learner.parameters())
    print(f"{config.title} in {trainer.folder}: {config.model} of {size:,} parameters on {device}, {config.norm} norm")
    print(f"{config.dataset}: {classes} classes for training / validation / test")
    print(f"engine {choice.name}: {choice.reason}", flush=True)
    if trainer.progress.iteration >= config.iterations:
        print(f"all {config.iterations} iterations are done; --iterations can be raised where the schedule is constant")
    elif _out_of_time(config, trainer.progress):
        print(f"all {config.max_minutes:g} minutes are spent; raise --max-minutes to go on", flush=True)


def _fit(trainer: Trainer) -> None:
    config, progress = trainer.config, trainer.progress
    every = max(1, config.iterations // ROWS)
    started = time.monotonic() - progress.seconds
    done, total = progress.iteration, config.iterations
    bar = tqdm(total=total, initial=done, unit="it", desc="training", dynamic_ncols=True, mininterval=0.5)
    recent: list[tuple[float, float]] = []
    with bar, runs.MetricsLog(trainer.folder, progress.iteration) as log:
        while progress.iteration < config.iterations and not _out_of_time(config, progress):
            recent.append(_iterate(trainer))
            progress.iteration += 1
            progress.seconds = time.monotonic() - started
            last = progress.iteration == config.iterations or _out_of_time(config, progress)
            if last or progress.iteration % every == 0:
                _report(trainer, bar, log, recent)
                recent.clear()
            if last or progress.iteration % config.validate_every == 0:
                _validate(trainer, log)
            if last or progress.iteration % config.checkpoint_every == 0:
                save_weights(trainer.folder / "last.safetensors", trainer.learner.model)
                save_state(trainer.folder / "state.pt", trainer.state())
            bar.update()
        if not (trainer.folder / "best.safetensors").exists():
            _validate(trainer, log)


def _out_of_time(config: TrainConfig, progress: Progress) -> bool:
    return config.max_minutes is not None and progress.seconds >= 60 * config.max_minutes


def _iterate(trainer: Trainer) -> tuple[float, float]:
    """One meta-batch and its step; returns its mean loss and accuracy."""
    config, parameters = trainer.config, list(trainer.learner.parameters())
    episodes = trainer.train_tasks.sample(config.meta_batch_size)
    trainer.optimizer.zero_grad()
    output = trainer.learner.meta_backward(episodes, config.inner_steps, trainer.train_tasks.augmentation)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad or math.inf)
    _require_finite(trainer, output.loss, norm)
    trainer.optimizer.step()
    trainer.schedule.step()
    return output.loss.item(), output.accuracy.mean().item()


def _require_finite(trainer: Trainer, loss: Tensor, norm: Tensor) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    config, saved = trainer.config, trainer.folder / "last.safetensors"
    raise FewShotError(
        f"the query loss is {loss.item():g} and the meta-gradient's norm {norm.item():g} at iteration "
        f"{trainer.progress.iteration + 1}; the likely cause is an inner_lr ({config.inner_lr:g}), rho "
        f"({config.rho:g}) or meta_lr ({config.meta_lr:g}) that is too large: lower it or set clip_grad. "
        + (f"The last good checkpoint is {saved}" if saved.exists() else "No checkpoint had been written yet")
    )


def _report(trainer: Trainer, bar: Any, log: runs.MetricsLog, recent: list[tuple[float, float]]) -> None:
    progress = trainer.progress
    loss, accuracy = (sum(column) / len(recent) for column in zip(*recent, strict=True))
    log.add(progress.iteration, train_loss=loss, train_accuracy=accuracy, seconds=progress.seconds)
    rate = bar.format_dict["rate"] or progress.iteration / progress.seconds
    tasks = f"{rate * trainer.config.meta_batch_size:.0f} tasks/s"
    best = f"{100 * progress.best_accuracy:.1f} %" if progress.best_iteration else "none yet"
    text = f"loss {loss:.3f}, accuracy {100 * accuracy:.1f} %, best validation {best}, {tasks}"
    bar.set_postfix_str(text, refresh=False)


def _validate(trainer: Trainer, log: runs.MetricsLog) -> None:
    config, progress = trainer.config, trainer.progress
    sampler = evaluation_sampler(config, trainer.dataset.val)
    result = interval(evaluate(trainer.learner, sampler, config.validate_tasks, config.inner_steps))
    log.add(progress.iteration, val_accuracy=result.mean, val_ci95=result.half_width)
    best = trainer.folder / "best.safetensors"
    if result.mean > progress.best_accuracy or not best.exists():
        progress.best_accuracy, progress.best_iteration = result.mean, progress.iteration
        save_weights(best, trainer.learner.model)


def _test(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    config, progress = trainer.config, trainer.progress
    load_weights(trainer.folder / "best.safetensors", trainer.learner.model)
    sampler = evaluation_sampler(config, trainer.dataset.test)
    result = interval(evaluate(trainer.learner, sampler, config.test_tasks, config.inner_steps))
    summary = {
        **plain(config),
        "test_accuracy": result.mean,
        "test_ci95": result.half_width,
        "iterations": progress.iteration,
        "best_iteration": progress.best_iteration,
        "val_accuracy": progress.best_accuracy,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "wall_seconds": round(progress.seconds, 1),
        "package_version": __version__,
    }
    runs.write_summary(trainer.folder, summary)
    runs.draw_curves(trainer.folder, config.title, result)
    return summary
