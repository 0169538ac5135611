"""Everything that defines a training of a classifier, each setting with its default and unit."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from fewshot_asam.engine.precision import Precision
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules.checks import require_radius
from fewshot_asam.runtime.yaml_settings import conforming, nearest, read_yaml, require_known
from fewshot_asam.supervised.names import MODELS, SOURCES, OptimizerName
from fewshot_asam.training import checks


@dataclass(frozen=True)
class ClassifierConfig:
    """Settings of a training; the docstrings are the command line's help."""

    optimizer: OptimizerName = "agnostic_sam"
    """what makes the steps: SGD alone or one of the sharpness-aware optimizers around it"""
    rho: float = 0.05
    """radius of the perturbation; that of asam and agnostic_asam is about ten times SAM's"""
    rho1: float | None = None
    """Agnostic-SAM's radius on the training gradient; 2 * rho if not given"""
    rho2: float | None = None
    """Agnostic-SAM's radius on the validation gradient; rho if not given"""
    val_batch_fraction: float = 0.25
    """Agnostic-SAM's validation batch, as a part of batch_size; a second mini-batch of the training images"""
    val_momentum: float = 0.9
    """momentum of Agnostic-SAM's validation gradient"""

    dataset: str = field(default="cifar10", metadata={"choices": SOURCES})
    """where the images come from; folder is any folder or zip file of train/<class>/* and test/<class>/*"""
    data_root: Path | None = None
    """folder that holds the dataset's files; without it they are downloaded. Of dataset folder: it, or the zip file"""
    image_size: int = 32
    """side of the images of dataset folder and of mini_imagenet, in pixels"""
    label_noise: float = 0.0
    """part of the training images whose label is replaced by another one, drawn by noise_seed"""
    noise_seed: int = 0
    """which labels are replaced, and by which"""
    holdout: float = 0.1
    """part of the training images that is not trained on: the epoch with the best accuracy there is the best one.
    Its labels are as noisy as the others"""
    augment: bool = True
    """random crops after padding by 4 pixels, and random flips"""
    cutout: int = 0
    """side of the square that is cut out of each training image, in pixels; 0 for none"""

    model: str = field(default="resnet", metadata={"choices": MODELS})
    """resnet (He et al.), wide_resnet, small (three convolutions, for a CPU), or package.module:factory, a function of
    the number of classes and the image shape that returns a network, which may have weights already"""
    depth: int = 20
    """layers: 6n + 2 of resnet, 6n + 4 of wide_resnet"""
    width: int = 1
    """factor of the number of filters"""

    epochs: int = 200
    """times through the training images"""
    batch_size: int = 128
    """images of a step; what is left over at the end of an epoch is not used in it"""
    lr: float = 0.1
    """learning rate of SGD"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 5e-4
    """of SGD, on all parameters"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """course of lr; cosine falls to 0 at the last step (resumed with more epochs it is stretched)"""
    checkpoint_every: int = 1
    """epochs between two checkpoints"""

    seed: int = 0
    """of the initial weights, the held-out images, the order and the augmentation"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""
    precision: Precision = "float32"
    """of convolutions and matrix products: float32, tf32 (GPU), bfloat16 (autocast)"""
    output_dir: Path | None = None
    """run folder; if not given, a new one under runs/"""

    def __post_init__(self) -> None:
        kinds = _kinds()
        for one in fields(self):
            object.__setattr__(self, one.name, conforming(one.name, getattr(self, one.name), kinds[one.name]))
        if self.dataset not in SOURCES:
            raise FewShotError(f"dataset is {self.dataset!r}; expected one of {', '.join(SOURCES)}")
        if self.model not in MODELS and ":" not in self.model:
            raise FewShotError(
                f"model is {self.model!r}; expected one of {', '.join(MODELS)}, or package.module:factory"
                f"{nearest(self.model, MODELS)}"
            )
        for name in ("epochs", "batch_size", "depth", "width", "image_size", "checkpoint_every"):
            checks.require_count(name, getattr(self, name))
        checks.require_count("cutout", self.cutout, 0)
        for name in ("image_size", "width", "depth", "cutout"):
            if getattr(self, name) > checks.LARGEST_SIZE:
                raise FewShotError(f"{name} is {getattr(self, name)}; expected at most {checks.LARGEST_SIZE:,}")
        for name, most in (("label_noise", 0.8), ("holdout", 0.5), ("momentum", 0.9999), ("val_momentum", 0.9999)):
            if not 0 <= getattr(self, name) <= most:
                raise FewShotError(f"{name} is {getattr(self, name)}; expected 0 to {most}")
        if not 0 < self.val_batch_fraction <= 1:
            raise FewShotError(f"val_batch_fraction is {self.val_batch_fraction}; expected above 0 and at most 1")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < checks.LARGEST_RATE:
                raise FewShotError(f"{name} is {getattr(self, name)}; expected at least 0 and finite")
        for name in ("rho", "rho1", "rho2"):
            require_radius(name, getattr(self, name))
        for name in ("data_root", "output_dir"):
            checks.require_writable(name, str(getattr(self, name)))
        for name in ("seed", "noise_seed"):
            checks.require_seed(name, getattr(self, name))

    @property
    def title(self) -> str:
        """The run in a few words, fit for a file name."""
        noise = f"-noise{round(100 * self.label_noise)}" if self.label_noise else ""
        return re.sub(
            r"[^\w.-]+", "-", f"{self.dataset}-{self.model.rpartition(':')[2]}-{self.optimizer}{noise}-seed{self.seed}"
        )

    @property
    def val_batch_size(self) -> int:
        """Images of Agnostic-SAM's validation batch."""
        return max(1, round(self.val_batch_fraction * self.batch_size))

    @property
    def gradients_a_step(self) -> float:
        """Gradients of a whole training batch that a step costs."""
        if self.optimizer == "sgd":
            return 1.0
        return 2.0 + 2 * self.val_batch_size / self.batch_size * self.optimizer.startswith("agnostic")


GROUPS = {
    "optimizer": "optimizer",
    "dataset": "data",
    "model": "network",
    "epochs": "training",
    "seed": "machine and run folder",
}
"""The titles of the settings' groups in the help, each by the first setting of its group."""
FREE_TO_CHANGE = ("epochs", "data_root", "output_dir", "checkpoint_every", "device")
"""Settings with which a run may be resumed although they differ."""


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(ClassifierConfig)


def plain(config: ClassifierConfig) -> dict[str, Any]:
    """The settings as numbers and strings."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def to_yaml(config: ClassifierConfig) -> str:
    """The settings as YAML."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def from_yaml(path: Path) -> ClassifierConfig:
    """The settings that `to_yaml` wrote; raises `FewShotError` naming a file that is not of that kind."""
    read = read_yaml(path)
    names = [one.name for one in fields(ClassifierConfig)]
    require_known(read, names, f"{path} is of another command or version")
    if missing := [name for name in names if name not in read]:
        raise FewShotError(f"{path} lacks {', '.join(missing)}; it was cut short or is of another version")
    return from_plain(read, str(path))


def from_plain(values: dict[str, Any], origin: str) -> ClassifierConfig:
    """The settings given as numbers and strings, the others by default; `origin` is said in errors."""
    require_known(values, [one.name for one in fields(ClassifierConfig)], origin)
    try:
        return ClassifierConfig(**values)
    except FewShotError as error:
        raise FewShotError(f"{origin} does not hold the settings of a training ({error})") from error
