"""CIFAR-FS and FC100 from every form of CIFAR-100: small copies, written as the real files are."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from fewshot_asam.data import Dataset, cifar100, cifar_fs, fc100, load_dataset
from fewshot_asam.data.cache import SPLITS
from fewshot_asam.data.cifar100 import split_classes
from fewshot_asam.errors import FewShotError
from test_archives import line, serve

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
FINE = sorted(" ".join(SUPERCLASSES.values()).split())
COARSE = {fine: index for index, fines in enumerate(SUPERCLASSES.values()) for fine in fines.split()}
PER_CLASS, TRAIN = 3, 2

Batches = dict[str, tuple[np.ndarray, np.ndarray]]
"""Batch to its images, uint8 `[n, 3072]`, and fine labels `[n]`, in random order."""


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Batches:
    monkeypatch.setattr(cifar100, "PER_CLASS", PER_CLASS)
    chance = np.random.default_rng(0)
    made = {}
    for name, count in (("train", TRAIN), ("test", PER_CLASS - TRAIN)):
        labels = chance.permutation(np.repeat(np.arange(100), count))
        made[name] = chance.integers(0, 256, (len(labels), 3072), np.uint8), labels
    return made


def text(value: str) -> bytes:
    """As Python 2 pickles it, and so for all below."""
    return b"U" + bytes([len(value)]) + value.encode()


def integers(values: np.ndarray) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values.tolist()) + b"e"


def array(pixels: np.ndarray) -> bytes:
    shape = b"".join(b"M" + struct.pack("<H", size) for size in pixels.shape) + b"\x86"
    dtype = (
        b"cnumpy\ndtype\n"
        + text("u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    )
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R(K\x01"
    return start + shape + dtype + b"K\x00tb\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes() + b"tb"


def python_batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    coarse = np.array([COARSE[FINE[label]] for label in labels])
    names = b"](" + b"".join(text(f"some_{index:06d}.png") for index in range(len(labels))) + b"e"
    parts = {"filenames": names, "batch_label": text("a batch"), "fine_labels": integers(labels)}
    parts |= {"coarse_labels": integers(coarse), "data": array(pixels)}
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in parts.items()) + b"u."


def python_files(batches: Batches) -> dict[str, bytes]:
    fine, coarse = (b"](" + b"".join(map(text, names)) + b"e" for names in (FINE, SUPERCLASSES))
    meta = b"\x80\x02}(" + text("fine_label_names") + fine + text("coarse_label_names") + coarse + b"u."
    return {"meta": meta, "file.txt~": b"", **{name: python_batch(*batch) for name, batch in batches.items()}}


def binary_files(batches: Batches) -> dict[str, bytes]:
    files = {"fine_label_names.txt": "\n".join([*FINE, ""]).encode(), "coarse_label_names.txt": b"fish\n"}
    for name, (pixels, labels) in batches.items():
        coarse = np.array([COARSE[FINE[label]] for label in labels])
        files[f"{name}.bin"] = np.concatenate([np.stack([coarse, labels], 1).astype(np.uint8), pixels], 1).tobytes()
    return files


def images_of(batches: Batches, name: str) -> np.ndarray:
    """uint8 `[3, 3, 32, 32]`: the images of a class, those of the training batch first."""
    chosen = [pixels[labels == FINE.index(name)] for pixels, labels in batches.values()]
    return np.concatenate(chosen).reshape(-1, 3, 32, 32)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_archive(folder: Path, files: dict[str, bytes]) -> None:
    write_files(folder, files)
    with tarfile.open(f"{folder}.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def write_hdf5(root: Path, batches: Batches) -> None:
    """As torchmeta does."""
    (root / "cifar100").mkdir(exist_ok=True)
    with h5py.File(root / "cifar100" / "data.hdf5", "w") as file:
        for coarse, fines in SUPERCLASSES.items():
            for fine in fines.split():
                file[f"{coarse}/{fine}"] = images_of(batches, fine).transpose(0, 2, 3, 1)
    names = {coarse: fines.split() for coarse, fines in SUPERCLASSES.items()}
    (root / "cifar100" / "fine_names.json").write_text(json.dumps(names))


def write_tree(folder: Path, batches: Batches) -> None:
    """As in Bertinetto's archive."""
    for name in FINE:
        (folder / "data" / name).mkdir(parents=True)
        for index, image in enumerate(images_of(batches, name)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / "data" / name / f"{index:04d}.png")
    (folder / "splits" / "bertinetto").mkdir(parents=True)
    for split in SPLITS:
        (folder / "splits" / "bertinetto" / f"{split}.txt").write_text("\n".join(split_classes("cifar_fs", split)))


WRITERS: dict[str, Callable[[Path, Batches], None]] = {
    "python archive": lambda root, made: write_archive(root / "cifar-100-python", python_files(made)),
    "python tree": lambda root, made: write_files(root / "cifar100" / "cifar-100-python", python_files(made)),
    "binary archive": lambda root, made: write_archive(root / "cifar-100-binary", binary_files(made)),
    "binary tree": lambda root, made: write_files(root / "cifar-100-binary", binary_files(made)),
    "torchmeta": write_hdf5,
    "learn2learn": lambda root, made: write_tree(root / "cifarfs" / "cifar100", made),
    "bertinetto": lambda root, made: write_tree(root / "cifarfs", made),
    "data root": write_tree,
}


def check(dataset: Dataset, name: str, batches: Batches) -> None:
    assert dataset.name == name
    for split in SPLITS:
        images = getattr(dataset, split)
        assert list(images.names) == split_classes(name, split)
        assert images.counts.tolist() == [PER_CLASS] * len(images.names)
        expected = np.concatenate([images_of(batches, label) for label in images.names])
        assert np.array_equal(images.images.numpy(), expected)


@pytest.mark.parametrize("name", ["cifar_fs", "fc100"])
@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_images(tmp_path: Path, batches: Batches, form: str, name: str) -> None:
    (tmp_path / "root").mkdir()
    WRITERS[form](tmp_path / "root", batches)
    check(load_dataset(name, tmp_path / "root"), name, batches)
    check(load_dataset(name, tmp_path / "root"), name, batches)  # from the cache


def write_split_pickles(folder: Path, batches: Batches, name: str = "fc100") -> None:
    """As MetaOptNet has them: the images of a split in random order, and labels that are numbers alone."""
    folder.mkdir()
    for split in SPLITS:
        classes = split_classes(name, split)
        labels = np.random.default_rng(1).permutation(np.repeat([FINE.index(label) for label in classes], PER_CLASS))
        seen = [(labels[:index] == label).sum() for index, label in enumerate(labels)]
        pixels = [images_of(batches, FINE[label])[number] for label, number in zip(labels, seen, strict=True)]
        content = {"data": np.stack(pixels).transpose(0, 2, 3, 1), "labels": labels.tolist()}
        (folder / f"{name.upper()}_{split}.pickle").write_bytes(pickle.dumps(content, 2))


@pytest.mark.parametrize(("name", "folder"), [("fc100", "FC100"), ("cifar_fs", "CIFAR-FS")])
def test_pickles_of_a_split_each(tmp_path: Path, batches: Batches, name: str, folder: str) -> None:
    write_split_pickles(tmp_path / folder, batches, name)
    dataset = load_dataset(name, tmp_path)
    for split in SPLITS:
        images, classes = getattr(dataset, split), split_classes(name, split)
        assert list(images.names) == [f"{split} {FINE.index(label):02d}" for label in classes]
        expected = np.concatenate([images_of(batches, label) for label in classes])
        assert np.array_equal(images.images.numpy(), expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"data": np.zeros((60, 3, 32, 32), np.uint8), "labels": [0] * 60}, "uint8 [60, 3, 32, 32]; expected uint8"),
        ({"data": np.zeros((60, 32, 32, 3), np.uint8), "labels": ["a"] * 60}, "labels are not all whole numbers"),
        ({"data": np.zeros((60, 32, 32, 3), np.uint8), "labels": [0] * 60}, "has 1 classes of 60 images or more"),
        ({"data": np.zeros((0, 32, 32, 3), np.uint8), "labels": []}, "expected"),
        ({"labels": []}, "expected a dict of an array data and a list labels"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_pickle_of_a_split(tmp_path: Path, batches: Batches, content: object, reason: str) -> None:
    write_split_pickles(tmp_path / "FC100", batches)
    file = tmp_path / "FC100" / "FC100_val.pickle"
    file.write_bytes(b"" if content is None else pickle.dumps(content))
    with pytest.raises(FewShotError, match=line(reason)):
        fc100.load(tmp_path)
    file.unlink()
    with pytest.raises(FewShotError, match=line(str(file))):
        fc100.load(tmp_path)


@pytest.mark.parametrize(("name", "sizes"), [("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])])
def test_each_class_is_in_one_split(name: str, sizes: list[int]) -> None:
    parts = [split_classes(name, split) for split in SPLITS]
    assert [len(part) for part in parts] == sizes
    assert sorted(name for part in parts for name in part) == FINE
    assert all(part == sorted(part) for part in parts)


def test_no_superclass_is_divided_in_fc100_and_most_are_in_cifar_fs() -> None:
    def divided(name: str) -> int:
        parts = [set(split_classes(name, split)) for split in SPLITS]
        return sum(not any(set(fines.split()) <= part for part in parts) for fines in SUPERCLASSES.values())

    assert divided("fc100") == 0
    assert divided("cifar_fs") > 10


def test_it_is_downloaded_where_no_root_is_given(
    tmp_path: Path, batches: Batches, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "cifar-100-python", python_files(batches))
    with serve(tmp_path) as address:
        monkeypatch.setattr(cifar100, "URL", f"{address}/cifar-100-python.tar.gz")
        with pytest.raises(FewShotError, match=line("eb9058c3a382ffc7106e4002c42a8d85", "--data-root")):
            cifar_fs.load()
        content = (tmp_path / "cifar-100-python.tar.gz").read_bytes()
        monkeypatch.setattr(cifar100, "MD5", f"md5:{hashlib.md5(content).hexdigest()}")
        check(cifar_fs.load(), "cifar_fs", batches)
    assert (own_cache / "downloads" / "cifar-100-python.tar.gz").read_bytes() == content
    check(fc100.load(), "fc100", batches)


def test_a_change_is_not_from_the_cache(tmp_path: Path, batches: Batches) -> None:
    write_tree(tmp_path, batches)
    before = cifar_fs.load(tmp_path).train.images[0]
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / split_classes("cifar_fs", "train")[0] / "0000.png")
    assert before.any()
    assert not cifar_fs.load(tmp_path).train.images[0].any()


def refuse(root: Path, *said: str) -> None:
    with pytest.raises(FewShotError, match=line(*said)):
        cifar_fs.load(root)


def test_nothing_is_there(tmp_path: Path, own_cache: Path) -> None:
    refuse(tmp_path, f"no CIFAR-100 in {tmp_path}", "cifar-100-python.tar.gz", "data.hdf5")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("meta", b"\x80\x02}.", "meta has other content; expected a dict with a list fine_label_names"),
        ("meta", b"cos\nsystem\n(U\x04truetR.", "os.system"),
        ("meta", b"\x80\x02}" + text("fine_label_names") + b"](" + text("apple") + b"es.", "names 1 classes"),
        ("train", b"\x80\x02].", "train has other content"),
        ("test", None, "cannot be read"),
        ("train", b"", "train cannot be read as plain data"),
        ("test", python_batch(np.zeros((100, 3000), np.uint8), np.arange(100)), "uint8 [100, 3000]; expected"),
        ("test", python_batch(np.zeros((99, 3072), np.uint8), np.arange(99)), "has 2 images of label 99; expected 3"),
    ],
)
def test_a_wrong_python_tree(tmp_path: Path, batches: Batches, file: str, content: bytes | None, reason: str) -> None:
    write_files(tmp_path / "cifar-100-python", {**python_files(batches), file: content or b""})
    if content is None:
        (tmp_path / "cifar-100-python" / file).unlink()
    refuse(tmp_path, "cifar-100-python", reason)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("train.bin", bytes(3074 * 7 + 1), "train.bin has 21519 bytes; expected records of 3074"),
        ("test.bin", bytes([0, 200]) + bytes(3072), "images of label"),
        ("fine_label_names.txt", b"apple", "names 1 classes; expected 100"),
        ("fine_label_names.txt", " ".join(["pinapple", *FINE[1:]]).encode(), "differ in apple, pinapple"),
    ],
)
def test_a_wrong_binary_tree(tmp_path: Path, batches: Batches, file: str, content: bytes, reason: str) -> None:
    write_files(tmp_path / "cifar-100-binary", {**binary_files(batches), file: content})
    refuse(tmp_path, "cifar-100-binary", reason)


def test_a_wrong_archive(tmp_path: Path, batches: Batches) -> None:
    write_archive(tmp_path / "cifar-100-python", python_files(batches))
    archive = tmp_path / "cifar-100-python.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, str(archive), "fetch it again")
    archive.unlink()
    os.mkfifo(archive)
    refuse(tmp_path, str(archive), "named pipe")
    archive.unlink()
    write_archive(tmp_path / "cifar-100-python", {"meta": b""})
    refuse(tmp_path, f"{archive} has no member cifar-100-python/train")


def test_a_wrong_hdf5(tmp_path: Path, batches: Batches) -> None:
    write_hdf5(tmp_path, batches)
    with h5py.File(tmp_path / "cifar100" / "data.hdf5", "a") as file:
        del file["fish/trout"]
        file["fish/trout"] = np.zeros((3, 3, 32, 32), np.uint8)
    refuse(tmp_path, "data.hdf5: fish/trout is uint8 [3, 3, 32, 32]; expected uint8 [3, 32, 32, 3]")
    with h5py.File(tmp_path / "cifar100" / "data.hdf5", "a") as file:
        del file["fish/trout"]
        file["fish/trout"] = h5py.ExternalLink("other.hdf5", "trout")
    refuse(tmp_path, "fish/trout is a ExternalLink")
    for more in ("people/trout", "vehicles_2/zeppelin"):
        write_hdf5(tmp_path, batches)
        with h5py.File(tmp_path / "cifar100" / "data.hdf5", "a") as file:
            file[more] = np.zeros((3, 32, 32, 3), np.uint8)
        refuse(tmp_path, f"{more} is a class too many")
    (tmp_path / "cifar100" / "data.hdf5").write_bytes(b"no HDF5")
    refuse(tmp_path, "data.hdf5 cannot be read")


def test_a_wrong_tree(tmp_path: Path, batches: Batches) -> None:
    write_tree(tmp_path, batches)
    (tmp_path / "data" / "lion" / "0000.png").write_bytes(b"no image")
    refuse(tmp_path, "data/lion/0000.png is not an image")
    (tmp_path / "data" / "lion" / "0000.png").unlink()
    refuse(tmp_path, "data/lion has 2 PNGs; expected 3")
    for file in (tmp_path / "data" / "lion").iterdir():
        file.unlink()
    refuse(tmp_path, "differ in lion")
