"""Omniglot from the real archives and the real tree, and from what people may have instead of them."""

from __future__ import annotations

import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fewshot_asam.data import omniglot
from fewshot_asam.data.cache import SPLITS
from fewshot_asam.data.images import Dataset
from fewshot_asam.errors import FewShotError
from test_archives import line

PARTS = ("images_background", "images_evaluation")
MAGI = "Alphabet_of_the_Magi/character01"
ANGELIC = "Angelic/character03"


@pytest.fixture(scope="module")
def archives(real_data: Path) -> Path:
    return real_data / "omniglot"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for the tests that load the whole dataset."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEWSHOT_ASAM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def dataset(real_data: Path, shared_cache: Path) -> Dataset:
    start = time.perf_counter()
    loaded = omniglot.load(real_data)
    print(f"omniglot, first load from the archives: {time.perf_counter() - start:.1f} s")
    return loaded


@pytest.fixture(scope="module")
def tree(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        with zipfile.ZipFile(archives / f"{part}.zip") as archive:
            archive.extractall(folder)
    return folder


@pytest.fixture
def copies(archives: Path, tmp_path: Path, own_cache: Path) -> Path:
    """A folder with copies of both archives, for a test to break."""
    (tmp_path / "copies").mkdir()
    for part in PARTS:
        shutil.copyfile(archives / f"{part}.zip", tmp_path / "copies" / f"{part}.zip")
    return tmp_path / "copies"


@pytest.fixture
def own_tree(tree: Path, tmp_path: Path, own_cache: Path) -> Path:
    """A tree of links, but for two alphabets that are copied for a test to break."""
    for alphabet in tree.glob("*/*"):
        own = tmp_path / "own" / alphabet.relative_to(tree)
        own.parent.mkdir(parents=True, exist_ok=True)
        if alphabet.name in (Path(MAGI).parent.name, Path(ANGELIC).parent.name):
            shutil.copytree(alphabet, own)
        else:
            own.symlink_to(alphabet)
    return tmp_path / "own"


def drawing(tree: Path, character: str, index: int) -> np.ndarray:
    """The ink of one drawing as `[105, 105]` of 0 and 1, decoded by hand: 1-bit grey PNG, rows unfiltered."""
    (folder,) = tree.glob(f"*/{character}")
    data, position, packed = sorted(folder.iterdir())[index].read_bytes(), 8, b""
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        packed += data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(105, 15)
    assert not rows[:, 0].any()
    return 1 - np.unpackbits(rows[:, 1:], axis=1)[:, :105]


def area_average(image: np.ndarray, size: int) -> np.ndarray:
    """`image` shrunk to `[size, size]`, each pixel the mean of the area that it covers."""
    edges = np.linspace(0, len(image), size + 1)
    pixels = np.arange(len(image))
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = covered.clip(0) * size / len(image)
    return weights @ image @ weights.T


def test_the_splits_are_those_of_vinyals() -> None:
    splits = {split: omniglot.split_characters(split) for split in SPLITS}
    assert {split: len(names) for split, names in splits.items()} == {"train": 1028, "val": 172, "test": 423}
    assert len(set().union(*splits.values())) == 1623


def test_sizes_and_names(dataset: Dataset) -> None:
    for split, classes in (("train", 4112), ("val", 688), ("test", 423)):
        images = getattr(dataset, split)
        assert images.images.shape == (20 * classes, 1, 28, 28)
        assert images.counts.tolist() == [20] * classes
    assert dataset.name == "omniglot"
    assert dataset.train.names[:5] == (
        *(f"{MAGI}/rot{turn}" for turn in ("000", "090", "180", "270")),
        MAGI[:-1] + "2/rot000",
    )
    assert list(dataset.test.names) == omniglot.split_characters("test")
    characters = {split: {name.split("/rot")[0] for name in getattr(dataset, split).names} for split in SPLITS}
    assert characters == {split: set(omniglot.split_characters(split)) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_match_a_decoder_written_by_hand(dataset: Dataset, tree: Path, split: str) -> None:
    images = getattr(dataset, split)
    step = 1 if split == "test" else 4
    for index in range(0, len(images.names), 41 * step):
        name = images.names[index].removesuffix("/rot000")
        for sample in (0, 7, 19):
            expected = 255 * area_average(drawing(tree, name, sample), 28)
            actual = images.images[20 * index + sample, 0].numpy().astype(float)
            assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.97, name
            assert abs(actual.mean() - expected.mean()) < 2, name


def test_ink_is_bright_on_dark_paper(dataset: Dataset) -> None:
    images = dataset.train.images
    assert 0.03 < float(images[::7].float().mean()) / 255 < 0.15
    assert int(images.flatten(1).amax(1).min()) > 128
    assert len(images[:1000].unique()) > 200


@pytest.mark.parametrize("split", ["train", "val"])
def test_rotated_classes_are_the_rotated_drawings(dataset: Dataset, split: str) -> None:
    images = getattr(dataset, split)
    turned = images.images.view(-1, 4, 20, 28, 28)
    torch.testing.assert_close(turned[:, 1], turned[:, 0].transpose(-2, -1).flip(-2), rtol=0, atol=0)
    torch.testing.assert_close(turned[:, 2], turned[:, 0].flip(-2).flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(turned[:, 3], turned[:, 0].transpose(-2, -1).flip(-1), rtol=0, atol=0)
    for turn, angle in enumerate(("000", "090", "180", "270")):
        assert all(name.endswith(f"/rot{angle}") for name in images.names[turn::4])


def test_the_tree_gives_the_same_as_the_archives(dataset: Dataset, tree: Path, shared_cache: Path) -> None:
    start = time.perf_counter()
    from_tree = omniglot.load(tree)
    print(f"omniglot, first load from the tree: {time.perf_counter() - start:.1f} s")
    for split in SPLITS:
        one, other = getattr(dataset, split), getattr(from_tree, split)
        assert torch.equal(one.images, other.images)
        assert one.names == other.names


def test_the_second_load_is_from_the_cache(
    dataset: Dataset, real_data: Path, tree: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    omniglot.load(tree)
    monkeypatch.delattr(omniglot, "_build")
    for root in (real_data, real_data / "omniglot", tree):
        start = time.perf_counter()
        again = omniglot.load(root)
        copies = [getattr(again, split).images.clone() for split in SPLITS]
        print(f"omniglot, load from the cache: {time.perf_counter() - start:.2f} s")
        assert all(
            torch.equal(copy, getattr(dataset, split).images) for copy, split in zip(copies, SPLITS, strict=True)
        )


def test_a_changed_tree_is_read_anew(own_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(omniglot, "cached", lambda name, key, build: keys.append(key))
    monkeypatch.setattr(omniglot, "_check_dataset", lambda dataset: None)
    omniglot.load(own_tree)
    omniglot.load(own_tree)
    (own_tree / "images_evaluation" / ANGELIC / "0967_01.png").write_bytes(b"changed")
    omniglot.load(own_tree)
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(copies: Path, part: str) -> None:
    (copies / f"{part}.zip").unlink()
    with pytest.raises(FewShotError, match=line(f"{part}.zip", str(copies), omniglot.URL)):
        omniglot.load(copies)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_whole_archive_is_named(copies: Path, part: str) -> None:
    archive = copies / f"{part}.zip"
    for content in (archive.read_bytes()[:-100_000], b"<html>not found</html>"):
        archive.write_bytes(content)
        with pytest.raises(FewShotError, match=line(str(archive), "complete zip archive")):
            omniglot.load(copies)


def test_a_flipped_byte_is_named(copies: Path) -> None:
    archive = copies / "images_background.zip"
    with zipfile.ZipFile(archive) as opened:
        member = opened.getinfo(f"images_background/{MAGI}/0709_03.png")
    with archive.open("r+b") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        position = member.header_offset + 30 + name + extra + member.compress_size // 2
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
    with pytest.raises(FewShotError, match=line(str(archive), member.filename, "undamaged")):
        omniglot.load(copies)


def test_another_archive_is_named(copies: Path) -> None:
    shutil.copyfile(copies / "images_background.zip", copies / "images_evaluation.zip")
    with pytest.raises(
        FewShotError, match=line(f"{copies}/images_evaluation.zip holds 964", "expected 659", "639 more")
    ):
        omniglot.load(copies)
    with zipfile.ZipFile(copies / "images_background.zip", "w") as archive:
        archive.writestr(f"images_background/{MAGI}/0709_01.png", "")
    with pytest.raises(FewShotError, match=line(f"{copies}/images_background.zip holds 1 characters; expected 964")):
        omniglot.load(copies)


def test_a_missing_drawing_is_named(own_tree: Path) -> None:
    sorted((own_tree / "images_evaluation" / ANGELIC).iterdir())[4].unlink()
    with pytest.raises(FewShotError, match=line("images_evaluation holds 19 drawings of", ANGELIC, "expected 20")):
        omniglot.load(own_tree)


def test_missing_characters_are_named(own_tree: Path) -> None:
    folder = own_tree / "images_background" / MAGI
    folder.rename(folder.with_name("character99"))
    with pytest.raises(FewShotError, match=line(str(own_tree / "images_background"), f"missing: {MAGI}")):
        omniglot.load(own_tree)
    shutil.rmtree(own_tree / "images_evaluation" / ANGELIC)
    with pytest.raises(FewShotError, match=line(f"holds 658 characters; expected 659; missing: {MAGI}, {ANGELIC}")):
        omniglot.load(own_tree)


def test_a_corrupt_drawing_is_named(own_tree: Path) -> None:
    file = min((own_tree / "images_background" / MAGI).iterdir())
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(FewShotError, match=line(str(file), "expected an undamaged PNG")):
        omniglot.load(own_tree)


def test_a_wrong_cache_is_named(
    dataset: Dataset, own_cache: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = Dataset("omniglot", dataset.train, dataset.test, dataset.val)
    monkeypatch.setattr(omniglot, "cached", lambda name, key, build: swapped)
    with pytest.raises(FewShotError, match=line("val split has 423 classes", "expected 688", "cache")):
        omniglot.load(real_data)


def test_repacked_archives_with_clutter_are_read(tree: Path, own_cache: Path, tmp_path: Path) -> None:
    """Members below another folder, folder entries and macOS's shadow files are no drawings."""
    path = tmp_path / "clutter.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("my/omniglot/", b"")
        for file in sorted((tree / "images_background" / MAGI).iterdir()):
            archive.write(file, f"my/omniglot/images_background/{MAGI}/{file.name}")
            archive.writestr(f"__MACOSX/my/omniglot/images_background/{MAGI}/._{file.name}", b"shadow")
    members = omniglot._members(path)
    assert list(members) == [MAGI]
    assert len(members[MAGI]) == 20
    assert omniglot._read(path, members)[MAGI].shape == (20, 1, 28, 28)
