"""A finished run of a second or so, to be copied and spoilt, and the proof that a refusal changed nothing.

Test files import its fixtures.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
from fewshot_asam import FewShotError
from fewshot_asam.data import Dataset
from fewshot_asam.training.build import load_data
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.loop import train

CPU = torch.device("cpu")


def settings(images: Path, folder: Path, **changes: Any) -> TrainConfig:
    """Those of a run of a second or so."""
    quick: dict[str, Any] = {"inner": "maml", "ways": 3, "queries": 2, "dataset": "folder", "image_size": 16}
    quick |= {"hidden": 4, "iterations": 4, "meta_batch_size": 2, "validate_every": 2, "validate_tasks": 4}
    quick |= {"test_tasks": 4, "checkpoint_every": 2, "engine": "loop", "device": "cpu"}
    return TrainConfig(**(quick | {"data_root": images, "output_dir": folder} | changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_ASAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(settings(images, folder))
    return folder


@pytest.fixture(scope="module")
def dataset(images: Path) -> Dataset:
    return load_data(settings(images, Path("unused")), CPU)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder, with its content and when it was changed."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def require_refusal(place: Path, message: str, work: Callable[[], object]) -> None:
    before = everything(place)
    with pytest.raises(FewShotError, match=message) as raised:
        work()
    assert len(str(raised.value).splitlines()) == 1
    assert everything(place) == before
