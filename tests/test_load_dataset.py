"""The dispatcher: which loader a name means, what it is given, and what is said of unknown names and options."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fewshot_asam
from fewshot_asam.data import DATASETS, Dataset, ImageSet, load_dataset, omniglot
from fewshot_asam.data.cache import cached
from fewshot_asam.errors import FewShotError
from test_archives import line, serve
from test_checkpoint import umask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tiny: Dataset) -> list[tuple[object, ...]]:
    """The calls that reach a stand-in for the glyphs loader."""
    made: list[tuple[object, ...]] = []

    def load(root: Path | None = None, *, seed: int = 0, faces: int = 1) -> Dataset:
        made.append((root, seed, faces))
        return tiny

    monkeypatch.setitem(sys.modules, "fewshot_asam.data.glyphs", SimpleNamespace(load=load))
    return made


def test_root_and_options_are_handed_on(calls: list[tuple[object, ...]], tmp_path: Path, tiny: Dataset) -> None:
    assert isinstance(load_dataset("glyphs"), Dataset)
    load_dataset("glyphs", tmp_path, seed=3)
    load_dataset("glyphs", str(tmp_path), faces=2)
    assert calls == [(None, 0, 1), (tmp_path, 3, 1), (tmp_path, 0, 2)]


def test_the_home_folder_may_be_a_tilde(
    calls: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    load_dataset("glyphs", "~/data")
    assert calls == [(tmp_path / "data", 0, 1)]


def test_images_are_put_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(to=lambda device: f"moved to {device}")
    monkeypatch.setitem(sys.modules, "fewshot_asam.data.glyphs", SimpleNamespace(load=lambda root: loaded))
    assert load_dataset("glyphs") == "moved to cpu"
    assert load_dataset("glyphs", device="cuda:1") == "moved to cuda:1"


def test_an_own_folder_is_loaded(tmp_path: Path, own_cache: Path) -> None:
    for klass in "abcde":
        (tmp_path / "own" / klass).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "own" / klass / "x.png")
    dataset = load_dataset("folder", tmp_path / "own", image_size=7, channels=1)
    assert isinstance(dataset.train, ImageSet)
    assert dataset.train.shape == (1, 7, 7)
    assert dataset.name == "folder"


def test_omniglot_is_downloaded_where_no_root_is_given(
    real_data: Path, own_cache: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {part: (real_data / "omniglot" / f"{part}.zip").read_bytes() for part in omniglot.HASHES}
    built: list[dict[str, Path]] = []
    monkeypatch.setattr(
        omniglot, "HASHES", {part: f"md5:{hashlib.md5(data).hexdigest()}" for part, data in files.items()}
    )
    monkeypatch.setattr(omniglot, "_build", lambda sources: built.append(sources) or tiny)
    monkeypatch.setattr(omniglot, "_check_dataset", lambda dataset: None)
    with serve(real_data / "omniglot") as address:
        monkeypatch.setattr(omniglot, "URL", address)
        load_dataset("omniglot")
    load_dataset("omniglot")
    assert built == [{part: own_cache / "downloads" / f"{part}.zip" for part in files}]
    assert {part: path.read_bytes() for part, path in built[0].items()} == files


def test_a_failed_download_of_omniglot_is_named(
    real_data: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repacked archives have other hashes than the official ones; there is nothing in a folder `none`."""
    said = ("images_background.zip", "expected hash md5:68d2efa1b9178cc56df9314c21c6e718", "--data-root")
    with serve(real_data / "omniglot") as address:
        for url, cause in ((address, "does not match"), (f"{address}/none", "404")):
            monkeypatch.setattr(omniglot, "URL", url)
            with pytest.raises(FewShotError, match=line(url, cause, *said)):
                load_dataset("omniglot")
    with pytest.raises(FewShotError, match=line(address, *said)):
        load_dataset("omniglot")


@pytest.mark.parametrize(
    ("name", "nearest"), [("mini-imagenet", "mini_imagenet"), ("Omniglot", "omniglot"), ("omniglott", "omniglot")]
)
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(FewShotError, match=line(repr(name), f"did you mean {nearest!r}?", *DATASETS)):
        load_dataset(name)


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(FewShotError, match=line("'birds'", *DATASETS)) as caught:
        load_dataset("birds")
    assert "did you mean" not in str(caught.value)


def test_a_module_that_is_no_dataset_is_unknown() -> None:
    with pytest.raises(FewShotError, match=line("'cache'")):
        load_dataset("cache")


def test_an_unknown_option_is_named_with_those_accepted(tmp_path: Path) -> None:
    with pytest.raises(
        FewShotError, match=line("'folder'", "'colour'", "image_size, channels, seed, fractions, split_csv")
    ):
        load_dataset("folder", tmp_path, seed=1, colour=True)
    with pytest.raises(FewShotError, match=line("'omniglot'", "'seed'", "it has none")):
        load_dataset("omniglot", tmp_path, seed=1)


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(FewShotError, match=line(str(root), "not a folder")):
            load_dataset("omniglot", root)


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_has_a_loader(name: str) -> None:
    load = importlib.import_module(f"fewshot_asam.data.{name}").load
    root, *options = inspect.signature(load).parameters.values()
    assert root.name == "root"
    assert root.default is None
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)


A_DATASET_MORE = """
import torch
from fewshot_asam.data.images import Dataset, ImageSet

def load(root=None, *, side=4):
    images = ImageSet(torch.zeros(6, 1, side, side, dtype=torch.uint8), torch.tensor([3, 3]), ("a", "b"))
    return Dataset("squares", images, images, images)
"""
USED = """
import fewshot_asam
from fewshot_asam.cli.train_maml import main
import fewshot_asam
from fewshot_asam.data import DATASETS, load_dataset
assert "squares" in DATASETS and "cache" not in DATASETS
assert load_dataset("squares", side=5).train.shape == (1, 5, 5)
assert fewshot_asam.TrainConfig(dataset="squares").dataset == "squares"
assert main(["--dataset", "sqares"]) == 2
main(["--help"])
"""


def test_a_new_dataset_is_one_file(tmp_path: Path) -> None:
    """In a copy of the package: `load_dataset`, the settings, the help and the error for unknown names find it."""
    package = Path(fewshot_asam.__file__).parent
    shutil.copytree(package, tmp_path / "fewshot_asam", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fewshot_asam" / "data" / "squares.py").write_text(A_DATASET_MORE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USED], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"--dataset \{[\w,\s]*squares", done.stdout)
    assert re.fullmatch(line("error: dataset is 'sqares'", "squares", "did you mean squares?"), done.stderr.strip())


def test_images_that_do_not_fit_the_device_are_named(
    calls: list[tuple[object, ...]], tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(dataset: Dataset, device: str) -> Dataset:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Dataset, "to", full)
    with pytest.raises(FewShotError, match=line("'glyphs' take 0.0 GiB", "memory of cuda:0")):
        load_dataset("glyphs", device="cuda:0")


def test_loaders_are_imported_only_when_asked_for() -> None:
    code = "import sys, fewshot_asam.data; print([m for m in ('h5py', 'PIL', 'pooch', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_dataset_that_another_process_cached_meanwhile_is_fine(own_cache: Path, tiny: Dataset) -> None:
    """A warning, as for a folder that cannot be written, would fail this test."""

    def build() -> Dataset:
        cached("tiny", "key", lambda: tiny)
        return tiny

    cached("tiny", "key", build)
    again = cached("tiny", "key", lambda: pytest.fail("it is not cached"))
    assert torch.equal(again.test.images, tiny.test.images)
    assert [path.name for path in (own_cache / "datasets").iterdir()] == ["tiny-key"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_cached_copy_is_open_to_whom_the_umask_says(own_cache: Path, tiny: Dataset, mask: int, mode: int) -> None:
    with umask(mask):
        cached("tiny", "key", lambda: tiny)
    folder = own_cache / "datasets" / "tiny-key"
    assert stat.S_IMODE(folder.stat().st_mode) == mode | (mode & 0o444) >> 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {mode}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("locked", "said"),
    [
        ("datasets/tiny-key/val.safetensors", "may not be read"),
        ("datasets/tiny-key", "may not be read"),
        ("datasets", "is not cached"),
        (".", "is not cached"),
    ],
)
def test_a_cache_that_may_not_be_read_is_done_without(own_cache: Path, tiny: Dataset, locked: str, said: str) -> None:
    cached("tiny", "key", lambda: tiny)
    before = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
    with without_permission(own_cache / locked), pytest.warns(UserWarning, match=said) as warned:
        assert cached("tiny", "key", lambda: tiny) is tiny
    assert len(warned) == 1
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before


@contextmanager
def without_permission(path: Path) -> Iterator[None]:
    """Within, nothing may be done with a file or folder, by root neither, who is somebody else meanwhile."""
    own, mode, above = os.geteuid(), stat.S_IMODE(path.stat().st_mode), path.parents
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in above}
    path.chmod(0)
    try:
        if own == 0:
            for folder in [folder for folder in above if not folder.stat().st_mode & stat.S_IXOTH]:
                folder.chmod(modes[folder] | 0o055)
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(own)
        path.chmod(mode)
        for folder, before in modes.items():
            if own == 0 and stat.S_IMODE(folder.stat().st_mode) != before:
                folder.chmod(before)


@pytest.mark.parametrize("damage", ["pipe", "names", "counts"])
def test_a_damaged_cached_copy_is_built_anew(own_cache: Path, tiny: Dataset, damage: str) -> None:
    cached("tiny", "key", lambda: tiny)
    (file,) = own_cache.glob("datasets/tiny-key/val.safetensors")
    tensors = load_file(file)
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "names":
        save_file(tensors, file, metadata={"names": "[" * 100_000})
    else:
        tensors["counts"][:2] += torch.tensor([-10, 10])
        save_file(tensors, file, metadata={"names": json.dumps(tiny.val.names)})
    with pytest.warns(UserWarning, match="is damaged and built anew"):
        assert cached("tiny", "key", lambda: tiny) is tiny
    assert torch.equal(cached("tiny", "key", lambda: pytest.fail("it is not cached")).val.images, tiny.val.images)
