"""The meta-training loop: Adam at the upper level, validation on fixed tasks, checkpoints, the final test."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewshot_asam import __version__, engine, runs, upper
from fewshot_asam.checkpoint import load_state, load_weights, save_state, save_weights
from fewshot_asam.config import TrainConfig, build_learner, load_data, plain, resolve_device, to_yaml
from fewshot_asam.data import Dataset
from fewshot_asam.data.images import ImageSet
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.evaluate import Interval, evaluate, interval
from fewshot_asam.meta import MetaLearner
from fewshot_asam.models import unvectorisable_layers

EVALUATION_SEED = 0
"""Of the validation and test tasks: the same for every run, whatever its own seed."""
ROWS = 500
"""About as many lines of training metrics are kept of a run."""
INTERVALS = ("validate_every", "checkpoint_every")
"""Settings after so many iterations of which the training numbers must have been read."""


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    iteration: int = 0
    best_accuracy: float = -1.0
    best_iteration: int = 0
    seconds: float = 0.0
    engine: str = ""
    """what `auto` chose, so that a resumed run goes on in the same way"""


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
    iterate: upper.Iteration
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
    with precision(config.precision, device):
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
    optimizer = upper.optimizer(learner, config)
    schedule = upper.schedule(optimizer, config)
    iterate = upper.iteration(learner, optimizer, config)
    folder = config.output_dir if resume and config.output_dir else runs.create(config)
    trainer = Trainer(config, folder, learner, dataset, train_tasks, optimizer, schedule, iterate)
    if resume and (folder / "state.pt").exists():
        trainer.load(load_state(folder / "state.pt"))
    runs.write_text(folder / "config.yaml", to_yaml(config))
    return trainer


def _announce(trainer: Trainer, device: torch.device) -> None:
    config, dataset = trainer.config, trainer.dataset
    classes = " / ".join(str(len(images.names)) for images in (dataset.train, dataset.val, dataset.test))
    size = sum(p.numel() for p in trainer.learner.parameters())
    print(f"{config.title} in {trainer.folder}: {config.model} of {size:,} parameters on {device}, {config.norm} norm")
    print(f"{config.dataset}: {classes} classes for training / validation / test")
    choice = _engine(trainer, device)
    trainer.learner.engine = trainer.progress.engine = choice.name
    print(f"engine {choice.name}{_options(config, device)}: {choice.reason}", flush=True)
    if trainer.progress.iteration >= config.iterations:
        print(f"all {config.iterations} iterations are done; --iterations can be raised where the schedule is constant")
    elif _out_of_time(config, trainer.progress):
        print(f"all {config.max_minutes:g} minutes are spent; raise --max-minutes to go on", flush=True)


def _engine(trainer: Trainer, device: torch.device) -> engine.Choice:
    """The engine by rule, or by the clock on a CPU where both can run; a resumed run keeps its own."""
    config, learner = trainer.config, trainer.learner
    choice = engine.choose(config.engine, learner.model, device, trainer.dataset.train.shape[-1])
    if config.engine != "auto" or device.type != "cpu" or config.compiled or unvectorisable_layers(learner.model):
        return choice
    if trainer.progress.engine:
        return engine.Choice("vmap" if trainer.progress.engine == "vmap" else "loop", "as before")
    sampler = EpisodeSampler(trainer.dataset.train, config.ways, config.shots, config.queries)
    episodes = sampler.sample(config.meta_batch_size)

    def iterate(name: engine.Tasks) -> None:
        learner.engine = name
        learner.meta_backward(episodes, config.inner_steps, sampler.augmentation)
        learner.zero_grad()

    return engine.measured(choice, iterate)


def _options(config: TrainConfig, device: torch.device) -> str:
    """How the engine runs beyond its name."""
    captured = config.cuda_graph and device.type == "cuda"
    wanted = {"compiled": config.compiled, "recomputing": config.recompute, "recorded": captured}
    wanted[config.precision] = config.precision != "float32"
    return "".join(f", {name}" for name, chosen in wanted.items() if chosen)


def _fit(trainer: Trainer) -> None:
    config, progress = trainer.config, trainer.progress
    every = max(1, config.iterations // ROWS)
    done, total = progress.iteration, config.iterations
    unread: list[Tensor] = []
    if config.compiled and done < total:
        _compile(trainer)
    started = time.monotonic() - progress.seconds
    bar = tqdm(total=total, initial=done, unit="it", desc="training", dynamic_ncols=True, mininterval=0.5)
    with bar, runs.MetricsLog(trainer.folder, progress.iteration) as log:
        while progress.iteration < config.iterations and not _out_of_time(config, progress):
            unread.append(_iterate(trainer))
            progress.iteration += 1
            progress.seconds = time.monotonic() - started
            last = progress.iteration == config.iterations or _out_of_time(config, progress)
            due = {name: last or progress.iteration % getattr(config, name) == 0 for name in INTERVALS}
            if last or progress.iteration % every == 0 or any(due.values()):
                _report(trainer, bar, log, _read(trainer, unread))
                unread.clear()
            if due["validate_every"]:
                _validate(trainer, log)
            if due["checkpoint_every"]:
                save_weights(trainer.folder / "last.safetensors", trainer.learner.model)
                save_state(trainer.folder / "state.pt", trainer.state())
            bar.update()
        if not (trainer.folder / "best.safetensors").exists():
            _validate(trainer, log)


def _compile(trainer: Trainer) -> None:
    """Compiles by an iteration that is thrown away, so that it takes no training time."""
    config, started = trainer.config, time.monotonic()
    print("compiling, a minute or two the first time ...", end="", flush=True)
    sampler = EpisodeSampler(trainer.dataset.train, config.ways, config.shots, config.queries)
    trainer.learner.meta_backward(sampler.sample(config.meta_batch_size), config.inner_steps, sampler.augmentation)
    trainer.learner.zero_grad()
    print(f" done in {time.monotonic() - started:.0f} s", flush=True)


def _out_of_time(config: TrainConfig, progress: Progress) -> bool:
    return config.max_minutes is not None and progress.seconds >= 60 * config.max_minutes


def _iterate(trainer: Trainer) -> Tensor:
    """One meta-batch and its step; returns numbers that are still on the device."""
    episodes = trainer.train_tasks.sample(trainer.config.meta_batch_size)
    numbers = trainer.iterate(trainer.learner.batch(episodes, trainer.train_tasks.augmentation))
    trainer.schedule.step()
    return numbers


def _read(trainer: Trainer, unread: list[Tensor]) -> Tensor:
    """The numbers of the latest iterations `[n, 3]`; raises `FewShotError` where one is not finite."""
    numbers = torch.stack(unread).cpu()
    bad = (~numbers.isfinite()).any(1).nonzero()
    if len(bad) == 0:
        return numbers
    config, saved, first = trainer.config, trainer.folder / "last.safetensors", int(bad[0])
    loss, _, norm = numbers[first].tolist()
    raise FewShotError(
        f"the query loss is {loss:g} and the meta-gradient's norm {norm:g} at iteration "
        f"{trainer.progress.iteration - len(unread) + first + 1}; the likely cause is an inner_lr "
        f"({config.inner_lr:g}), rho ({config.rho:g}) or meta_lr ({config.meta_lr:g}) that is too large: lower it or "
        "set clip_grad. "
        + (f"The last good checkpoint is {saved}" if saved.exists() else "No checkpoint had been written yet")
    )


def _report(trainer: Trainer, bar: Any, log: runs.MetricsLog, numbers: Tensor) -> None:
    progress = trainer.progress
    loss, accuracy, _ = numbers.double().mean(0).tolist()
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
        "engine": progress.engine,
        "val_accuracy": progress.best_accuracy,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "wall_seconds": round(progress.seconds, 1),
        "package_version": __version__,
    }
    runs.write_summary(trainer.folder, summary)
    runs.draw_curves(trainer.folder, config.title, result)
    return summary
