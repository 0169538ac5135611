"""What a run is bound to: the settings its weights depend on, its classes and its images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fewshot_asam.data import Dataset, ImageSet
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.yaml_settings import filled
from fewshot_asam.training.config import PLACES, Part, TrainConfig, located, plain
from fewshot_asam.training.given import require_given

FREE_TO_CHANGE = (
    *("iterations", "max_minutes", "checkpoint_every", "keep_snapshots", "processes"),
    *("data_root", "test_data_root", "init_from", "output_dir"),
)
"""Settings with which a run may be resumed although they differ."""
OF_A_MACHINE = (*PLACES, "output_dir")
"""Settings that may differ between the processes of a job: where the files are on each machine."""
AT_ONCE = 4096
"""Images that are digested together, as many as are copied from a GPU at a time."""


@dataclass(frozen=True)
class Identity:
    """What made a run. It stands in its checkpoints and weights and is compared where they are used."""

    settings: dict[str, Any]
    """those that may not change"""
    classes: str
    """digest of the class names of all splits"""
    images: str
    """digest of the pixels and of how many images each class has"""
    image_shape: tuple[int, int, int]
    """`(C, H, W)`, so that weights can be used where the dataset is not"""

    def of(self, config: TrainConfig) -> Identity:
        """That of a run with these settings on the same data."""
        return replace(self, settings=_kept(config))

    def to_json(self) -> str:
        """As text for a file."""
        return json.dumps(asdict(self))


def identify(config: TrainConfig, dataset: Dataset) -> Identity:
    """The identity of a run with these settings on these data."""
    splits = (dataset.train, dataset.val, dataset.test)
    classes = hashlib.sha256(json.dumps([images.names for images in splits]).encode()).hexdigest()
    return Identity(_kept(config), classes, images_digest(*splits), dataset.train.shape)


def images_digest(*splits: ImageSet) -> str:
    """Of the pixels of some splits, and of how many images each class has."""
    pixels = hashlib.sha256()
    for images in splits:
        _digest(images, pixels)
    return pixels.hexdigest()


def from_json(text: str | None, origin: str) -> Identity:
    """What `to_json` gave; raises `FewShotError` naming the file it is of."""
    try:
        read = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise FewShotError(f"{origin} is damaged ({error}); expected what made the run") from error
    return filled(Identity, read, f"{origin}: what made the run")


def require_same_settings(config: TrainConfig, stored: TrainConfig) -> None:
    """Raises `FewShotError` for a setting that would alter the run that was begun with the `stored` ones."""
    renamed: tuple[Part, ...] = ("model",) if ":" in config.model else ()
    require_given(stored, *config.from_python, *renamed)
    for part in config.from_python:
        if part not in stored.from_python:
            name = stored.dataset if part == "dataset" else stored.model
            raise FewShotError(
                f"the {part} of the run was made by its name, {name}, and is given in Python now, which would alter "
                "the resumed run; name it in the settings instead, or start a new run"
            )
    before, now = _bound(stored), _bound(config)
    for name, new in now.items():
        if new != (old := before[name]):
            raise FewShotError(
                f"{name} was {old} and is {new}, which would alter the resumed run; leave it as it was, or start a "
                "new run"
            )


def require_same(own: Identity, stored: Identity, name: str) -> None:
    """Raises `FewShotError` where what is in a file named `name` was made with other settings or classes.

    A setting that is younger than the file was as by default.
    """
    usual = _kept(TrainConfig())
    for setting in {**stored.settings, **own.settings}:
        old, new = ({**usual, **identity.settings}.get(setting) for identity in (stored, own))
        if old != new:
            raise FewShotError(
                f"{name} was made with {setting} {old}, but the run's setting is {new}; put the config.yaml back that "
                "it was made with"
            )
    if own.classes != stored.classes:
        raise FewShotError(
            f"{name} was made with other classes, or with some in another split; use the data that the run was trained "
            "on, or start a new run"
        )


def require_same_everywhere(what: Mapping[str, object]) -> None:
    """Raises `FewShotError` where a process of the job has other values than the first one."""
    first = distributed.broadcast(dict(what))

    def compare() -> None:
        for name, value in what.items():
            if value != first[name]:
                raise FewShotError(
                    f"{name} is {value}, but {first[name]} in the first process; start all processes of a job with the "
                    "same settings, on the same data"
                )

    distributed.all_succeed(compare)


def data_digests(identity: Identity) -> dict[str, object]:
    """What all processes of a job must have found."""
    return {"the digest of the class names": identity.classes, "the digest of the images": identity.images}


def shared(config: TrainConfig) -> dict[str, object]:
    """The settings that all processes of a job must share."""
    return {name: value for name, value in plain(config).items() if name not in OF_A_MACHINE}


def _bound(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share."""
    return {name: value for name, value in plain(located(config)).items() if name not in FREE_TO_CHANGE}


def _kept(config: TrainConfig) -> dict[str, Any]:
    """The settings that files keep, as they are read again: weights may be used on another device."""
    values = {name: value for name, value in _bound(config).items() if name != "device"}
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def _digest(images: ImageSet, digest: Any) -> None:
    digest.update(json.dumps([images.counts.tolist(), *images.shape]).encode())
    for part in torch.split(images.images, AT_ONCE):
        digest.update(part.cpu().contiguous().numpy().data)
