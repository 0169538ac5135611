"""What changes while training: made from settings, stored in a checkpoint, restored from one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewshot_asam.data import Dataset
from fewshot_asam.data.images import ImageSet
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.distributed import PeerLost
from fewshot_asam.runtime.yaml_settings import filled
from fewshot_asam.training import meta_step
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.checkpoint import (
    Weights,
    decode,
    not_finite,
    put_weights,
    read_state,
    read_weights,
    save_state,
    save_weights,
    weights,
)
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import evaluate
from fewshot_asam.training.identity import Identity, from_json, identify, require_same
from fewshot_asam.training.metrics import MEASURED
from fewshot_asam.training.progress import Progress
from fewshot_asam.version import __version__

EVALUATION_SEED = 0
"""Of the validation and test tasks: the same for every run, whatever its own seed."""
WeightsName = Literal["best", "last"]
"""Weights of a run folder: those that were best on the validation tasks, or those after the last iteration."""
MOST_STEPS = 2**24
"""The optimiser counts its steps in single precision, which ends here."""


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
    optimizer: torch.optim.Optimizer
    iterate: meta_step.Iteration
    folder: Path = Path()
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
        self._schedule()

    def _schedule(self) -> None:
        self.schedule = meta_step.schedule(self.optimizer, self.config, self.progress.iteration, lambda: self.spent)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.learner.parameters()).device

    def train_step(self) -> None:
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
            self._save_weights("last", weights(self.learner.model))

    def keep_best(self) -> None:
        """Remembers the present weights as the best ones."""
        self.best = weights(self.learner.model)
        if distributed.is_first():
            self._save_weights("best", self.best)

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint of the folder, if it has one; writes nothing."""
        data, name = distributed.broadcast(distributed.all_succeed(self._stored))
        if data:
            distributed.all_succeed(lambda: self._load(decode(data, name), name))

    def rewrite(self) -> None:
        """Writes the weights of the restored checkpoint anew, as files may be of a life of the run that was lost."""
        if distributed.is_first() and self.progress.iteration:
            self._save_weights("last", weights(self.learner.model))
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
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            **_prefixed("model", self.learner.model.state_dict()),
            **_prefixed("best", self.best),
            **_prefixed("tasks", self.train_tasks.state_dict()),
            **{name: value for i in moments for name, value in _prefixed(f"optimizer/{i}", moments[i]).items()},
            "unlogged": self.unlogged,
        }
        return {
            "package_version": __version__,
            "identity": asdict(self.identity),
            "progress": vars(self.progress),
            "tensors": {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()},
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
            if problem := progress.problem() or self._unlike(tensors, progress):
                raise ValueError(problem)
            self.progress, self.unlogged, self.best = progress, tensors["unlogged"], _below("best", tensors)
            self.learner.model.load_state_dict(_below("model", tensors))
            self.train_tasks.load_state_dict(_below("tasks", tensors))
            moments = {i: _below(f"optimizer/{i}", tensors) for i in self._parameters(progress)}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.spent = progress.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
            self._schedule()
        except (ValueError, RuntimeError) as error:
            raise FewShotError(
                f"{name} is not of a run with these settings, this package ({__version__}) and this kind of device "
                f"({' '.join(str(error).split())})"
            ) from error

    def _unlike(self, tensors: Weights, progress: Progress) -> str:
        """What is wrong with the tensors of a state with this progress; empty where nothing is."""
        rows = (*tensors.get("unlogged", self.unlogged).shape, 0)[0]
        model, moments = weights(self.learner.model), self._parameters(progress)
        expected = {"unlogged": self.unlogged.new_empty(min(rows, progress.iteration), 3)}
        expected |= _prefixed("model", model) | _prefixed("best", model if progress.best_iteration else {})
        expected |= _prefixed("tasks", self.train_tasks.state_dict())
        for index, parameter in moments.items():
            state = {"step": parameter.new_empty(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            expected |= _prefixed(f"optimizer/{index}", state)
        for name in expected.keys() ^ tensors.keys():
            return f"{name} is {'missing' if name in expected else 'unknown'}"
        for name, like in expected.items():
            if (found := tensors[name]).shape != like.shape or found.dtype != like.dtype:
                return f"{name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}"
        if bad := not_finite(tensors):
            return f"{bad} has numbers that are not finite"
        unlogged, most = tensors["unlogged"], MEASURED["train_accuracy"][1]
        if bool((unlogged < 0).any() or (unlogged[:, 1] > most).any()):
            return "unlogged has a loss, an accuracy or a norm that cannot be"
        for index in moments:
            if tensors[f"optimizer/{index}/step"].item() != min(progress.iteration, MOST_STEPS):
                return f"optimizer/{index}/step is not the iteration"
            if bool((tensors[f"optimizer/{index}/exp_avg_sq"] < 0).any()):
                return f"optimizer/{index}/exp_avg_sq has squares below 0"
        return ""

    def _parameters(self, progress: Progress) -> dict[int, Tensor]:
        """The parameters, by number, of which the optimiser has a state then."""
        return dict(enumerate(p.detach() for p in self.learner.parameters())) if progress.iteration else {}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Weights:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Weights:
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def build(config: TrainConfig, dataset: Dataset, device: torch.device) -> TrainState:
    """A training that has done nothing yet. Raises `FewShotError` where there are more processes than tasks."""
    learner = build_learner(config, dataset.train.shape).to(device)
    train_tasks = EpisodeSampler(dataset.train, config.ways, config.shots, config.queries, seed=config.seed)
    if config.meta_batch_size < distributed.size():
        raise FewShotError(
            f"meta_batch_size is {config.meta_batch_size}, which leaves some of the {distributed.size()} processes "
            "without a task; start at most as many processes as there are tasks"
        )
    optimizer = meta_step.optimizer(learner, config)
    iterate = meta_step.iteration(learner, optimizer, config)
    identity = identify(config, dataset)
    return TrainState(config, dataset, identity, learner, train_tasks, optimizer, iterate)


def evaluation_sampler(config: TrainConfig, images: ImageSet, seed: int = EVALUATION_SEED) -> EpisodeSampler:
    """A fresh sampler of validation or test tasks."""
    return EpisodeSampler(images, config.ways, config.shots, config.queries, seed=seed)


def trained_learner(
    folder: Path, config: TrainConfig, dataset: Dataset, made_by: Identity, which: WeightsName = "best"
) -> MetaLearner:
    """The best or last weights of a run folder, with the rule of `config`, on the dataset's device.

    Raises `FewShotError` where they were made by other settings or classes than `made_by`, and warns of other images.
    """
    file = folder / f"{which}.safetensors"
    trained, text = read_weights(file)
    stored = from_json(text, str(file))
    require_same(made_by, stored, str(file))
    learner = build_learner(config, dataset.train.shape)
    put_weights(trained, learner.model, str(file))
    if stored.images != made_by.images:
        warnings.warn(f"{file} was made with other images of the same classes than it is tested on", stacklevel=2)
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
