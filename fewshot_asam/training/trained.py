"""What a run has trained: its weights in a learner again, alone or as an ensemble, and their accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fewshot_asam.data import Dataset
from fewshot_asam.data.images import ImageSet
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.checkpoint import SNAPSHOTS, put_weights, read_weights
from fewshot_asam.training.checks import Asked
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import TASKS_AT_ONCE, evaluate
from fewshot_asam.training.identity import Identity, from_json, require_same
from fewshot_asam.training.metrics import read_metrics
from fewshot_asam.training.processes import Processes, choose

EVALUATION_SEED = 0
"""Of the validation and test tasks: the same for every run, whatever its own seed."""
WeightsName = Literal["best", "last"]
"""Weights of a run folder: those that were best on the validation tasks, or those after the last iteration."""


def evaluation_sampler(config: TrainConfig, images: ImageSet, seed: int = EVALUATION_SEED) -> EpisodeSampler:
    """A fresh sampler of validation or test tasks."""
    noise = config.label_noise
    return EpisodeSampler(images, config.ways, config.shots, config.queries, seed=seed, label_noise=noise)


def trained_learner(
    folder: Path, config: TrainConfig, dataset: Dataset, made_by: Identity, which: str = "best"
) -> MetaLearner:
    """The `best` or `last` weights of a run folder, or a snapshot, with the rule of `config`, on the dataset's device.

    Raises `FewShotError` where they were made by other settings or classes than `made_by`, and warns of other images.
    """
    file = folder / f"{which}.safetensors"
    trained, text = read_weights(file)
    stored = from_json(text, str(file))
    require_same(made_by, stored, str(file))
    steps = made_by.settings.get("inner_steps", config.inner_steps)  # for which rates may have been learned
    learner = build_learner(replace(config, inner_steps=steps), dataset.train.shape)
    put_weights(trained, learner, str(file))
    if stored.images != made_by.images:
        warnings.warn(f"{file} was made with other images of the same classes than it is tested on", stacklevel=2)
    return learner.to(dataset.test.images.device)


def ensemble(folder: Path, members: int) -> list[str]:
    """The snapshots of a run folder that did best on the validation tasks, as names of weights, the best first.

    Raises `FewShotError` where there are not so many.
    """
    kept = {int(file.stem) for file in (folder / SNAPSHOTS).glob("*.safetensors") if file.stem.isdigit()}
    rows = {row["iteration"]: row["val_accuracy"] for row in read_metrics(folder) if "val_accuracy" in row}
    ranked = sorted(kept & rows.keys(), key=lambda iteration: -rows[iteration])
    if not 1 <= members <= len(ranked):
        raise FewShotError(
            f"ensemble is {members}, but {folder} has {len(ranked)} snapshots of its validations; expected 1 to that "
            "many: train with --keep-snapshots true, and --validate-every for more of them"
        )
    return [f"{SNAPSHOTS}/{iteration:010d}" for iteration in ranked[:members]]


def processes_of_tests(
    learner: MetaLearner, config: TrainConfig, images: ImageSet, tasks: int, total: int, asked: Asked = "auto"
) -> Processes:
    """How many processes are to share the tasks of a test, of so many in all; see `processes.choose`."""
    few = 2 if config.validation == "other_task" else 1
    device, at_once = images.images.device, min(tasks, TASKS_AT_ONCE)
    return choose(asked, device, at_once, total, False, lambda: evaluated(learner, config, images, few))


def evaluated(
    learner: MetaLearner | Sequence[MetaLearner],
    config: TrainConfig,
    images: ImageSet,
    tasks: int,
    seed: int = EVALUATION_SEED,
    between: Callable[[], object] = lambda: None,
    permutations: int = 1,
) -> Tensor:
    """The accuracy on each of `tasks` test tasks, float `[tasks]`; see `evaluate`."""
    with precision(config.precision, images.images.device):
        sampler = evaluation_sampler(config, images, seed)
        return evaluate(learner, sampler, tasks, config.inner_steps, between, permutations=permutations)
