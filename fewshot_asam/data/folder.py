"""Anyone's own images: `ROOT/<class>/*`, or `ROOT/{train,val,test}/<class>/*`, of any format in `SUFFIXES`."""

from __future__ import annotations

import csv
import glob
import io
import math
import reprlib
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fewshot_asam.data.archives import decode_image, list_tree, read_file
from fewshot_asam.data.cache import SPLITS, cached, fingerprint
from fewshot_asam.data.images import Dataset, ImageSet, divide, is_whole
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.files import open_regular
from fewshot_asam.runtime.memory import memory_limit

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LARGEST_SIDE = 10_000
"""Pixels that an image may be squashed to."""
LISTED = 5
"""How many files a message names."""
SHORT = reprlib.Repr()
SHORT.maxstring = 100

Classes = dict[str, list[str]]
"""Class name to the relative names of its images, both sorted."""


def load(
    root: Path | None = None,
    *,
    image_size: int = 84,
    channels: Literal[1, 3] = 3,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2),
    split_csv: str | Path | None = None,
) -> Dataset:
    """The images below a folder, one subfolder a class, the classes divided into train, val and test.

    Where the folder's only subfolders are `train`, `val` and `test`, and they have subfolders, those are the classes,
    divided so.

    **Arguments:**

    - `root`: the folder; hidden files and folders in it are passed over, and whatever else is no image is, with a
        warning.
    - `image_size`: height and width in pixels that every image is squashed to, antialiased.
    - `channels`: 1 for grey, 3 for RGB; images of the other kind are converted.
    - `seed`: which classes go to which split.
    - `fractions`: the shares of the classes in train, val and test; they add up to 1.
    - `split_csv`: a file with the header `class,split` and a line for each class, its split being `train`, `val` or
        `test`; instead of `seed` and `fractions`.

    **Returns:** uint8 `[n, channels, image_size, image_size]` a split; classes and images in order of their names.
    Raises `FewShotError` where the folder, a class, an image, the CSV or a setting is not as described, where a split
    gets no class, or where the images do not fit the memory.
    """
    if root is None:
        raise FewShotError("the dataset 'folder' was given no root; expected --data-root with a subfolder a class")
    _check_settings(image_size, channels)
    folders = _class_folders(root)
    divided = "/" in folders[0]
    stamps = list_tree(root, "*/*/*" if divided else "*/*")
    classes = _classes(root, folders, list(stamps))
    if divided and split_csv:
        raise FewShotError(f"split_csv is given, but {root} has folders train, val and test; expected one of the two")
    if divided:
        names = _split_by_folder(root, folders)
    elif split_csv:
        names = _split_by_csv(Path(split_csv), classes)
    else:
        names = divide(folders, seed, fractions)
    _check_splits(names, split_csv or root)
    loose = _loose_images(root, ("*", "*/*") if divided else ("*",), folders)
    _warn_of_others(root, [*loose, *set(stamps).difference(*classes.values())])
    shape = (channels, image_size, image_size)
    _check_memory(sum(map(len, classes.values())), shape)

    def build() -> Dataset:
        unreadable: list[str] = []
        splits = [_read(root, {name: classes[name] for name in split}, shape, unreadable) for split in names]
        _require_readable(unreadable)
        return Dataset("folder", *splits)

    return cached("folder", fingerprint([root], stamps, SUFFIXES, image_size, channels, names), build)


def _check_settings(image_size: int, channels: int) -> None:
    if not is_whole(image_size) or not 1 <= image_size <= LARGEST_SIDE:
        raise FewShotError(f"image_size is {image_size!r}; expected 1 to {LARGEST_SIDE:,} pixels")
    if channels not in (1, 3):
        raise FewShotError(f"channels is {channels}; expected 1 (grey) or 3 (RGB)")


def _class_folders(root: Path) -> list[str]:
    """The classes' folders, relative to the root and sorted."""
    folders = _subfolders(root)
    if not folders:
        raise FewShotError(f"{root} has no subfolders; expected one a class, with its images in it")
    if set(folders) != set(SPLITS):
        return folders
    return [f"{split}/{name}" for split in SPLITS for name in _subfolders(root / split)] or folders


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FewShotError(f"{folder} is not a folder; expected one with a subfolder of images a class")
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise FewShotError(f"{folder} cannot be read ({error}); expected a readable folder") from error


def _classes(root: Path, folders: Sequence[str], files: Sequence[str]) -> Classes:
    classes: Classes = {name: [] for name in folders}
    for file in files:
        if file.lower().endswith(SUFFIXES):
            classes[file.rpartition("/")[0]].append(file)
    if empty := [name for name, images in classes.items() if not images]:
        raise FewShotError(
            f"{root} has classes without images: {', '.join(empty)}; "
            f"expected {', '.join(SUFFIXES)} files directly in each subfolder"
        )
    return classes


def _split_by_folder(root: Path, folders: Sequence[str]) -> list[list[str]]:
    splits: dict[str, str] = {}
    for split, name in (folder.split("/") for folder in folders):
        if name in splits:
            raise FewShotError(
                f"{root}: class {name!r} is in both {splits[name]} and {split}; expected disjoint splits"
            )
        splits[name] = split
    return [[folder for folder in folders if folder.startswith(f"{split}/")] for split in SPLITS]


def _split_by_csv(file: Path, classes: Classes) -> list[list[str]]:
    splits: dict[str, str] = {}
    for line, row in _csv_rows(file):
        if len(row) != 2:
            raise FewShotError(f"{file} line {line} has {len(row)} fields; expected 2: class,split")
        name, split = row
        if name not in classes:
            raise FewShotError(
                f"{file} line {line}: there is no class folder {SHORT.repr(name)}; expected one of that name"
            )
        if split not in SPLITS:
            raise FewShotError(
                f"{file} line {line}: split {SHORT.repr(split)} is unknown; expected {', '.join(SPLITS)}"
            )
        if name in splits:
            raise FewShotError(f"{file} line {line} repeats class {name!r}; expected each class once")
        splits[name] = split
    if absent := [name for name in classes if name not in splits]:
        raise FewShotError(f"{file} does not list {', '.join(absent)}; expected a line for each class folder")
    return [sorted(name for name in splits if splits[name] == split) for split in SPLITS]


def _csv_rows(file: Path) -> list[tuple[int, list[str]]]:
    """Line number and stripped fields of each line after the header, blank lines left out."""
    try:
        with open_regular(file) as stream:
            reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if row]
    except (OSError, ValueError, csv.Error) as error:
        raise FewShotError(f"{file} cannot be read ({error}); expected a CSV file with header class,split") from error
    if not rows or rows[0][1] != ["class", "split"]:
        header = ",".join(rows[0][1]) if rows else ""
        raise FewShotError(f"{file} line 1 is {SHORT.repr(header)}; expected the header 'class,split'")
    return rows[1:]


def _check_splits(names: list[list[str]], source: str | Path) -> None:
    if not all(names):
        sizes = ", ".join(f"{split} {len(part)}" for split, part in zip(SPLITS, names, strict=True))
        raise FewShotError(
            f"{source} gives splits of {sizes} classes; expected at least one each; "
            "add classes, or change fractions or split_csv"
        )


def _loose_images(root: Path, patterns: Sequence[str], folders: Collection[str]) -> list[str]:
    """The images that lie above the classes' folders."""
    names = [name for pattern in patterns for name in glob.glob(pattern, root_dir=root)]
    return [name for name in names if name.lower().endswith(SUFFIXES) and name not in folders]


def _warn_of_others(root: Path, others: Sequence[str]) -> None:
    if others:
        message = f"{root}: what is no image in the folder of a class is passed over, {len(others)} in all"
        warnings.warn(f"{message}: {_listed(sorted(others))}", stacklevel=3)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _check_memory(number: int, shape: tuple[int, int, int]) -> None:
    needed, there = number * math.prod(shape), memory_limit()
    if needed > there:
        raise FewShotError(
            f"{number} images of {' x '.join(map(str, shape))} take {needed / 2**30:,.1f} GiB, and there are "
            f"{there / 2**30:,.1f} GiB of memory; lower image_size"
        )


def _read(root: Path, classes: Classes, shape: tuple[int, int, int], unreadable: list[str]) -> ImageSet:
    """The images of some classes; what is wrong with those that cannot be read is added to `unreadable`."""
    files = [file for members in classes.values() for file in members]
    images = np.empty((len(files), *shape), np.uint8)
    for index, path in enumerate(root / file for file in files):
        try:
            images[index] = decode_image(read_file(path), str(path), "L" if shape[0] == 1 else "RGB", shape[1:])
        except FewShotError as error:
            unreadable.append(str(error))
    counts = torch.tensor([len(members) for members in classes.values()])
    return ImageSet(torch.from_numpy(images), counts, tuple(name.rpartition("/")[2] for name in classes))


def _require_readable(unreadable: list[str]) -> None:
    if len(unreadable) == 1:
        raise FewShotError(unreadable[0])
    if unreadable:
        reasons = [reason.partition("; expected")[0] for reason in unreadable]
        raise FewShotError(f"{len(unreadable)} images cannot be read: {_listed(reasons)}; mend or remove them")
