"""What a run is made of where it was given to `train` in Python: how the settings record it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn

from fewshot_asam.data import Dataset
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import Shape
from fewshot_asam.training.config import Part, TrainConfig

Factory = Callable[[int, Shape], nn.Module]
"""A function of the ways and the image shape `(C, H, W)` that returns a model, from images to logits `[n, ways]`."""
_DATASET_NAME = re.compile(r"\w[\w .+-]{0,99}")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Given:
    """What was given in Python, None for what the settings name."""

    model: Factory | None = None
    learner: MetaLearner | None = None
    dataset: Dataset | None = None

    def __post_init__(self) -> None:
        if self.learner is not None and self.model is not None:
            raise FewShotError("model and learner are given; expected one of them, as a learner has its model")
        if self.learner is not None and not isinstance(self.learner, MetaLearner):
            raise FewShotError(f"learner is a {type(self.learner).__name__}; expected a MetaLearner, with its model")
        if self.model is not None:
            require_factory(self.model, "model")
        if self.dataset is None:
            return
        if not isinstance(self.dataset, Dataset):
            raise FewShotError(
                f"dataset is a {type(self.dataset).__name__}; expected a fewshot_asam.Dataset of three ImageSets"
            )
        if not isinstance(self.dataset.name, str) or not _DATASET_NAME.fullmatch(self.dataset.name):
            raise FewShotError(
                f"the dataset's name is {self.dataset.name!r}; expected a few letters, digits and spaces, as folders "
                "are called by it"
            )


def recorded(config: TrainConfig, given: Given) -> TrainConfig:
    """The settings with what was given: a function that can be imported by its name, else words.

    Raises `FewShotError` where the settings are of a run to which more was given.
    """
    changes: dict[str, Any] = {}
    parts: list[Part] = []
    if given.model is not None:
        changes["model"], importable = _reference(given.model)
        parts += [] if importable else ["model"]
    if given.learner is not None:
        changes["model"] = _described(given.learner)
        parts.append("learner")
    if given.dataset is not None:
        changes["dataset"] = given.dataset.name
        parts.append("dataset")
    require_given(config, *(part for part in config.from_python if getattr(given, part) is not None))
    return replace(config, from_python=tuple(parts), **changes)


def require_given(config: TrainConfig, *given: Part) -> None:
    """Raises `FewShotError` where more of a run came from Python than is given."""
    if missing := [part for part in config.from_python if part not in given]:
        named = [f"the {part} ({config.dataset if part == 'dataset' else config.model})" for part in missing]
        again = ", ".join(f"{part}=..." for part in config.from_python)
        raise FewShotError(
            f"{' and '.join(named)} of this run came from Python, and no name stands for that; pass the same again: "
            f"train(config, {again}, resume=True) goes on with the run and tests it"
        )


def require_factory(value: object, what: str) -> None:
    """Raises `FewShotError` for what is no function that returns a model."""
    if isinstance(value, nn.Module):
        raise FewShotError(
            f"{what} is a {type(value).__name__} that is made already; expected a function of ways and image shape "
            "that returns one, or learner=MetaLearner(...)"
        )
    if not callable(value):
        raise FewShotError(
            f"{what} is a {type(value).__name__}; expected a function of ways and image shape that returns an nn.Module"
        )


def _reference(factory: Factory) -> tuple[str, bool]:
    """The name of a function, and whether it can be imported by it."""
    module = getattr(factory, "__module__", None) or "__main__"
    name = getattr(factory, "__qualname__", None) or type(factory).__qualname__
    try:
        importable = module != "__main__" and attrgetter(name)(sys.modules[module]) == factory
    except (AttributeError, KeyError):
        importable = False
    return f"{module}:{name}", importable


def _described(learner: MetaLearner) -> str:
    """A learner in words, which are the same whenever it is made again, and others for one of other layers."""
    rule = repr(learner.rule) if is_dataclass(learner.rule) else type(learner.rule).__name__
    lr = learner.lr if isinstance(learner.lr, float | int) else "learned"
    options = {name: getattr(learner, name) for name in ("adapt", "validation", "norm", "zero_head", "first_order")}
    words = ", ".join([f"lr={lr}", f"rule={rule}", *(f"{name}={value!r}" for name, value in options.items())])
    words += f", loss={getattr(learner.loss, '__qualname__', type(learner.loss).__qualname__)}"
    text = f"{type(learner).__qualname__}({type(learner.model).__qualname__}, {words}), {layout(learner)}"
    return " ".join(_ADDRESS.sub("", text).split())


def layout(learner: MetaLearner) -> str:
    """How many tensors a learner has, and a digest of their names, types and shapes and of which are trained."""
    trained = {name for name, value in learner.named_parameters() if value.requires_grad}
    tensors = [
        (name, str(getattr(value, "dtype", "")), list(getattr(value, "shape", ())), name in trained)
        for name, value in learner.state_dict().items()
    ]
    return f"{len(tensors)} tensors {hashlib.sha256(json.dumps(tensors).encode()).hexdigest()[:12]}"
