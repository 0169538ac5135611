"""CIFAR-100 by class, in the forms people have it: what CIFAR-FS and FC100 are made of."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from fewshot_asam.data.archives import decode_image, fetch, list_tree, locate, read_file, read_tar
from fewshot_asam.data.cache import SPLITS, cached, fingerprint
from fewshot_asam.data.hdf5 import own_member, read_bytes
from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.data.pickles import load_plain, parse_plain
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.files import open_regular

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "md5:eb9058c3a382ffc7106e4002c42a8d85"
CLASSES = 100
PER_CLASS = 600
"""Images of a class: 500 of CIFAR-100's training batch, then 100 of its test batch."""
SIDE = 32
PIXELS = 3 * SIDE * SIDE
LARGEST = 250_000_000
"""Bytes of an archive's content; CIFAR-100's has 187 million."""
SUBFOLDERS = ("cifar100", "cifar-100", "cifarfs", "cifar_fs", "fc100", "cifarfs/cifar100")

Classes = Mapping[str, NDArray[np.uint8]]
"""Class name to its images, uint8 `[600, 3, 32, 32]`."""


class Form(NamedTuple):
    """A form of CIFAR-100 on disk.

    - `name`: of the file or folder.
    - `read`: what reads it.
    - `pattern`: of the files that a folder has.
    - `mark`: what lies in a folder that is meant.
    """

    name: str
    read: Callable[[Path], Classes]
    pattern: str = "*"
    mark: str = ""


def load_divided(name: str, root: Path | None) -> Dataset:
    """CIFAR-100's 60,000 images, its classes divided as `splits/<name>_{train,val,test}.txt` say."""
    names = {split: split_classes(name, split) for split in SPLITS}
    if root is not None and (pickles := _find_pickles(name, root)):
        key = fingerprint(pickles.values(), PER_CLASS, names)
        return cached(name, key, lambda: Dataset(name, *(_read_pickle(pickles[s], s, len(names[s])) for s in SPLITS)))
    path, form = (fetch(URL, MD5, FORMS[0].name), FORMS[0]) if root is None else _find(root)
    stamps = list_tree(path, form.pattern) if path.is_dir() else {}
    return cached(name, fingerprint([path], stamps, PER_CLASS, names), lambda: _build(name, names, path, form))


def split_classes(name: str, split: str) -> list[str]:
    """The classes of a split of `"cifar_fs"` or `"fc100"`, sorted."""
    return (resources.files(__package__) / "splits" / f"{name}_{split}.txt").read_text("utf-8").split()


def _find_pickles(name: str, root: Path) -> dict[str, Path]:
    """The file of each split, where they are pickles, as MetaOptNet and learn2learn have them; else nothing."""
    prefix = name.upper()
    train = locate(root, (f"{prefix}_train.pickle",), (*SUBFOLDERS, prefix, prefix.replace("_", "-")))
    return {split: train.with_name(f"{prefix}_{split}.pickle") for split in SPLITS} if train else {}


def _read_pickle(file: Path, split: str, classes: int) -> ImageSet:
    """A split whose classes are known by their labels alone, and named `<split> NN` after them."""
    match load_plain(file):
        case {"data": np.ndarray() as pixels, "labels": list() | np.ndarray() as labels}:
            pass
        case _:
            raise FewShotError(f"{file} has other content; expected a dict of an array data and a list labels")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), SIDE, SIDE, 3):
        raise FewShotError(
            f"{file}: data is {pixels.dtype} {list(pixels.shape)}; expected uint8 [{len(labels)}, {SIDE}, {SIDE}, 3]"
        )
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise FewShotError(f"{file}: labels are not all whole numbers; expected one an image")
    images = ImageSet.from_arrays(pixels, [int(label) for label in labels])
    if images.counts.tolist() != [PER_CLASS] * classes:
        raise FewShotError(
            f"{file} has {len(images.names)} classes of {int(images.counts.min())} images or more; "
            f"expected {classes} of {PER_CLASS}"
        )
    return ImageSet(images.images, images.counts, tuple(f"{split} {int(label):02d}" for label in images.names))


def _find(root: Path) -> tuple[Path, Form]:
    for form in FORMS:
        found = locate(root, (f"{form.name}/{form.mark}" if form.mark else form.name,), SUBFOLDERS)
        if found is not None:
            return (found.parent if form.mark else found), form
    raise FewShotError(
        f"there is no CIFAR-100 in {root}; expected cifar-100-python.tar.gz, cifar-100-binary.tar.gz, one of them "
        f"unpacked, data.hdf5 or data/<class>/*.png, there or in its folder {SUBFOLDERS[0]}; get it from {URL}, or "
        "leave the root out to download it"
    )


def _build(name: str, names: Mapping[str, list[str]], path: Path, form: Form) -> Dataset:
    classes = form.read(path)
    known = {label for split in SPLITS for label in names[split]}
    if other := sorted(known ^ classes.keys()):
        raise FewShotError(
            f"{path} has not the {CLASSES} classes of CIFAR-100: they differ in {', '.join(other[:5])}; expected the "
            "whole of it"
        )
    return Dataset(name, *(_split(names[split], classes) for split in SPLITS))


def _split(names: list[str], classes: Classes) -> ImageSet:
    images = torch.from_numpy(np.concatenate([classes[name] for name in names]))
    return ImageSet(images, torch.full((len(names),), PER_CLASS), tuple(names))


def _read_python(path: Path) -> Classes:
    parts = _parts(path, ("train", "test", "meta"))
    match parse_plain(parts["meta"], f"{path}: meta"):
        case {"fine_label_names": list() as names}:
            pass
        case _:
            raise FewShotError(f"{path}: meta has other content; expected a dict with a list fine_label_names")
    batches = [_batch(parts[part], f"{path}: {part}") for part in ("train", "test")]
    return _by_class([pixels for pixels, _ in batches], [labels for _, labels in batches], names, str(path))


def _batch(content: bytes, origin: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    match parse_plain(content, origin):
        case {"data": np.ndarray() as pixels, "fine_labels": list() as labels}:
            pass
        case _:
            raise FewShotError(f"{origin} has other content; expected a dict of an array data and a list fine_labels")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise FewShotError(
            f"{origin}: data is {pixels.dtype} {list(pixels.shape)}; expected uint8 [{len(labels)}, {PIXELS}]"
        )
    if not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise FewShotError(f"{origin}: fine_labels are not all labels; expected whole numbers from 0 to {CLASSES - 1}")
    return pixels, np.array(labels, np.int64)


def _read_binary(path: Path) -> Classes:
    parts = _parts(path, ("train.bin", "test.bin", "fine_label_names.txt"))
    records = []
    for part in ("train.bin", "test.bin"):
        content = np.frombuffer(parts[part], np.uint8)
        if len(content) % (2 + PIXELS):
            raise FewShotError(f"{path}: {part} has {len(content)} bytes; expected records of {2 + PIXELS}")
        records.append(content.reshape(-1, 2 + PIXELS))
    names = parts["fine_label_names.txt"].decode("latin1").split()
    return _by_class([part[:, 2:] for part in records], [part[:, 1] for part in records], names, str(path))


def _parts(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The content of files of the archive at `path`, or of its unpacked tree."""
    if path.is_dir():
        return {name: read_file(path / name, LARGEST) for name in names}
    folder = path.name.removesuffix(".tar.gz")
    members = read_tar(path, [f"{folder}/{name}" for name in names], LARGEST)
    return {name: members[f"{folder}/{name}"] for name in names}


def _by_class(
    pixels: Sequence[NDArray[np.uint8]], labels: Sequence[NDArray[np.integer]], names: Sequence[object], origin: str
) -> Classes:
    """The images, `[n, 3072]` a batch, by the names of their labels; in each class in the order of the batches."""
    if len(names) != CLASSES or not all(isinstance(name, str) for name in names):
        raise FewShotError(f"{origin} names {len(names)} classes; expected {CLASSES}")
    every = np.concatenate(labels).astype(np.int64)
    counts = np.bincount(every, minlength=CLASSES)
    for label, count in enumerate(counts.tolist()):
        if label >= CLASSES or count != PER_CLASS:
            raise FewShotError(f"{origin} has {count} images of label {label}; expected {PER_CLASS} of each of 0 to 99")
    order = every.argsort(kind="stable").reshape(CLASSES, PER_CLASS)
    images = np.concatenate(pixels).reshape(-1, 3, SIDE, SIDE)
    return {str(name): images[members] for name, members in zip(names, order, strict=True)}


def _read_hdf5(path: Path) -> Classes:
    classes: dict[str, NDArray[np.uint8]] = {}
    try:
        with open_regular(path) as opened, h5py.File(opened) as stored:
            for coarse in stored:
                group = own_member(stored, coarse, h5py.Group, f"{path}: {coarse}")
                for fine in group:
                    origin = f"{path}: {coarse}/{fine}"
                    if fine in classes or len(classes) == CLASSES:
                        raise FewShotError(f"{origin} is a class too many; expected CIFAR-100's {CLASSES}, each once")
                    content = own_member(group, fine, h5py.Dataset, origin)
                    images = read_bytes(content, (PER_CLASS, SIDE, SIDE, 3), origin)
                    classes[fine] = images.transpose(0, 3, 1, 2)
    # What HDF5 raises for a damaged file is open-ended.
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise FewShotError(
            f"{path} cannot be read ({reason}); expected HDF5 with a group a superclass of one dataset a class"
        ) from error
    return classes


def _read_tree(path: Path) -> Classes:
    members: dict[str, list[str]] = {}
    for file in list_tree(path, "*/*.png"):
        members.setdefault(file.partition("/")[0], []).append(file)
    for name, files in members.items():
        if len(files) != PER_CLASS:
            raise FewShotError(f"{path / name} has {len(files)} PNGs; expected {PER_CLASS}")
    return {name: np.stack([_image(path / file) for file in files]) for name, files in members.items()}


def _image(path: Path) -> NDArray[np.uint8]:
    return decode_image(read_file(path), str(path), "RGB", (SIDE, SIDE))


FORMS = (
    Form("cifar-100-python.tar.gz", _read_python),
    Form("cifar-100-python", _read_python),
    Form("cifar-100-binary.tar.gz", _read_binary),
    Form("cifar-100-binary", _read_binary),
    Form("data.hdf5", _read_hdf5),
    Form("data", _read_tree, "*/*.png", "apple"),
    Form("cifar100/data", _read_tree, "*/*.png", "apple"),
)
"""Krizhevsky's archives and their trees, torchmeta's HDF5 and the PNGs of Bertinetto's archive, which learn2learn uses.

The first of them is read that is found in the root, or in one of `SUBFOLDERS` there."""
