"""What a weights file says of its run, and the learner that it was the state of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor, nn

from fewshot_asam.data.preparation import Picture, Shape, ink_on_paper, prepared
from fewshot_asam.learners import MetaLearner
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.config import TrainConfig, from_plain
from fewshot_asam.training.given import Factory
from fewshot_asam.training.identity import from_json

DRAWN = ("glyphs", "omniglot")
"""Datasets of ink 1 on paper 0, made smaller by Lanczos's filter."""


@dataclass(frozen=True)
class Origin:
    """What the header of a weights file says of its run."""

    config: TrainConfig
    image_shape: Shape
    text: str

    @property
    def title(self) -> str:
        """The run in a few words."""
        config = self.config
        task = f"{config.model}, {config.ways}-way {config.shots}-shot on {config.dataset}"
        return f"{task}, {config.inner}, inner steps: {config.inner_steps} of {config.inner_lr:g}"

    @property
    def of_drawings(self) -> bool:
        """Whether the run was trained on light ink on dark paper."""
        return self.config.dataset in DRAWN

    def prepared(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Images of the size and channels of the run's, uint8 `[n, C, H, W]`."""
        resample = Image.Resampling.LANCZOS if self.of_drawings else Image.Resampling.BILINEAR
        return prepared(images, self.image_shape, resample)

    def negatives(self, images: Tensor) -> Tensor:
        """The same images inverted; of drawings, ink as 255 on paper as 0, however they are lit."""
        return ink_on_paper(images) if self.of_drawings else 255 - images


def origin_of(text: str, path: str) -> Origin:
    """What stands in the header of the weights file at `path`; raises `FewShotError` where that is no run."""
    identity = from_json(text, path)
    return Origin(from_plain(identity.settings, path), identity.image_shape, text)


def stateful(learner: MetaLearner) -> nn.Module:
    """The module whose state the weights files of a run hold."""
    return learner


def learner_of(origin: Origin, ways: int, model: Factory | None = None) -> MetaLearner:
    """The untrained learner for so many classes, which trains on all of a support set, one task at a time.

    - `model`: makes the network, if not the one that the settings name.
    """
    config = replace(origin.config, ways=ways, validation="duplicate", engine="loop", torch_compile=False)
    learner = build_learner(config, origin.image_shape, model)
    learner.check = False  # the run was trained with this model
    return learner
