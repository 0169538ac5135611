"""What changes while training: made from settings, stored in a checkpoint, restored from one."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewshot_asam.data import Dataset, ImageSet
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.distributed import PeerLost
from fewshot_asam.runtime.yaml_settings import filled
from fewshot_asam.training import meta_step
from fewshot_asam.training.build import build_learner, training_images
from fewshot_asam.training.checkpoint import (
    SNAPSHOTS,
    Weights,
    decode,
    read_state,
    require_storable,
    save_state,
    save_weights,
    weights,
)
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.foreign_model import require_logits
from fewshot_asam.training.given import Given
from fewshot_asam.training.identity import Identity, identify, require_same
from fewshot_asam.training.initial_weights import begin_from
from fewshot_asam.training.processes import Processes
from fewshot_asam.training.progress import Progress
from fewshot_asam.training.schedules import step_weights
from fewshot_asam.training.stored_tensors import Holders
from fewshot_asam.version import __version__


class Diverged(FewShotError):
    """A loss or a meta-gradient is not finite."""


@dataclass
class TrainState:
    """All that changes while training, and what it needs."""

    config: TrainConfig
    dataset: Dataset
    identity: Identity
    learner: MetaLearner
    train_tasks: EpisodeSampler
    test_images: ImageSet
    optimizer: torch.optim.Optimizer
    iterate: meta_step.Iteration
    folder: Path = Path()
    processes: Processes = field(default_factory=lambda: Processes(1, "not chosen yet"))
    """those that share the tasks"""
    progress: Progress = field(default_factory=Progress)
    best: Weights = field(default_factory=dict)
    unlogged: Tensor = field(default_factory=lambda: torch.empty(0, 3, device="cpu"))
    """`[n, 3]`: loss, accuracy and norm of iterations that `metrics.jsonl` does not speak of yet"""
    unread: list[Tensor] = field(default_factory=list)
    """the same of later iterations, `[3]` each and still on the device"""
    spent: float = 0.0
    """the part of `max_minutes` that is over"""
    schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)

    def __post_init__(self) -> None:
        self._first_order = self.learner.first_order
        self._kind = (self._first_order, True)
        self._schedule()

    def _schedule(self) -> None:
        self.schedule = meta_step.schedule(self.optimizer, self.config, self.progress.iteration, lambda: self.spent)

    @property
    def holders(self) -> Holders:
        """What its tensors are in."""
        return Holders(self.learner, self.optimizer, self.train_tasks)

    @property
    def finished(self) -> bool:
        """Whether all iterations are done, or all minutes spent."""
        return self.progress.iteration >= self.config.iterations or self.spent >= 1

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.learner.parameters()).device

    def train_step(self) -> None:
        """One meta-batch and its step, waiting for nothing. If another process is lost meanwhile, it has not begun.

        What a model draws itself, as dropout does, depends on the seed, the iteration and the number of the process.
        """
        before = self.train_tasks.state_dict()
        torch.manual_seed(_seed_of(self.config.seed, self.progress.iteration, distributed.rank()))
        try:
            episodes = self.train_tasks.sample(self.config.meta_batch_size)
            self.unread.append(self.iterate(self.learner.batch(episodes, self.train_tasks.augmentation, self._phase())))
        except PeerLost:
            self.train_tasks.load_state_dict(before)
            raise
        self.schedule.step()
        self.progress.iteration += 1

    def _phase(self) -> list[float] | None:
        """The weights of the inner steps in the next iteration, if any; where a phase ends, recording begins anew."""
        config, done = self.config, self.progress.iteration
        first_order = self._first_order or done < config.first_order_iterations
        weights = None
        if done < config.multi_step_iterations:
            weights = step_weights(config.inner_steps, done / config.multi_step_iterations)
        kind = (first_order, weights is None)
        if kind != self._kind:
            self._kind, self.learner.first_order = kind, first_order
            self.iterate = meta_step.iteration(self.learner, self.optimizer, config)
        return weights

    def read(self) -> Tensor:
        """The unlogged numbers, with those that were on the device; raises `Diverged` where one is not finite."""
        if self.unread:
            self.unlogged = torch.cat([self.unlogged, torch.stack(self.unread).cpu()])
            self.unread = []
        numbers = self.unlogged
        bad = (~numbers.isfinite()).any(1).nonzero()
        if len(bad) == 0:
            return numbers
        loss, _, norm = numbers[int(bad[0])].tolist()
        raise Diverged(
            f"the query loss is {loss:g} and the meta-gradient's norm {norm:g} at iteration "
            f"{self.progress.iteration - len(numbers) + int(bad[0]) + 1}; the likely cause is {_rates(self.config)} "
            f"that is too large: lower it or set clip_grad. {self.last_saved()}"
        )

    def save(self) -> None:
        """Writes a checkpoint, the first process for all."""
        self.read()
        if distributed.is_first():
            save_state(self.folder, self.progress.iteration, self._state())
            self._save_weights("last", weights(self.learner))

    def keep_best(self) -> None:
        """Remembers the present weights as the best ones."""
        self.best = weights(self.learner)
        if distributed.is_first():
            self._save_weights("best", self.best)

    def keep_snapshot(self) -> None:
        """Writes the present weights into the folder of snapshots, where that is wanted."""
        if self.config.keep_snapshots and distributed.is_first():
            (self.folder / SNAPSHOTS).mkdir(exist_ok=True)
            self._save_weights(f"{SNAPSHOTS}/{self.progress.iteration:010d}", weights(self.learner))

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint of the folder, if it has one; writes nothing."""
        data, name = distributed.broadcast(distributed.all_succeed(self._stored))
        if data:
            distributed.all_succeed(lambda: self._load(decode(data, name), name))

    def rewrite(self) -> None:
        """Writes the weights of the restored checkpoint anew, as files may be of a life of the run that was lost.

        Snapshots of such a life are removed.
        """
        if not distributed.is_first():
            return
        for snapshot in (self.folder / SNAPSHOTS).glob("*.safetensors"):
            if snapshot.stem.isdigit() and int(snapshot.stem) > self.progress.validated:
                snapshot.unlink()
        if self.progress.iteration:
            self._save_weights("last", weights(self.learner))
            if self.best:
                self._save_weights("best", self.best)

    def last_saved(self) -> str:
        """Where a run that cannot go on was saved last, in words."""
        saved = self.folder / "last.safetensors"
        return f"The last good checkpoint is {saved}" if saved.exists() else "No checkpoint had been written yet"

    def _stored(self) -> tuple[bytes, str]:
        if not distributed.is_first():
            return b"", ""
        data, name = read_state(self.folder)
        left = [path for path in map(self.folder.joinpath, ("last.safetensors", "summary.json")) if path.exists()]
        if left and not data:
            raise FewShotError(
                f"{left[0]} is of a run whose checkpoints are gone, so it cannot go on; put them back, or start a new "
                "run in another folder"
            )
        return data, name

    def _save_weights(self, name: str, values: Weights) -> None:
        save_weights(self.folder / f"{name}.safetensors", values, self.identity.to_json())

    def _state(self) -> dict[str, Any]:
        """Everything that the next iteration and the lines of metrics depend on."""
        return {
            "package_version": __version__,
            "identity": asdict(self.identity),
            "progress": vars(self.progress),
            "tensors": self.holders.tensors(self.best, self.unlogged),
        }

    def _load(self, state: dict[str, Any], name: str) -> None:
        """Goes on from a decoded state; raises `FewShotError` naming it where it is none of this run."""
        made_by = filled(Identity, state.get("identity"), f"{name}: what made the run")
        require_same(self.identity, made_by, name)
        if made_by.images != self.identity.images:
            raise FewShotError(
                f"{name} was made with other images of the same classes; use the data that the run was trained on, or "
                "start a new run"
            )
        progress = filled(Progress, state.get("progress"), f"{name}: progress")
        tensors: Weights = state["tensors"]
        try:
            if int(Path(name).stem) != progress.iteration:
                raise ValueError(f"it is of iteration {progress.iteration}")
            if problem := progress.problem() or self.holders.problem(tensors, progress):
                raise ValueError(problem)
            self.best, self.unlogged = self.holders.put_back(tensors, progress)
            self.progress = progress
            self.spent = progress.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
            self._schedule()
        except (ValueError, RuntimeError) as error:
            raise FewShotError(
                f"{name} is not of a run with these settings, this package ({__version__}) and this kind of device "
                f"({' '.join(str(error).split())})"
            ) from error


def _seed_of(*numbers: int) -> int:
    """A seed for the global random numbers, of which near ones have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def _rates(config: TrainConfig) -> str:
    """The settings that make a run diverge, in words."""
    if "learner" in config.from_python:
        return f"an inner learning rate or a meta_lr ({config.meta_lr:g})"
    return f"an inner_lr ({config.inner_lr:g}), rho ({config.rho:g}) or meta_lr ({config.meta_lr:g})"


def build(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    given: Given | None = None,
    test_images: ImageSet | None = None,
) -> TrainState:
    """A training that has done nothing yet, of what was given in Python and else of what the settings name.

    - `test_images`: what it is tested on, if not the dataset's own.

    Raises `FewShotError` where there are more processes than tasks and where the learner's state cannot be stored.
    """
    given = given or Given()
    if given.learner is not None:
        require_logits(given.learner, config, dataset.train.shape)
    learner = (given.learner or build_learner(config, dataset.train.shape, given.model)).to(device)
    begin_from(config, learner)
    require_storable(learner)
    images, tasks = training_images(config, dataset), (config.ways, config.shots, config.queries)
    train_tasks = EpisodeSampler(images, *tasks, seed=config.seed, label_noise=config.label_noise)
    if config.meta_batch_size < distributed.size():
        raise FewShotError(
            f"meta_batch_size is {config.meta_batch_size}, which leaves some of the {distributed.size()} processes "
            "without a task; start at most as many processes as there are tasks"
        )
    optimizer = meta_step.optimizer(learner, config)
    iterate = meta_step.iteration(learner, optimizer, config)
    identity = identify(config, dataset)
    tested = dataset.test if test_images is None else test_images
    return TrainState(config, dataset, identity, learner, train_tasks, tested, optimizer, iterate)
