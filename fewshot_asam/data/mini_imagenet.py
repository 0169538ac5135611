"""Mini-ImageNet in the forms people have it: JPEGs zipped or unpacked, learn2learn's pickles, torchmeta's HDF5."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fewshot_asam.data.archives import decode_image, fetch, list_tree, locate, open_zip, read_file, read_member
from fewshot_asam.data.cache import SPLITS, cached, fingerprint
from fewshot_asam.data.hdf5 import own_member, read_bytes
from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.data.pickles import load_plain
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.files import open_regular


class Sizes(NamedTuple):
    """How many classes each split has, and how many images each class."""

    train: int = 64
    val: int = 16
    test: int = 20
    per_class: int = 600


EXPECTED = Sizes()
SIDE = 84
"""Height and width of an image, in pixels."""

SUBFOLDERS = ("mini-imagenet", "mini_imagenet", "miniimagenet")
ZIPS = ("mini-imagenet.zip", "miniimagenet.zip")
CSVS = {split: (f"{split}.csv",) for split in SPLITS}
PICKLES = {
    "train": ("mini-imagenet-cache-train.pkl",),
    "val": ("mini-imagenet-cache-validation.pkl", "mini-imagenet-cache-val.pkl"),
    "test": ("mini-imagenet-cache-test.pkl",),
}
HDF5S = {split: (f"{split}_data.hdf5",) for split in SPLITS}

ZENODO = "https://zenodo.org/record/7978538/files/"
MD5S = {
    "train": "md5:ee4e80dc7b716f3ceec891d199b5277a",
    "val": "md5:c1145a80890b88d54a67d6e0022d53a5",
    "test": "md5:389b6c59d348b2e1ae9610f00a5e6724",
}
"""Of learn2learn's three pickles; quoted second-hand from the file listing of the Zenodo record."""


class Source(NamedTuple):
    """One form of the dataset on disk.

    - `read`: takes the file of a split, and the split.
    - `files`: by split, the file that it is read from.
    - `rest`: the state of what these files refer to.
    """

    read: Callable[[Path, str], ImageSet]
    files: Mapping[str, Path]
    rest: object = None


def load(root: Path | None = None) -> Dataset:
    """Ravi and Larochelle's 64 / 16 / 20 classes of 600 images, uint8 `[n, 3, 84, 84]`.

    Classes are named by their WordNet ids and sorted by them. The first of these is read that is found in `root` or
    its folder `mini-imagenet`, `mini_imagenet` or `miniimagenet`:

    1. `mini-imagenet.zip` with `images/*.jpg` and `{train,val,test}.csv` (`filename,label`) inside;
    2. the same unpacked;
    3. `mini-imagenet-cache-{train,validation,test}.pkl`;
    4. `{train,val,test}_data.hdf5` with `{train,val,test}_labels.json`.

    The result is cached, and read from there until the files change.

    **Arguments:**

    - `root`: the folder to search; `None` downloads learn2learn's pickles (1.8 GB) from Zenodo.

    Raises `FewShotError` where nothing is found, or what is found is damaged or not the whole of Mini-ImageNet.
    """
    if root is None:
        return cached("mini_imagenet", fingerprint([], EXPECTED, ZENODO, MD5S), lambda: _build(_download()))
    source = _find(root)
    key = fingerprint(set(source.files.values()), source.rest, EXPECTED)
    return cached("mini_imagenet", key, lambda: _build(source))


def _download() -> Source:
    names = {split: PICKLES[split][0] for split in SPLITS}
    return Source(_read_pickle, {split: fetch(ZENODO + name, MD5S[split], name) for split, name in names.items()})


def _find(root: Path) -> Source:
    archive = locate(root, ZIPS, SUBFOLDERS)
    if archive is not None:
        return Source(_read_zip, dict.fromkeys(SPLITS, archive))
    for folder in (root, *(root / subfolder for subfolder in SUBFOLDERS)):
        if (folder / "images").is_dir() and (folder / "train.csv").is_file():
            return Source(_read_folder, _three(folder / "train.csv", CSVS), list_tree(folder, "images/*"))
    pickled = locate(root, PICKLES["train"], SUBFOLDERS)
    if pickled is not None:
        return Source(_read_pickle, _three(pickled, PICKLES))
    stored = locate(root, HDF5S["train"], SUBFOLDERS)
    if stored is not None:
        return Source(_read_hdf5, _three(stored, HDF5S))
    raise FewShotError(
        f"there is no Mini-ImageNet in {root}; expected {ZIPS[0]}, or images/ with train.csv, val.csv and test.csv, "
        f"or mini-imagenet-cache-*.pkl, or *_data.hdf5, there or in its folder {SUBFOLDERS[0]}"
    )


def _three(train: Path, names: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    files = {"train": train}
    for split in ("val", "test"):
        file = locate(train.parent, names[split])
        if file is None:
            raise FewShotError(f"{train.parent} has {train.name} but not {names[split][0]}; expected all three splits")
        files[split] = file
    return files


def _build(source: Source) -> Dataset:
    splits = {split: source.read(source.files[split], split) for split in SPLITS}
    for split, other in (("train", "val"), ("train", "test"), ("val", "test")):
        common = set(splits[split].names) & set(splits[other].names)
        if common:
            raise FewShotError(
                f"{source.files[split]} and {source.files[other]}: class {min(common)!r} is in both {split} and "
                f"{other}; expected disjoint splits"
            )
    return Dataset("mini_imagenet", **splits)


def _read_zip(file: Path, split: str) -> ImageSet:
    with open_zip(file) as archive:
        listing = _listing(read_member(archive, f"{split}.csv"), f"{file}: {split}.csv", split)
        return _decode(listing, str(file), split, lambda name: read_member(archive, name))


def _read_folder(file: Path, split: str) -> ImageSet:
    listing = _listing(read_file(file), str(file), split)
    return _decode(listing, str(file.parent), split, lambda name: read_file(file.parent / name))


def _listing(text: bytes, origin: str, split: str) -> dict[str, list[str]]:
    """The file names of each class, from a CSV of `filename,label`."""
    try:
        header, *rows = csv.reader(text.decode("utf-8-sig").splitlines())
    except (ValueError, csv.Error) as error:
        raise FewShotError(f"{origin} is not a table; expected CSV with the header filename,label") from error
    if header != ["filename", "label"] or any(len(row) != 2 or not "".join(row).isprintable() for row in rows):
        raise FewShotError(f"{origin} has other columns; expected filename,label in each of its rows")
    listing: dict[str, list[str]] = {}
    for filename, label in rows:
        if ".." in PurePosixPath(filename.replace("\\", "/")).parts:
            raise FewShotError(f"{origin} lists {filename}; expected files in the folder images")
        listing.setdefault(label, []).append(filename)
    _check_members(listing, origin, split)
    return listing


def _decode(listing: Mapping[str, list[str]], origin: str, split: str, read: Callable[[str], bytes]) -> ImageSet:
    files = [f"images/{filename}" for label in sorted(listing) for filename in listing[label]]
    images = torch.empty(len(files), 3, SIDE, SIDE, dtype=torch.uint8)
    pixels = images.numpy()
    for index, name in enumerate(tqdm(files, desc=f"Mini-ImageNet {split}", unit="image", disable=None)):
        pixels[index] = decode_image(read(name), f"{origin}: {name}", "RGB", (SIDE, SIDE))
    return _image_set(images, sorted(listing))


def _read_pickle(file: Path, split: str) -> ImageSet:
    match load_plain(file):
        case {"image_data": np.ndarray() as pixels, "class_dict": dict() as classes}:
            pass
        case _:
            raise FewShotError(f"{file} has other content; expected an array image_data and a dict class_dict of lists")
    if not all(isinstance(name, str) for name in classes):
        raise FewShotError(f"{file}: class_dict has keys that are no str; expected class names")
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIDE, SIDE, 3):
        raise FewShotError(
            f"{file}: image_data is {pixels.dtype} {list(pixels.shape)}; expected uint8 [n, {SIDE}, {SIDE}, 3]"
        )
    members = {name: _indices(indices, len(pixels), f"{file}: class {name!r}") for name, indices in classes.items()}
    _check_members(members, str(file), split)
    return _fill(sorted(members), lambda name: pixels[members[name]])


def _indices(values: Any, size: int, origin: str) -> list[int]:
    indices = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(indices, list) or not all(isinstance(i, int | np.integer) and 0 <= i < size for i in indices):
        raise FewShotError(f"{origin} has no list of its images; expected indices from 0 to {size - 1}")
    return indices


def _read_hdf5(file: Path, split: str) -> ImageSet:
    labels = _labels(file.with_name(f"{split}_labels.json"))
    try:
        with open_regular(file) as opened, h5py.File(opened) as stored:
            group = own_member(stored, "datasets", h5py.Group, f"{file}: datasets")
            if sorted(group) != labels:
                raise FewShotError(f"{file} has other classes than {split}_labels.json; expected the same")
            _check_classes(labels, str(file), split)
            return _fill(labels, lambda label: _stored(group, label, f"{file}: class {label!r}"))
    # What HDF5 raises for a damaged file is open-ended.
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise FewShotError(
            f"{file} cannot be read ({reason}); expected HDF5 with a group datasets of one dataset a class"
        ) from error


def _stored(group: h5py.Group, label: str, origin: str) -> NDArray[np.uint8]:
    stored = own_member(group, label, h5py.Dataset, origin)
    return read_bytes(stored, (EXPECTED.per_class, SIDE, SIDE, 3), origin)


def _labels(file: Path) -> list[str]:
    try:
        labels = json.loads(read_file(file))
    except (FewShotError, ValueError, RecursionError) as error:
        raise FewShotError(f"{file} cannot be read; expected a JSON list of class names") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FewShotError(f"{file} has other content; expected a JSON list of class names")
    return sorted(labels)


def _fill(names: list[str], pixels: Callable[[str], NDArray[np.uint8]]) -> ImageSet:
    """The classes `names`, each given by `pixels` as uint8 `[n, 84, 84, 3]`, in one tensor."""
    images = torch.empty(len(names), EXPECTED.per_class, 3, SIDE, SIDE, dtype=torch.uint8)
    for index, name in enumerate(names):
        images[index].numpy()[:] = pixels(name).transpose(0, 3, 1, 2)
    return _image_set(images.flatten(0, 1), names)


def _image_set(images: torch.Tensor, names: list[str]) -> ImageSet:
    return ImageSet(images, torch.full((len(names),), EXPECTED.per_class), tuple(names))


def _check_members(members: Mapping[str, list[Any]], origin: str, split: str) -> None:
    """Raises unless every class that is expected has as many images as expected, and every image one class."""
    _check_classes(members, origin, split)
    for name, images in members.items():
        if len(images) != EXPECTED.per_class:
            raise FewShotError(f"{origin}: class {name!r} has {len(images)} images; expected {EXPECTED.per_class}")
    if len({image for images in members.values() for image in images}) < len(members) * EXPECTED.per_class:
        raise FewShotError(f"{origin} lists an image twice; expected {EXPECTED.per_class} different ones a class")


def _check_classes(names: Collection[str], origin: str, split: str) -> None:
    expected: int = getattr(EXPECTED, split)
    if len(names) != expected:
        raise FewShotError(f"{origin} has {len(names)} classes; expected the {expected} of {split}")
