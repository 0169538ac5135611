"""What people get out of a trained run: a classifier of their own classes, from a few labelled images.

classifier = load_run("runs/mine").fit(images, labels)      # one's own support set
classifier.predict(others), classifier.predict_proba(others)
classifier.save("mine.safetensors")                         # Classifier.load needs neither the run nor its rule
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam.data.preparation import Label, Picture, dark_on_light, numbered, scaled
from fewshot_asam.engine.precision import precision
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import MODELS, takes_support
from fewshot_asam.models.statistics import Statistics, logits
from fewshot_asam.runtime.yaml_settings import expanded, filled
from fewshot_asam.training.build import build_learner, resolve_device
from fewshot_asam.training.checkpoint import Weights, not_finite, put_weights, read_weights, save_weights, weights
from fewshot_asam.training.evaluation import in_eval_mode
from fewshot_asam.training.given import Factory
from fewshot_asam.training.origin import Origin, learner_of, origin_of, stateful
from fewshot_asam.training.run_folder import stored_settings

Device = Literal["auto", "cpu", "cuda"]
AT_ONCE = 256
"""Images that go through the network together, so that memory is bounded."""
SAVED = {str, int, float, bool, type(None)}
"""Types of the labels that a file can hold."""


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The best weights of a run and all that is needed to use them, made by `load_run`."""

    origin: Origin
    weights: Weights
    device: torch.device
    model: Factory | None = None

    def learner(self) -> MetaLearner:
        """The meta-learner with these weights, which adapts as it did in training: for `evaluate`, for
        `fewshot_asam.analysis`, or to train on in a loop of one's own.
        """
        learner = build_learner(self.origin.config, self.origin.image_shape, self.model)
        put_weights(self.weights, stateful(learner), "the run")
        return learner.to(self.device)

    def fit(
        self,
        images: Picture | Sequence[Picture],
        labels: Iterable[Label],
        steps: int | None = None,
        *,
        invert: bool | None = None,
    ) -> Classifier:
        """Adapts to one's own labelled images, all of them, by the rule that the run was trained with.

        Classes may have different numbers of images. Fewer classes than in training use the head's first rows; more
        are possible where every task's head starts from zeros (`head_init` `zeros_every_task`, the default).

        **Arguments:**

        - `images`: an array or tensor, uint8 or in `[0, 1]`, `[n, C, H, W]` or `[n, H, W, C]`; or a list of files or
          Pillow images. They are squashed to the run's size and channels.
        - `labels`: one an image, of any hashable type.
        - `steps`: inner steps; those of the run if not given.
        - `invert`: whether the images are inverted, here and in `predict`. If not given, they are where the run was
          trained on drawings (ink 1 on paper 0) and these are dark ink on lighter paper; paper then becomes 0 and the
          darkest ink 1, image by image.

        **Returns:** the classifier. Arrays that are squashed, images that are inverted and a head that is widened are
        said in a warning. Raises `FewShotError` where images, labels or their numbers are not as described, and where
        the adaptation diverges.
        """
        support, config = self.origin.prepared(images), self.origin.config
        names, y = numbered(labels, len(support))
        self._say_squashed(images)
        inverted = self._inverts(support) if invert is None else invert
        support = self.origin.negatives(support) if inverted else support
        learner = self._learner(len(names))
        with precision("float32", self.device):
            x = scaled(support, self.device)
            adapt(learner, x, y.to(self.device), config.inner_steps if steps is None else steps)
        model = learner.model.eval()
        return Classifier(model, names, support, "support" if takes_support(model) else "each", inverted, self.origin)

    def _say_squashed(self, images: object) -> None:
        own = self.origin.image_shape
        if isinstance(images, Tensor | np.ndarray) and sorted(images.shape[1:]) != sorted(own):
            given, expected = ("x".join(map(str, shape)) for shape in (images.shape[1:], own))
            _say(f"the images are {given}, and the run was trained on {expected}: they are squashed to that")

    def _inverts(self, support: Tensor) -> bool:
        inverts = self.origin.of_drawings and dark_on_light(support)
        if inverts:
            _say(
                f"the support images are dark ink on lighter paper, and {self.origin.config.dataset} is the reverse: "
                "they are inverted, and so are those to predict (invert=False, or --invert false, leaves them)"
            )
        return inverts

    def _learner(self, ways: int) -> MetaLearner:
        """The run's learner, its head made as wide as there are classes."""
        trained, learner = self.origin.config.ways, learner_of(self.origin, ways, self.model)
        if ways > trained and not learner.zero_head:
            raise FewShotError(
                f"{ways} classes were given, but the run's head was trained for {trained}; give at most that many, or "
                "train with --head-init zeros_every_task, whose head can be widened"
            )
        if ways > trained:
            _say(f"the head is widened from {trained} to {ways} classes, more than the run ever told apart")
        own = stateful(learner).state_dict()
        fitted = {name: _resized(name, value, own.get(name)) for name, value in self.weights.items()}
        put_weights(fitted, stateful(learner), "the run")
        return learner.to(self.device)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network adapted to one's own classes, made by `load_run(...).fit` or `Classifier.load`.

    - `labels`: the classes, in the order in which they were first met; that of `predict_proba`'s columns.
    - `support`: the labelled images as the network sees them, uint8 `[n, C, H, W]`: the norm layers need them.
    - `statistics`: which images give those layers' statistics, if `predict` is not told otherwise.
    - `inverted`: whether images are made negatives of before they are classified.
    """

    model: nn.Module
    labels: tuple[Label, ...]
    support: Tensor
    statistics: Statistics
    inverted: bool
    origin: Origin

    def predict(self, images: Picture | Sequence[Picture], statistics: Statistics | None = None) -> list[Label]:
        """The most probable label of each image; see `predict_proba`."""
        found = self.predict_proba(images, statistics).argmax(1).tolist()
        return [self.labels[index] for index in found]

    def predict_proba(self, images: Picture | Sequence[Picture], statistics: Statistics | None = None) -> Tensor:
        """The softmax of the logits, float32 `[n, classes]` on the CPU; it is no calibrated probability.

        **Arguments:**

        - `images`: as in `fit`.
        - `statistics`: whose statistics the norm layers use: the `support` set's alone (the default), `each` image's
          with the support set's (the default where the model's `forward` takes no `support`), or all images'
          `together`, 256 at a time, as transductive runs are trained and tested: then an answer depends on the others.

        Raises `FewShotError` where the images are not as described or the network cannot be used so.
        """
        device = next(self.model.parameters()).device
        found = self.origin.prepared(images)
        found = self.origin.negatives(found) if self.inverted else found
        parts = torch.chunk(found, math.ceil(len(found) / AT_ONCE))
        with torch.no_grad(), precision("float32", device):
            support, chosen = scaled(self.support, device), statistics or self.statistics
            answers = torch.cat([logits(self.model, scaled(part, device), support, chosen) for part in parts])
        return answers.softmax(1).cpu()

    def save(self, path: str | Path) -> None:
        """Writes the adapted network, the support set and the labels as one safetensors file with a checksum.

        It holds no code. Raises `FewShotError` for labels that are neither strings nor numbers.
        """
        for label in self.labels:
            if type(label) not in SAVED:
                raise FewShotError(f"label {label!r} is a {type(label).__name__}; a file holds strings and numbers")
        described = {"labels": self.labels, "statistics": self.statistics, "inverted": self.inverted}
        tensors = {f"model.{name}": value for name, value in weights(self.model).items()}
        made_by = json.dumps(described | {"run": self.origin.text})
        save_weights(expanded(Path(path)), {**tensors, "support": self.support}, made_by)

    @classmethod
    def load(cls, path: str | Path, device: Device = "auto", *, model: Factory | None = None) -> Classifier:
        """What `save` wrote; `model` makes a network that is not of this package, as no file decides what code is run.

        Raises `FewShotError` naming a file that is missing, damaged, of another kind or in need of a `model`.
        """
        path = expanded(Path(path))
        tensors, text = read_weights(path)
        described = _described(text, str(path))
        origin, labels = origin_of(described.run, str(path)), tuple(described.labels)
        support = tensors.pop("support", torch.empty(0))
        if support.dtype != torch.uint8 or support.shape[1:] != torch.Size(origin.image_shape) or len(labels) < 2:
            raise FewShotError(f"{path} is of another kind; expected what Classifier.save writes")
        if model is None and origin.config.model not in MODELS:
            raise FewShotError(
                f"{path} holds the weights of {origin.config.model}, but no code; pass model=, the function of ways "
                "and image shape that makes it"
            )
        network = learner_of(origin, len(labels), model).model.eval()
        put_weights({name.removeprefix("model."): value for name, value in tensors.items()}, network, str(path))
        network.to(resolve_device(device))
        return cls(network, labels, support, described.statistics, described.inverted, origin)


def load_run(run: str | Path, device: Device = "auto", *, model: Factory | None = None) -> TrainedRun:
    """The best weights of a run, ready to be fitted to one's own images; the run's data are not needed.

    **Arguments:**

    - `run`: the folder that `train_maml` or `train` wrote, or a weights file of it, which holds all that is needed.
    - `device`: where it is computed; `auto` takes the GPU where there is one.
    - `model`: makes the network, where it was given to `train` in Python; one that `--model` named is imported.

    Raises `FewShotError` where it is no such folder or file, or the network cannot be made.
    """
    path = expanded(Path(run))
    if not path.is_file():
        stored_settings(path)
        path = path / "best.safetensors"
    tensors, text = read_weights(path)
    return TrainedRun(origin_of(text, str(path)), tensors, resolve_device(device), model)


def adapt(learner: MetaLearner, x: Tensor, y: Tensor, steps: int) -> None:
    """Leaves the learner's model adapted to images `[n, C, H, W]` and labels `[n]`, the support set."""
    with torch.no_grad(), in_eval_mode(learner.model):
        task = learner.clone().adapt(lambda network: F.cross_entropy(network(x), y), steps)
        if bad := not_finite(task.params):
            raise FewShotError(f"{bad} is not finite after {steps} inner steps; give fewer steps or other images")
        for name, value in task.params.items():
            learner.model.get_parameter(name).copy_(value)


def _resized(name: str, value: Tensor, like: Tensor | None) -> Tensor:
    """The first rows of a head that was trained for more classes, or zeros below one that was for fewer.

    Inner rates of further rows, which were never learned, are the mean of those that were.
    """
    if like is None or value.ndim == 0 or value.shape[1:] != like.shape[1:]:
        return value
    row = value.mean(0) if name.startswith("lr.") else torch.zeros_like(value[0])
    return torch.cat([value[: len(like)], row.expand(max(0, len(like) - len(value)), *row.shape)])


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@dataclass(frozen=True)
class _Described:
    """What a classifier's file says beside its tensors."""

    labels: list[Any]
    statistics: Statistics
    inverted: bool
    run: str


def _described(text: str, path: str) -> _Described:
    try:
        read = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise FewShotError(f"{path} is damaged ({error}); expected what Classifier.save writes") from error
    return filled(_Described, read, f"{path}: the classifier")
