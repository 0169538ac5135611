"""Test runs of train_maml, several of them on the same tasks.

examples:
  eval_maml RUN --tasks 6000                 # accuracy with its 95 % interval
  eval_maml RUN1 RUN2 RUN3                   # the same tasks for all, and each paired difference
  eval_maml RUN --inner maml --inner-steps 3     # adapt in another way than in training
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from fewshot_asam.cli.surroundings import importing

with importing():
    from torch import Tensor

    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run
    from fewshot_asam.data import DATASETS, ImageSet
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.learners import MetaLearner
    from fewshot_asam.runtime import distributed
    from fewshot_asam.runtime.allocator import keep_freed_memory
    from fewshot_asam.training.announcements import result_text
    from fewshot_asam.training.build import load_data, resolve_device, test_images
    from fewshot_asam.training.checks import Asked, require_processes, require_seed, require_tasks
    from fewshot_asam.training.config import TrainConfig, with_rule
    from fewshot_asam.training.evaluation import interval, paired_difference
    from fewshot_asam.training.given import require_given
    from fewshot_asam.training.identity import data_digests, identify, require_same_everywhere, shared
    from fewshot_asam.training.processes import Processes, sharing
    from fewshot_asam.training.run_folder import stored_settings
    from fewshot_asam.training.trained import (
        WeightsName,
        ensemble,
        evaluated,
        processes_of_tests,
        trained_learner,
    )


@dataclass(frozen=True)
class EvalConfig:
    """Settings of a test; the docstrings are the command line's help."""

    tasks: int = 600
    """test tasks"""
    seed: int = 0
    """of the test tasks"""
    weights: WeightsName = "best"
    """those that were best on the validation tasks, or the last ones"""
    ensemble: int | None = None
    """the mean prediction of so many snapshots, those that were best on the validation tasks (--keep-snapshots)"""
    permutations: int = 1
    """the mean prediction of so many numberings of each task's classes"""
    inner: str | None = None
    """adapt with this rule instead of the one that the run was trained with"""
    inner_steps: int | None = None
    """adapt with so many inner steps instead of the run's"""
    inner_lr: float | None = None
    """adapt with this inner learning rate instead of the run's"""
    label_noise: float | None = None
    """replace this part of each task's support labels by another class of the task, instead of the run's part"""
    test_dataset: str | None = field(default=None, metadata={"choices": DATASETS})
    """test on the test classes of this dataset (of folder: on all classes) instead of the run's"""
    data_root: Path | None = None
    """folder that holds the dataset's files, if not where the run found them"""
    test_data_root: Path | None = None
    """folder that holds the files of test_dataset; data_root if not given"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""
    processes: Asked = "auto"
    """of one thread each that share the tasks on a CPU; auto goes by cores, memory and the length of the test"""


SAME_TASKS = ("dataset", "ways", "shots", "queries", "label_noise", "test_dataset")
"""Settings that runs must share to be tested on the same tasks."""
SAME_FOLDER = ("data_root", "image_size", "channels", "split_csv", "split_seed", "split_fractions")
"""What they must share besides, where the images are of a folder of one's own."""
CONDITIONS = ("inner", "inner_steps", "inner_lr", "label_noise", "test_dataset")
"""Settings that may make a test another one than the run was trained for."""
OVERRIDES = (*CONDITIONS, "data_root", "test_data_root")


def _trained_and_tested(folder: Path, test: EvalConfig) -> tuple[TrainConfig, TrainConfig]:
    """The settings a run was trained with, and those to test it with."""
    trained = stored_settings(folder)
    require_given(trained)
    changed = {name: getattr(test, name) for name in OVERRIDES if getattr(test, name) is not None}
    if test.inner_lr is not None and trained.learned_rates != "none":
        raise FewShotError(f"inner_lr is given, but {folder} has learned its inner rates; leave --inner-lr out")
    return trained, replace(with_rule(trained, test.inner or trained.inner), **changed)


def require_different(folders: Sequence[str]) -> None:
    """Raises `FewShotError` where a run is given twice."""
    if len({Path(folder).resolve() for folder in folders}) != len(folders):
        raise FewShotError("the same run was given twice; expected different ones")


def require_same_tasks(runs: dict[str, TrainConfig]) -> None:
    """Raises `FewShotError` where runs, by folder, were trained for different tasks and so cannot be compared."""
    (first, expected), *others = runs.items()
    for folder, config in others:
        for name in SAME_TASKS + (SAME_FOLDER if expected.dataset == "folder" else ()):
            if getattr(config, name) != getattr(expected, name):
                raise FewShotError(
                    f"{first} has {name} {getattr(expected, name)} and {folder} {getattr(config, name)}; runs that are "
                    "compared must share it"
                )


def _line(accuracies: Tensor, said_of: str, trained: TrainConfig, tested: TrainConfig) -> str:
    line = said_of + result_text(tested, interval(accuracies), len(accuracies))
    changed = {name: was for name in CONDITIONS if (was := getattr(trained, name)) != getattr(tested, name)}
    differences = ", ".join(f"{name} {'none' if was is None else was}" for name, was in changed.items())
    return line + (f", NOT as trained ({differences})" if changed else ", as trained")


def _weights(folder: Path, test: EvalConfig) -> Sequence[str]:
    """The weights that are tested: one file of the run, or those of an ensemble."""
    return [test.weights] if test.ensemble is None else ensemble(folder, test.ensemble)


def _what(test: EvalConfig) -> str:
    """What a result is of, where it is not of the best weights alone."""
    parts = [
        f"an ensemble of {test.ensemble} checkpoints" if test.ensemble else "",
        f"the {test.weights} weights" if test.weights != "best" and not test.ensemble else "",
        f"the mean over {test.permutations} numberings of the classes" if test.permutations > 1 else "",
    ]
    said = ", ".join(filter(None, parts))
    return f"of {said} " if said else ""


def _processes(learner: MetaLearner, config: TrainConfig, images: ImageSet, test: EvalConfig, tests: int) -> Processes:
    """How many are to share the tasks of so many tests like that of `learner`; said beside the results, not in them."""
    total = test.tasks * test.permutations * tests
    chosen = processes_of_tests(learner, config, images, test.tasks, total, test.processes)
    if distributed.size() == 1:
        print(chosen.text, file=sys.stderr, flush=True)
    return chosen


def _accuracies(
    members: Sequence[MetaLearner], config: TrainConfig, images: ImageSet, test: EvalConfig, processes: Processes
) -> Tensor:
    """Of a run's learner, or of its ensemble, whose members take turns with the cores."""
    with ExitStack() as shared:
        for member in members:
            shared.enter_context(sharing(member, processes))
        return evaluated(members, config, images, test.tasks, test.seed, permutations=test.permutations)


def command(argv: Sequence[str]) -> None:
    """Parses the arguments, tests the runs one after another and prints a line for each and for each pair."""
    parser = Parser(prog="eval_maml", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    add_settings(parser, EvalConfig)
    given: Any = parse(parser, argv)
    test = EvalConfig(**{one.name: given[one.name] for one in fields(EvalConfig)})
    require_tasks("tasks", test.tasks)
    require_seed("seed", test.seed)
    require_processes(test.processes)
    settings = {folder: _trained_and_tested(Path(folder), test) for folder in given.runs}
    require_different(given.runs)
    to_test = {folder: pair[1] for folder, pair in settings.items()}
    require_same_tasks(to_test)
    require_same_everywhere({"the number of runs": len(to_test), "tasks": test.tasks, "seed": test.seed})
    for config in to_test.values():
        require_same_everywhere(shared(config))
    keep_freed_memory()
    device, first_run = resolve_device(test.device), next(iter(to_test.values()))
    dataset = distributed.one_a_machine_first(lambda: load_data(first_run, device))
    identity = identify(first_run, dataset)
    require_same_everywhere(data_digests(identity))
    learners = {
        folder: [
            trained_learner(Path(folder), tested, dataset, identity.of(trained), which)
            for which in _weights(Path(folder), test)
        ]
        for folder, (trained, tested) in settings.items()
    }
    images = distributed.one_a_machine_first(lambda: test_images(first_run, dataset))
    first, tests = next(iter(learners)), sum(map(len, learners.values()))
    processes = _processes(learners[first][0], to_test[first], images, test, tests)
    accuracies: dict[str, Tensor] = {}
    for folder, config in to_test.items():
        accuracies[folder] = _accuracies(learners[folder], config, images, test, processes)
        distributed.print_rank0(f"{folder}: test accuracy {_line(accuracies[folder], _what(test), *settings[folder])}")
    for first, second in combinations(accuracies, 2):
        difference = paired_difference(accuracies[first], accuracies[second])
        distributed.print_rank0(f"{first} minus {second}: {difference} (paired, the same {test.tasks} tasks)")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
