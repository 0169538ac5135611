"""tieredImageNet from small files of the forms that its authors' and others' tools write."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot_asam.data import Dataset, cache, load_dataset, tiered_imagenet
from fewshot_asam.data.cache import SPLITS
from fewshot_asam.data.tiered_imagenet import Size, load
from fewshot_asam.errors import FewShotError
from test_archives import line

COUNTS = {"train": [3, 5, 2], "val": [4, 1], "test": [2, 2]}
WORDS = {"train": ["tench", "crane", "crane"], "val": ["hen", "ox, cattle"], "test": ["a", "b"]}

Splits = dict[str, tuple[np.ndarray, np.ndarray]]
"""Split to its images, uint8 `[n, 84, 84, 3]` in RGB, and labels, in random order."""


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Splits:
    sizes = {split: Size(len(counts), sum(counts)) for split, counts in COUNTS.items()}
    monkeypatch.setattr(tiered_imagenet, "EXPECTED", sizes)
    chance, made = np.random.default_rng(0), {}
    for split, counts in COUNTS.items():
        labels = chance.permutation(np.repeat(np.arange(len(counts)), counts))
        made[split] = chance.integers(0, 256, (len(labels), 84, 84, 3), np.uint8), labels
    return made


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(pixels: np.ndarray) -> np.ndarray:
    """As `cv2.imencode` gives it: uint8 `[bytes, 1]`."""
    return np.frombuffer(png(pixels), np.uint8)[:, None]


def label_file(split: str, labels: np.ndarray) -> dict[str, object]:
    specific = {"label_specific": labels.astype(np.int32), "label_specific_str": WORDS[split]}
    return {**specific, "label_general": labels // 2, "label_general_str": ["fish"]}


def write_pickles(root: Path, splits: Splits, protocol: int = 2) -> None:
    """As Ren et al. do."""
    for split, (images, labels) in splits.items():
        (root / f"{split}_images_png.pkl").write_bytes(pickle.dumps(list(map(encoded, images)), protocol))
        (root / f"{split}_labels.pkl").write_bytes(pickle.dumps(label_file(split, labels), protocol))


def write_new_pickles(root: Path, splits: Splits) -> None:
    (root / "tiered-imagenet").mkdir()
    write_pickles(root / "tiered-imagenet", splits, 5)


def write_bytes(root: Path, splits: Splits) -> None:
    write_pickles(root, splits)
    for split, (images, _) in splits.items():
        (root / f"{split}_images_png.pkl").write_bytes(pickle.dumps(list(map(png, images)), 4))


def write_npz(root: Path, splits: Splits) -> None:
    """As Ren et al. unpack it, in OpenCV's order of colours."""
    write_pickles(root, splits)
    for split, (images, _) in splits.items():
        (root / f"{split}_images_png.pkl").unlink()
        np.savez(root / f"{split}_images.npz", images=np.ascontiguousarray(images[..., ::-1]))


def write_npz_with_plain_labels(root: Path, splits: Splits) -> None:
    """As others do: compressed, with a list of labels that go on from split to split."""
    write_npz(root, splits)
    for split, (images, labels) in splits.items():
        np.savez_compressed(root / f"{split}_images.npz", images=np.ascontiguousarray(images[..., ::-1]))
        first = {"train": 0, "val": 3, "test": 5}[split]
        (root / f"{split}_labels.pkl").write_bytes(pickle.dumps({"labels": (labels + first).tolist()}))


WRITERS: dict[str, Callable[[Path, Splits], None]] = {
    "pickles": write_pickles,
    "new pickles": write_new_pickles,
    "bytes": write_bytes,
    "npz": write_npz,
    "npz with plain labels": write_npz_with_plain_labels,
}


def check(dataset: Dataset, splits: Splits) -> None:
    for split, (pixels, labels) in splits.items():
        images = getattr(dataset, split)
        assert images.counts.tolist() == COUNTS[split]
        expected = np.concatenate([pixels[labels == label] for label in range(len(COUNTS[split]))])
        assert np.array_equal(images.images.numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_images(tmp_path: Path, splits: Splits, form: str) -> None:
    (tmp_path / "root").mkdir()
    WRITERS[form](tmp_path / "root", splits)
    check(load_dataset("tiered_imagenet", tmp_path / "root"), splits)
    shutil.copytree(tmp_path / "root", tmp_path / "kept")
    for file in tmp_path.glob("root/**/*_images*"):
        stamp = file.stat()
        file.write_bytes(bytes(stamp.st_size))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check(load(tmp_path / "root"), splits)  # from the cache


def test_classes_of_the_same_words_are_told_apart(tmp_path: Path, splits: Splits) -> None:
    write_pickles(tmp_path, splits)
    dataset = load(tmp_path)
    assert dataset.train.names == ("train 000 tench", "train 001 crane", "train 002 crane")
    assert dataset.val.names == ("val 000 hen", "val 001 ox, cattle")
    write_npz_with_plain_labels(tmp_path, splits)
    assert load(tmp_path).test.names == ("test 005", "test 006")


def test_the_images_stay_in_the_file(tmp_path: Path, splits: Splits, own_cache: Path) -> None:
    """A change of the cached file is seen in the tensors."""
    write_pickles(tmp_path, splits)
    images = load(tmp_path).test.images
    (file,) = own_cache.glob("datasets/*/test.safetensors")
    content = file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(len(content) - 10)
        opened.write(bytes(255 - value for value in content[-10:]))
    changed = images.flatten()[-10:].tolist()
    assert changed == [255 - value for value in content[-10:]]


def test_a_damaged_copy_is_made_anew(tmp_path: Path, splits: Splits, own_cache: Path) -> None:
    write_pickles(tmp_path, splits)
    load(tmp_path)
    (file,) = own_cache.glob("datasets/*/test.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="tiered_imagenet in .* is damaged and built anew"):
        check(load(tmp_path), splits)


def test_the_room_that_it_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: Splits) -> None:
    write_pickles(tmp_path, splits)
    sizes = {"train": Size(351, 448_695), "val": Size(97, 124_261), "test": Size(160, 206_209)}
    with monkeypatch.context() as patch:
        patch.setattr(tiered_imagenet, "EXPECTED", sizes)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**33))
        with pytest.raises(FewShotError, match=line("takes 15.4 GiB in the cache", "has 8.0 GiB; set FEWSHOT_ASAM_CA")):
            load(tmp_path)

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FewShotError, match=line("cannot be used", "No space left", "FEWSHOT_ASAM_CACHE")):
        load(tmp_path)
    assert list(cache.cache_dir().glob("datasets/*")) == []


def refuse(root: Path | None, *said: str) -> None:
    with pytest.raises(FewShotError, match=line(*said)):
        load(root)


def test_what_is_missing_is_named(tmp_path: Path, splits: Splits) -> None:
    refuse(None, "no --data-root was given", "train_images_png.pkl or train_images.npz", "few-shot-ssl-public")
    refuse(tmp_path, f"{tmp_path} has not all", "train_images_png.pkl")
    write_pickles(tmp_path, splits)
    (tmp_path / "val_labels.pkl").unlink()
    refuse(tmp_path, "val_labels.pkl")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, 1], "expected a dict with whole numbers label_specific or labels"),
        ({"label_specific": "0"}, "expected a dict with whole numbers"),
        ({"labels": [0.5] * 5}, "expected a dict with whole numbers"),
        ({"labels": [[0], [1, 2]]}, "expected a dict with whole numbers"),
        ({"labels": np.eye(5, dtype=int)}, "expected a dict with whole numbers"),
        ({"labels": [0, 0, 0, 1]}, "has 4 images of 2 classes; expected the 5 of 2 of val"),
        ({"labels": [0, 0, 0, 1, 2]}, "has 5 images of 3 classes"),
        ({"labels": print}, "builtins.print"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, splits: Splits, labels: object, reason: str) -> None:
    write_pickles(tmp_path, splits)
    (tmp_path / "val_labels.pkl").write_bytes(pickle.dumps(labels))
    refuse(tmp_path, "val_labels.pkl", reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts[:-1], "has 4 images; expected 5"),
        (lambda parts: [*parts, parts[0].copy()], "has more images; expected 5"),
        (lambda parts: [*parts[:2], "text", *parts[3:]], "image 2 is a str; expected the bytes of a PNG"),
        (lambda parts: [parts[0][:100], *parts[1:]], "image 0 cannot be decoded"),
        (lambda parts: [print, *parts[1:]], "builtins.print"),
        (lambda parts: {"images": 1}, "it is no list"),
    ],
)
def test_wrong_images_are_named(
    tmp_path: Path, splits: Splits, own_cache: Path, change: Callable[[list[np.ndarray]], object], reason: str
) -> None:
    write_pickles(tmp_path, splits)
    file = tmp_path / "val_images_png.pkl"
    file.write_bytes(pickle.dumps(change(list(map(encoded, splits["val"][0])))))
    refuse(tmp_path, str(file), reason)
    assert list(own_cache.glob("datasets/*")) == []


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": np.zeros((5, 3, 84, 84), np.uint8)}, "uint8 [5, 3, 84, 84]); expected uint8 [5, 84, 84, 3]"),
        ({"images": np.zeros((5, 84, 84, 3), np.float32)}, "float32 [5, 84, 84, 3]"),
        ({"images": np.array([print] * 5)}, "object [5]"),
        ({"pixels": np.zeros(3)}, "images.npy"),
        (None, "complete zip archive"),
    ],
)
def test_a_wrong_npz_is_named(
    tmp_path: Path, splits: Splits, arrays: dict[str, np.ndarray] | None, reason: str
) -> None:
    write_npz(tmp_path, splits)
    file = tmp_path / "val_images.npz"
    if arrays is None:
        file.write_bytes(file.read_bytes()[:1000])
    else:
        np.savez(file, **arrays)
    refuse(tmp_path, str(file), reason)


def test_a_flipped_byte_is_noticed(tmp_path: Path, splits: Splits) -> None:
    write_npz(tmp_path, splits)
    content = bytearray((tmp_path / "val_images.npz").read_bytes())
    content[50_000] ^= 1
    (tmp_path / "val_images.npz").write_bytes(content)
    refuse(tmp_path, "val_images.npz", "CRC")


def test_the_splits_have_the_published_sizes() -> None:
    assert [tuple(tiered_imagenet.EXPECTED[split]) for split in SPLITS] == [
        (351, 448_695),
        (97, 124_261),
        (160, 206_209),
    ]
    assert torch.tensor([size.images for size in tiered_imagenet.EXPECTED.values()]).sum() == 779_165
