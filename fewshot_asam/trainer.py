"""What changes while training: made from settings, stored in a checkpoint, restored from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_asam import __version__, distributed, upper
from fewshot_asam.checkpoint import Weights, decode, load_weights, read_state, save_state, save_weights, weights
from fewshot_asam.config import TrainConfig
from fewshot_asam.data import Dataset
from fewshot_asam.data.images import ImageSet
from fewshot_asam.distributed import PeerLost
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.evaluate import evaluate
from fewshot_asam.meta import MetaLearner
from fewshot_asam.prepare import build_learner

EVALUATION_SEED = 0
"""Of the validation and test tasks: the same for every run, whatever its own seed."""


class Diverged(FewShotError):
    """A loss or a meta-gradient is not finite."""


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    iteration: int = 0
    validated: int = 0
    """the iteration of the last validation"""
    rows: int = 0
    """lines of metrics.jsonl"""
    best_accuracy: float = -1.0
    best_iteration: int = 0
    seconds: float = 0.0
    engine: str = ""
    """what `auto` chose, so that a resumed run goes on in the same way"""


@dataclass
class Trainer:
    """All that changes while training, and what it needs."""

    config: TrainConfig
    dataset: Dataset
    learner: MetaLearner
    train_tasks: EpisodeSampler
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    iterate: upper.Iteration
    folder: Path = Path()
    progress: Progress = field(default_factory=Progress)
    best: Weights = field(default_factory=dict)
    unlogged: Tensor = field(default_factory=lambda: torch.empty(0, 3))
    """`[n, 3]`: loss, accuracy and norm of iterations that `metrics.jsonl` does not speak of yet"""
    unread: list[Tensor] = field(default_factory=list)
    """the same of later iterations, `[3]` each and still on the device"""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.learner.parameters()).device

    def advance(self) -> None:
        """One meta-batch and its step, waiting for nothing. If another process is lost meanwhile, it has not begun."""
        before = self.train_tasks.state_dict()
        try:
            episodes = self.train_tasks.sample(self.config.meta_batch_size)
            self.unread.append(self.iterate(self.learner.batch(episodes, self.train_tasks.augmentation)))
        except PeerLost:
            self.train_tasks.load_state_dict(before)
            raise
        self.schedule.step()
        self.progress.iteration += 1

    def read(self) -> Tensor:
        """The unlogged numbers, with those that were on the device; raises `Diverged` where one is not finite."""
        if self.unread:
            self.unlogged = torch.cat([self.unlogged, torch.stack(self.unread).cpu()])
            self.unread = []
        numbers = self.unlogged
        bad = (~numbers.isfinite()).any(1).nonzero()
        if len(bad) == 0:
            return numbers
        first, config = int(bad[0]), self.config
        loss, _, norm = numbers[first].tolist()
        raise Diverged(
            f"the query loss is {loss:g} and the meta-gradient's norm {norm:g} at iteration "
            f"{self.progress.iteration - len(numbers) + first + 1}; the likely cause is an inner_lr "
            f"({config.inner_lr:g}), rho ({config.rho:g}) or meta_lr ({config.meta_lr:g}) that is too large: lower it "
            f"or set clip_grad. {self.last_saved()}"
        )

    def save(self) -> None:
        """Writes a checkpoint, the first process for all."""
        self.read()
        if distributed.is_first():
            save_state(self.folder, self.progress.iteration, self._state())
            save_weights(self.folder / "last.safetensors", weights(self.learner.model))

    def keep_best(self) -> None:
        """Remembers the present weights as the best ones."""
        self.best = weights(self.learner.model)
        if distributed.is_first():
            save_weights(self.folder / "best.safetensors", self.best)

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint of the folder, if it has one, and writes its weights anew."""
        data, name = distributed.from_first(distributed.agreed(self._stored))
        if not data:
            return
        distributed.agreed(lambda: self._load(decode(data, name), name))
        if distributed.is_first():
            save_weights(self.folder / "last.safetensors", weights(self.learner.model))
            if self.best:
                save_weights(self.folder / "best.safetensors", self.best)

    def last_saved(self) -> str:
        """Where a run that cannot go on was saved last, in words."""
        saved = self.folder / "last.safetensors"
        return f"The last good checkpoint is {saved}" if saved.exists() else "No checkpoint had been written yet"

    def _stored(self) -> tuple[bytes, str]:
        return read_state(self.folder) if distributed.is_first() else (b"", "")

    def _state(self) -> dict[str, Any]:
        """Everything that the next iteration and the lines of metrics depend on."""
        return {
            "package_version": __version__,
            "progress": vars(self.progress),
            "model": self.learner.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "train_tasks": self.train_tasks.state_dict(),
            "unlogged": self.unlogged,
        }

    def _load(self, state: dict[str, Any], name: str) -> None:
        try:
            self.progress = Progress(**state["progress"])
            self.learner.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.train_tasks.load_state_dict(state["train_tasks"])
            self.best, self.unlogged = state["best"], state["unlogged"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FewShotError(
                f"{name} is not of a run with these settings, this package ({__version__}) and this kind of device "
                f"({' '.join(str(error).split())})"
            ) from error


def build(config: TrainConfig, dataset: Dataset, device: torch.device) -> Trainer:
    """A trainer that has done nothing yet. Raises `FewShotError` where there are more processes than tasks."""
    learner = build_learner(config, dataset.train.shape).to(device)
    train_tasks = EpisodeSampler(dataset.train, config.ways, config.shots, config.queries, seed=config.seed)
    if config.meta_batch_size < distributed.size():
        raise FewShotError(
            f"meta_batch_size is {config.meta_batch_size}, which leaves some of the {distributed.size()} processes "
            "without a task; start at most as many processes as there are tasks"
        )
    optimizer = upper.optimizer(learner, config)
    schedule = upper.schedule(optimizer, config)
    return Trainer(
        config, dataset, learner, train_tasks, optimizer, schedule, upper.iteration(learner, optimizer, config)
    )


def evaluation_sampler(config: TrainConfig, images: ImageSet, seed: int = EVALUATION_SEED) -> EpisodeSampler:
    """A fresh sampler of validation or test tasks."""
    return EpisodeSampler(images, config.ways, config.shots, config.queries, seed=seed)


def best_learner(folder: Path, config: TrainConfig, dataset: Dataset) -> MetaLearner:
    """The best weights of a run folder, with the rule of `config`, on the dataset's device."""
    learner = build_learner(config, dataset.train.shape)
    load_weights(folder / "best.safetensors", learner.model)
    return learner.to(dataset.test.images.device)


def evaluated(
    learner: MetaLearner,
    config: TrainConfig,
    images: ImageSet,
    tasks: int,
    seed: int = EVALUATION_SEED,
    between: Callable[[], object] = lambda: None,
) -> Tensor:
    """The accuracy on each of `tasks` test tasks, float `[tasks]`; see `evaluate`."""
    with precision(config.precision, images.images.device):
        return evaluate(learner, evaluation_sampler(config, images, seed), tasks, config.inner_steps, between)
