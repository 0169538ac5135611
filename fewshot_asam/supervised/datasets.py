"""Training and test images of the same classes: CIFAR's archives, class folders and zips, Mini-ImageNet's classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fewshot_asam.data import cifar100, load_dataset
from fewshot_asam.data.archives import (
    decode_image,
    fetch,
    list_tree,
    locate,
    open_zip,
    read_file,
    read_member,
    read_tar,
)
from fewshot_asam.data.cache import cached, fingerprint
from fewshot_asam.data.folder import SUFFIXES
from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.data.pickles import parse_plain
from fewshot_asam.errors import FewShotError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "md5:c58f30108f718f92721af3b95e74349a"
LARGEST = 250_000_000
"""Bytes of an archive's content; CIFAR-10's has 186 million."""
SIDE = 32
PIXELS = 3 * SIDE * SIDE
TRAIN_PER_CLASS = {"cifar100": 500, "mini_imagenet": 500}
"""Of the 600 images of a class; the others are for the test."""
PYTHON = tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"
BINARY = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin", "batches.meta.txt"

Batch = tuple[NDArray[np.uint8], list[int]]


def load(name: str, root: Path | None, image_size: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images, uint8 `[n, C, H, W]` each, of the same classes in the same order.

    Raises `FewShotError` where there are none, or what is there is damaged or not as expected.
    """
    if name == "folder":
        dataset = _folder(root, image_size)
    elif name == "mini_imagenet":
        dataset = _mini_imagenet(root, image_size)
    else:
        dataset = _cifar10(root) if name == "cifar10" else _cifar100(root)
    return dataset.train, dataset.test


def _together(name: str, train: ImageSet, test: ImageSet) -> Dataset:
    """Both as a dataset without validation classes, as the cache keeps it."""
    none = ImageSet(train.images[:0], torch.zeros(len(train.names), dtype=torch.int64), train.names)
    return Dataset(name, train, none, test)


def _cifar10(root: Path | None) -> Dataset:
    path = fetch(URL, MD5, "cifar-10-python.tar.gz") if root is None else _find_cifar10(root)
    stamps = list_tree(path, "*") if path.is_dir() else {}
    return cached("cifar10", fingerprint([path], stamps), lambda: _read_cifar10(path))


def _find_cifar10(root: Path) -> Path:
    names = ("cifar-10-python.tar.gz", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-batches-bin")
    if found := locate(root, names, ("cifar10", "cifar-10")):
        return found
    raise FewShotError(
        f"there is no CIFAR-10 in {root}; expected {', '.join(names)}, there or in its folder cifar10; get it from "
        f"{URL}, or leave the root out to download it"
    )


def _read_cifar10(path: Path) -> Dataset:
    binary = path.name in ("cifar-10-binary.tar.gz", "cifar-10-batches-bin")
    train, test, meta = BINARY if binary else PYTHON
    folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    parts = _members(path, folder, (*train, test, meta))
    read: Callable[[bytes, str], Batch] = _binary_batch if binary else _python_batch
    names = parts[meta].decode("latin1").split() if binary else _label_names(parts[meta], f"{path}: {meta}")
    batches = {part: read(parts[part], f"{path}: {part}") for part in (*train, test)}
    return _together("cifar10", _gathered(batches, train, names), _gathered(batches, (test,), names))


def _members(path: Path, folder: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """The content of files of the archive at `path`, or of its unpacked tree."""
    if path.is_dir():
        return {name: read_file(path / name, LARGEST) for name in names}
    members = read_tar(path, [f"{folder}/{name}" for name in names], LARGEST)
    return {name: members[f"{folder}/{name}"] for name in names}


def _label_names(content: bytes, origin: str) -> list[str]:
    match parse_plain(content, origin):
        case {"label_names": list() as names} if all(isinstance(name, str) for name in names):
            return [str(name) for name in names]
    raise FewShotError(f"{origin} has other content; expected a dict with a list label_names")


def _python_batch(content: bytes, origin: str) -> Batch:
    match parse_plain(content, origin):
        case {"data": np.ndarray() as pixels, "labels": list() as labels}:
            pass
        case _:
            raise FewShotError(f"{origin} has other content; expected a dict of an array data and a list labels")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise FewShotError(
            f"{origin}: data is {pixels.dtype} {list(pixels.shape)}; expected uint8 [{len(labels)}, {PIXELS}]"
        )
    if not all(type(label) is int for label in labels):
        raise FewShotError(f"{origin}: labels are not all whole numbers; expected one an image")
    return pixels, [int(label) for label in labels]


def _binary_batch(content: bytes, origin: str) -> Batch:
    if len(content) % (1 + PIXELS):
        raise FewShotError(f"{origin} has {len(content)} bytes; expected records of {1 + PIXELS}")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0].tolist()


def _gathered(batches: Mapping[str, Batch], parts: tuple[str, ...], names: list[str]) -> ImageSet:
    """The images of some batches by class, in each class in their order."""
    pixels = np.concatenate([batches[part][0] for part in parts]).reshape(-1, 3, SIDE, SIDE)
    labels = [label for part in parts for label in batches[part][1]]
    if sorted(set(labels)) != list(range(len(names))):
        raise FewShotError(
            f"{', '.join(parts)}: labels are {sorted(set(labels))[:12]}, but there are {len(names)} names; expected "
            "each class, from 0"
        )
    return ImageSet.from_arrays(pixels, labels, names)


def _cifar100(root: Path | None) -> Dataset:
    forms = [form for form in cifar100.FORMS if form.name.startswith("cifar-100-")]
    if root is None:
        path, form = fetch(cifar100.URL, cifar100.MD5, forms[0].name), forms[0]
    else:
        places = ((locate(root, (form.name,), cifar100.SUBFOLDERS), form) for form in forms)
        found = next(((path, form) for path, form in places if path), None)
        if found is None:
            raise FewShotError(
                f"there is no CIFAR-100 in {root}; expected {', '.join(form.name for form in forms)}, there or in its "
                f"folder cifar100; get it from {cifar100.URL}, or leave the root out to download it"
            )
        path, form = found
    stamps = list_tree(path, "*") if path.is_dir() else {}

    def build() -> Dataset:
        classes = {name: torch.from_numpy(images) for name, images in form.read(path).items()}
        return _divided("cifar100", classes)

    return cached("cifar100", fingerprint([path], stamps, TRAIN_PER_CLASS), build)


def _divided(name: str, classes: Mapping[str, Tensor]) -> Dataset:
    """The first images of each class for training, the others for the test."""
    first, names = TRAIN_PER_CLASS[name], tuple(sorted(classes))
    parts = [[classes[one][:first] for one in names], [classes[one][first:] for one in names]]
    sets = [ImageSet(torch.cat(part), torch.tensor([len(images) for images in part]), names) for part in parts]
    return _together(name, *sets)


def _mini_imagenet(root: Path | None, image_size: int) -> Dataset:
    """The 64 training classes; of each the first 500 images in the order of their names, and the other 100."""
    train = load_dataset("mini_imagenet", root).train
    small = torch.cat([_resized(part, image_size) for part in torch.split(train.images, 2000)])
    return _divided("mini_imagenet", dict(zip(train.names, torch.split(small, train.counts.tolist()), strict=True)))


def _resized(images: Tensor, side: int) -> Tensor:
    """uint8 images squashed to a square, antialiased."""
    if images.shape[-2:] == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _folder(root: Path | None, side: int) -> Dataset:
    if root is None:
        raise FewShotError("the dataset 'folder' was given no root; expected --data-root with train/ and test/ in it")
    if root.is_dir():
        files = list(stamps := list_tree(root, "*/*/*"))
        key = fingerprint([root], stamps, side)
        return cached("supervised_folder", key, lambda: _from_files(root, files, side, lambda f: read_file(root / f)))
    key = fingerprint([root], side)

    def build() -> Dataset:
        with open_zip(root) as archive:
            return _from_files(root, archive.namelist(), side, lambda name: read_member(archive, name))

    return cached("supervised_folder", key, build)


def _from_files(root: Path, files: list[str], side: int, read: Callable[[str], bytes]) -> Dataset:
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for file in sorted(files):
        steps = file.split("/")
        if len(steps) == 3 and steps[0] in parts and file.lower().endswith(SUFFIXES):
            parts[steps[0]].setdefault(steps[1], []).append(file)
    train, test = parts["train"], parts["test"]
    if not train or train.keys() != test.keys():
        other = ", ".join(sorted(train.keys() ^ test.keys())[:5])
        raise FewShotError(
            f"{root} has {len(train)} classes in train/ and {len(test)} in test/"
            + (f", which differ in {other}" if other else "")
            + "; expected train/<class>/* and test/<class>/* of the same classes"
        )
    sets = (_decoded(root, classes, side, read) for classes in (train, test))
    return _together("folder", *sets)


def _decoded(root: Path, classes: Mapping[str, list[str]], side: int, read: Callable[[str], bytes]) -> ImageSet:
    names = tuple(sorted(classes))
    files = [file for name in names for file in classes[name]]
    images = np.empty((len(files), 3, side, side), np.uint8)
    for index, file in enumerate(files):
        images[index] = decode_image(read(file), f"{root}: {file}", "RGB", (side, side))
    return ImageSet(torch.from_numpy(images), torch.tensor([len(classes[name]) for name in names]), names)
