"""Shared fixtures: where the real archives are, and a small synthetic dataset."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import fewshot_asam
from fewshot_asam.data.images import Dataset, ImageSet

# The problems are small, and the tests run in as many processes as there are cores: threads would wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell that starts the tests in the background, or under nohup, has these ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
REAL_DATA = Path(os.environ.get("FEWSHOT_ASAM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_report_header() -> str:
    return (
        f"fewshot_asam {fewshot_asam.__version__} from {Path(fewshot_asam.__file__).parent}, torch {torch.__version__}"
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real Omniglot and Mini-ImageNet archives."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}; set FEWSHOT_ASAM_DATA to a folder that holds the archives")
    return REAL_DATA


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("FEWSHOT_ASAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_images(classes: int, per_class: int, shape: tuple[int, int, int], seed: int) -> ImageSet:
    """Random classes: each image is its class's own pattern plus noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 1, *shape, generator=generator)
    noise = torch.rand(classes, per_class, *shape, generator=generator)
    images = ((0.7 * patterns + 0.3 * noise) * 255).to(torch.uint8).flatten(0, 1)
    return ImageSet(images, torch.full((classes,), per_class), tuple(f"class{i:03d}" for i in range(classes)))


@pytest.fixture
def tiny() -> Dataset:
    """A dataset of 12 classes a split with 8 images of 1x28x28 each."""
    return Dataset("tiny", *(make_images(12, 8, (1, 28, 28), seed) for seed in range(3)))
