"""Everything that defines a training run, each setting with its default and unit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fewshot_asam.data import DATASETS
from fewshot_asam.engine import EngineName
from fewshot_asam.engine.precision import Precision
from fewshot_asam.episodes import require_part
from fewshot_asam.errors import FewShotError
from fewshot_asam.models.initialisation import Init
from fewshot_asam.rules import Rule, rule_class
from fewshot_asam.rules.validation_sets import Validation
from fewshot_asam.runtime.yaml_settings import (
    END,
    conforming,
    explained,
    is_whole,
    read_yaml,
    require_known,
    require_plain,
)
from fewshot_asam.training import checks
from fewshot_asam.training.evaluation import TASKS_AT_ONCE
from fewshot_asam.verification.settings import Norm

Part = Literal["model", "learner", "dataset"]
"""What a run is made of and can be given in Python."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the docstrings are the command line's help."""

    inner: str = "agnostic_sam"
    """rule of the lower level (inner loop): maml, sharp_maml_low, agnostic_sam, or one of your own,
    package.module:Rule, whose fields are options too"""
    ways: int = 5
    """classes in a task, N"""
    shots: int = 1
    """support images of each class, K"""
    queries: int = 15
    """query images of each class, Q"""

    dataset: str = field(default="glyphs", metadata={"choices": DATASETS})
    """where the images come from; glyphs needs no download"""
    data_root: Path | None = None
    """folder that holds the dataset's files; without it they are downloaded where that is possible"""
    image_size: int = 84
    """side of the images of dataset folder, in pixels"""
    split_csv: Path | None = None
    """class,split table for dataset folder; without it classes are split by split_seed"""
    split_seed: int = 0
    """of the class split of dataset folder"""
    split_fractions: tuple[float, float, float] = (0.64, 0.16, 0.2)
    """parts of dataset folder's classes for training, validation and test"""
    channels: Literal[1, 3] = 3
    """of the images of dataset folder: 1 for grey, 3 for colour"""
    train_classes: int | None = None
    """train on so many of the training classes, chosen by seed, instead of all"""
    label_noise: float = 0.0
    """part of each task's support labels that are replaced by another class of the task, in training, validation and
    test (eval_maml has its own); queries keep their labels"""
    test_dataset: str | None = field(default=None, metadata={"choices": DATASETS})
    """test on the test classes of another dataset (of folder: on all classes), its images squashed to the run's size
    and channels"""
    test_data_root: Path | None = None
    """folder that holds the files of test_dataset; data_root if not given"""

    model: str = "conv4"
    """network: conv4, resnet12, or package.module:factory, a function of ways and image shape that returns one"""
    hidden: int = 32
    """filters of the first block of conv4 and resnet12"""
    init: Init = "pytorch"
    """initial weights of conv4 and resnet12: PyTorch's own (pytorch), Glorot's uniform ones (xavier), or a truncated
    normal of 0.02"""
    head_init: Literal["default", "zeros", "zeros_every_task"] = "zeros_every_task"
    """the head starts like the other layers, from zeros, or anew from zeros in every task, tests included"""
    init_from: Path | None = None
    """begin from the weights of another run: its folder, for the best ones, or a file of weights"""
    init_digest: str | None = None
    """first 16 digits of the SHA-256 of the weights of init_from; filled in, or required where it is given"""
    norm: Norm = "transductive"
    """norm layers use the queries' own batch statistics (transductive) or the support set's (inductive)"""

    inner_lr: float = 0.4
    """inner learning rate, alpha"""
    inner_steps: int = 1
    """inner steps, in training and testing"""
    rho: float = 5e-4
    """radius of the perturbation"""
    rho1: float | None = None
    """Agnostic-SAM's radius on the training gradient; 2 * rho if not given"""
    rho2: float | None = None
    """Agnostic-SAM's radius on the validation gradient; rho if not given"""
    validation: Validation = "duplicate"
    """lower-level validation set: the support set again, an augmented copy, a held-out part of it, on which no
    rule then trains, or the queries of another task of the batch, in tests too (with duplicate, Agnostic-SAM differs
    from Sharp-MAML_low of radius rho only by a term of order rho squared)"""
    val_grad_point: Literal["perturbed", "current"] = "perturbed"
    """where the validation gradient of equation (5) is taken"""
    val_norm: Literal["own", "current"] = "own"
    """by which norm the validation gradient of equation (5) is divided"""
    through_perturbation: bool = True
    """the meta-gradient flows through the perturbation (false: the cheap form)"""
    beta: float = 0.0
    """momentum of the validation gradient over the inner steps of a task"""
    adaptive: bool = False
    """ASAM: scale each parameter's perturbation by its magnitude (its radius is about ten times SAM's)"""
    adapt: tuple[str, ...] | str = "all"
    """parameters that the inner loop changes: all (MAML), head (ANIL), body (BOIL), no_norm, or patterns of names such
    as head.*"""
    first_order: bool = False
    """first-order meta-gradients (FOMAML)"""
    learned_rates: Literal["none", "tensor", "element", "layer_and_step"] = "none"
    """inner learning rates that are learned, inner_lr being their first value: one a parameter tensor, one an element
    (Meta-SGD), or one a layer and step (MAML++)"""

    iterations: int = 600
    """meta-batches to train on"""
    max_minutes: float | None = None
    """stop training after so many minutes, whatever is left of the iterations"""
    meta_batch_size: int = 4
    """tasks in a meta-batch, T"""
    meta_lr: float = 2e-3
    """learning rate of Adam at the upper level"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """course of meta_lr; cosine falls to 0 at the last iteration, or at the end of max_minutes if that comes first
    (resumed with more iterations it is stretched)"""
    first_order_iterations: int = 0
    """meta-gradients are of first order for so many iterations (MAML++)"""
    multi_step_iterations: int = 0
    """for so many iterations the losses after all inner steps count, in the end the last one alone (MAML++)"""
    outer_rho: float = 0.0
    """radius of SAM at the upper level: with maml Sharp-MAML_up, with sharp_maml_low Sharp-MAML_both"""
    clip_grad: float | None = None
    """largest norm of the meta-gradient"""
    validate_every: int = 100
    """iterations between two validations; the best one's weights are kept"""
    validate_tasks: int = 100
    """tasks of a validation, the same ones each time"""
    congruence_tasks: int = 0
    """tasks of each validation on which the congruence of training and validation gradients is recorded; 0 for none"""
    test_tasks: int = 600
    """tasks of the test after training"""
    checkpoint_every: int = 100
    """iterations between two checkpoints"""
    keep_snapshots: bool = False
    """keep the weights of every validation, for eval_maml --ensemble"""

    seed: int = 0
    """of the initial weights and the training tasks"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""
    processes: checks.Asked = "auto"
    """of one thread each that share the tasks on a CPU; auto goes by cores, tasks, memory and the length of the run"""
    engine: EngineName = "auto"
    """tasks one by one (loop) or vectorised (vmap); auto goes by device and model, and times both on a CPU"""
    torch_compile: bool = False
    """compile the inner gradient and the query loss for training (torch.compile)"""
    recompute: bool = False
    """run each inner step anew in the backward pass: memory that does not grow with the number of steps"""
    cuda_graph: bool = True
    """on a GPU, record the whole iteration once and replay it"""
    precision: Precision = "float32"
    """of convolutions and matrix products: float32, tf32 (GPU), bfloat16 (autocast)"""
    output_dir: Path | None = None
    """run folder; if not given, a new one under runs/"""
    inner_settings: dict[str, Any] = field(default_factory=dict, metadata={"flag": False})
    """settings of a rule of your own, by name"""
    from_python: tuple[Part, ...] = field(default=(), metadata={"flag": False})
    """what was given to `train` in Python, so that no name stands for it; `train` fills this in"""

    def __post_init__(self) -> None:
        kinds = _kinds()
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and one.default is not None:
                raise FewShotError(f"{one.name} is null; expected a value such as {one.default}")
            object.__setattr__(self, one.name, conforming(one.name, value, kinds[one.name]))
        if "dataset" not in self.from_python:
            checks.require_dataset(self.dataset)
        if self.test_dataset is not None:
            checks.require_dataset(self.test_dataset, "test_dataset")
        if self.train_classes is not None:
            checks.require_count("train_classes", self.train_classes, self.ways)
        require_part(self.label_noise)
        if "learner" not in self.from_python:
            checks.require_model(self.model, self.init)
        object.__setattr__(self, "adapt", checks.adapt_patterns(self.adapt))
        for name in COUNTS:
            checks.require_count(name, getattr(self, name))
        for name in ("image_size", "hidden", "inner_steps", "meta_batch_size"):
            if getattr(self, name) > checks.LARGEST_SIZE:
                raise FewShotError(f"{name} is {getattr(self, name)}; expected at most {checks.LARGEST_SIZE:,}")
        for name in ("validate_tasks", "test_tasks"):
            checks.require_tasks(name, getattr(self, name))
        for name in ("congruence_tasks", "first_order_iterations", "multi_step_iterations"):
            checks.require_count(name, getattr(self, name), 0)
        if self.ways < 2:
            raise FewShotError(f"ways is {self.ways}; expected at least 2")
        for name in ("inner_lr", "meta_lr", "clip_grad", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < checks.LARGEST_RATE:
                raise FewShotError(f"{name} is {value}; expected a number above 0 and below {checks.LARGEST_RATE:g}")
        if self.outer_rho < 0:
            raise FewShotError(f"outer_rho is {self.outer_rho}; expected a radius of at least 0")
        for name in ("rho", "rho1", "rho2", "outer_rho"):
            if (getattr(self, name) or 0) >= checks.LARGEST_RATE:
                raise FewShotError(f"{name} is {getattr(self, name)}; expected a radius below {checks.LARGEST_RATE:g}")
        for name in ("data_root", "split_csv", "test_data_root", "init_from", "output_dir"):
            checks.require_writable(name, str(getattr(self, name)))
        for name in FOLDER_ONLY:
            if self.dataset != "folder" and getattr(self, name) != getattr(TrainConfig, name):
                raise FewShotError(f"{name} is given, but dataset is {self.dataset!r}; it is of dataset folder alone")
        if self.validation == "split" and self.shots < 2:
            raise FewShotError("validation 'split' with 1 shot leaves nothing to train on; expected at least 2 shots")
        if self.validation == "split" and self.label_noise:
            raise FewShotError(
                "validation 'split' holds out shots of each class by their labels, which label_noise makes wrong; "
                "expected one of the two"
            )
        if self.validation == "other_task":
            checks.require_count("meta_batch_size, with validation 'other_task',", self.meta_batch_size, 2)
            for name in ("validate_tasks", "test_tasks"):
                if getattr(self, name) % TASKS_AT_ONCE == 1:
                    raise FewShotError(
                        f"{name} is {getattr(self, name)}, of which the last is drawn alone ({TASKS_AT_ONCE} at a "
                        "time), and validation 'other_task' needs another beside it; ask for one task more"
                    )
        for name in ("seed", "split_seed"):
            checks.require_seed(name, getattr(self, name))
        checks.require_processes(self.processes)
        self.rule  # noqa: B018  its own checks

    @property
    def rule(self) -> Rule:
        """The lower-level rule with its settings: this class's own and, for somebody's rule, `inner_settings`.

        A rule of somebody's takes from this class what is not as by default.
        """
        kind, own = rule_class(self.inner), ":" not in self.inner
        hints, usual = get_type_hints(kind), {one.name: one.default for one in fields(TrainConfig)}
        names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
        require_known(self.inner_settings, () if own else names, f"inner_settings of {self.inner}")
        said = {
            name: getattr(self, name) for name in names if name in usual and (own or getattr(self, name) != usual[name])
        } | self.inner_settings
        return kind(**{name: conforming(name, value, hints[name]) for name, value in said.items()})

    @property
    def rule_text(self) -> str:
        """The rule with its radius, and every setting and start that is not as usual; a learner that was given."""
        if "learner" in self.from_python:
            return self.model
        usual, rule = TrainConfig(), self.rule
        radius = f" of rho {rule.rho:g}" if hasattr(rule, "rho") else ""
        said = {one.name: getattr(rule, one.name) for one in fields(rule) if one.name != "rho"}  # type: ignore[arg-type]
        said = {name: value for name, value in said.items() if value != getattr(usual, name, None)}
        names = [*("first_order", "first_order_iterations", "learned_rates", "multi_step_iterations", "outer_rho")]
        names += ["validation", "adapt", "init", "head_init", "init_digest", "train_classes", "label_noise"]
        names += ["test_dataset"]
        said |= {name: getattr(self, name) for name in names if getattr(self, name) != getattr(usual, name)}
        words = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in said.items()}
        return ", ".join([self.inner + radius, *(f"{name} {value}" for name, value in words.items())])

    @property
    def title(self) -> str:
        """The run in a few words, fit for a file name."""
        rule = self.model.partition("(")[0] if "learner" in self.from_python else self.inner.rpartition(":")[2]
        return re.sub(r"[^\w.-]+", "-", f"{self.dataset}-{self.ways}w{self.shots}s-{rule}-seed{self.seed}")


def with_rule(config: TrainConfig, inner: str) -> TrainConfig:
    """The settings with another rule, which takes over what this class holds."""
    return config if inner == config.inner else replace(config, inner=inner, inner_settings={})


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


GROUPS = {
    "inner": "task",
    "dataset": "data",
    "model": "network",
    "inner_lr": "inner loop",
    "iterations": "training",
    "seed": "machine and run folder",
}
"""The titles of the settings' groups in the help, each by the first setting of its group."""
COUNTS = (
    *("ways", "shots", "queries", "image_size", "hidden", "inner_steps"),
    *("iterations", "meta_batch_size", "validate_every", "checkpoint_every"),
)
"""Settings that count something, of which there must be one at least."""


OF_THE_LEARNER = (
    *("inner", "inner_lr", "rho", "rho1", "rho2", "val_grad_point", "val_norm", "through_perturbation", "beta"),
    *("adaptive", "first_order", "learned_rates", "adapt", "validation", "norm", "hidden", "init", "head_init"),
    *("engine", "torch_compile", "recompute"),
)
"""Settings that a learner which was given in Python has itself: no file of such a run holds them."""
FOLDER_ONLY = ("image_size", "split_csv", "split_seed", "split_fractions", "channels")
"""Settings that no other dataset heeds."""


PLACES = ("data_root", "split_csv", "test_data_root", "init_from")
"""Settings that say where files are, as whole paths in what is stored."""


def is_flag(setting: dataclasses.Field[Any]) -> bool:
    """Whether a setting can be given on a command line."""
    return bool(setting.metadata.get("flag", True))


def located(config: TrainConfig) -> TrainConfig:
    """The settings with the data's whole paths, so that they hold in another folder too."""
    found = {name: value.absolute() for name in PLACES if (value := getattr(config, name))}
    return replace(config, **found)


def changed(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not as by default, as numbers, strings and lists."""
    usual = plain(TrainConfig())
    return {name: value for name, value in plain(config).items() if value != usual.get(name)}


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML."""
    return yaml.safe_dump(plain(config), sort_keys=False) + END


def plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as numbers, strings and lists: those that the run has, see `OF_THE_LEARNER`."""
    left_out = _left_out(config.from_python) | (set() if config.inner_settings else {"inner_settings"})
    values = {key: value for key, value in asdict(config).items() if key not in left_out}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _left_out(from_python: object) -> set[str]:
    """The settings that a run has not of which so much was given in Python."""
    given = from_python if isinstance(from_python, list | tuple) else ()
    return {*(OF_THE_LEARNER if "learner" in given else ()), *(() if given else ("from_python",))}


def from_yaml(path: Path) -> TrainConfig:
    """The settings that `to_yaml` wrote; raises `FewShotError` naming a file that is not of that kind.

    In a file that is whole, those that are missing are younger than the file: they are as by default.
    """
    read = read_yaml(path)
    names = [one.name for one in fields(TrainConfig)]
    require_known(read, names, f"{path} is of another command or version")
    left_out = _left_out(read.get("from_python")) | {"inner_settings"}
    missing = [name for name in names if name not in read and name not in left_out]
    if missing and not is_whole(path):
        raise FewShotError(f"{path} lacks {', '.join(missing)}; it was cut short or is of another version")
    return from_plain(read, str(path))


def from_plain(values: Mapping[str, object], origin: str) -> TrainConfig:
    """The settings given as numbers, strings and lists, the others by default; `origin` is said in errors."""
    require_known(values, [one.name for one in fields(TrainConfig)], origin)
    for name, value in values.items():
        require_plain(f"{origin}: {name}", value)
    try:
        return TrainConfig(**_parser().parse_object(dict(values)).as_dict())
    except (ArgumentError, FewShotError, TypeError, ValueError) as error:
        reason = explained(str(error), _kinds())
        raise FewShotError(f"{origin} does not hold the settings of a run ({reason})") from error


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    return parser
