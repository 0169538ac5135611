"""Weights of another run that a run begins from (a fork), bound by their digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.training.checkpoint import Weights, latest_state, put_weights, read_weights
from fewshot_asam.training.config import TrainConfig

DIGITS = 16
"""Hexadecimal digits of a digest."""


def with_digest(config: TrainConfig, resume: bool) -> TrainConfig:
    """The settings with the digest of the weights that `init_from` names.

    A run that goes on from a checkpoint needs them no more, so they may be gone. Raises `FewShotError` where they
    cannot be read, or are others than `init_digest` says.
    """
    if config.init_from is None:
        if config.init_digest is not None:
            raise FewShotError(
                f"init_digest is {config.init_digest!r}, but no weights are named; give the run or the file that has "
                "them as init_from"
            )
        return config
    file = weights_file(config.init_from)
    if resume and not file.exists() and config.output_dir and latest_state(config.output_dir):
        return config
    found = digest(read_weights(file)[0])
    if config.init_digest not in (None, found):
        raise FewShotError(
            f"init_from names weights of digest {found}, but init_digest is {config.init_digest!r}; name the weights "
            "that are meant"
        )
    return replace(config, init_digest=found)


def begin_from(config: TrainConfig, learner: MetaLearner) -> None:
    """Puts the weights that `init_from` names into an untrained learner; raises `FewShotError` for other layers.

    Whatever else the run that they are of has, such as its optimiser's state, is left behind.
    """
    if config.init_from is not None and (file := weights_file(config.init_from)).exists():
        put_weights(read_weights(file)[0], learner, str(file))


def weights_file(init_from: Path) -> Path:
    """The best weights of a run's folder, or the file itself."""
    return init_from / "best.safetensors" if init_from.is_dir() else init_from


def digest(weights: Weights) -> str:
    """The first digits of a SHA-256 of the tensors, whatever order and file they are in."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:DIGITS]
