"""Anyone's own images: `ROOT/<class>/*.{png,jpg,jpeg}`."""

from __future__ import annotations

import csv
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fewshot_asam.data.archives import decode_image, list_tree, read_file
from fewshot_asam.data.cache import SPLITS, cached, fingerprint
from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.errors import FewShotError

SUFFIXES = (".png", ".jpg", ".jpeg")
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

    **Arguments:**

    - `root`: the folder; hidden files and folders in it are passed over.
    - `image_size`: height and width in pixels that every image is squashed to, antialiased.
    - `channels`: 1 for grey, 3 for RGB; images of the other kind are converted.
    - `seed`: which classes go to which split.
    - `fractions`: the shares of the classes in train, val and test; they add up to 1.
    - `split_csv`: a file with the header `class,split` and a line for each class, its split being `train`, `val` or
        `test`; instead of `seed` and `fractions`.

    **Returns:** uint8 `[n, channels, image_size, image_size]` a split; classes and images in order of their names.
    Raises `FewShotError` where the folder, a class, an image, the CSV or a setting is not as described, or where a
    split gets no class.
    """
    if root is None:
        raise FewShotError("the dataset 'folder' was given no root; expected --data-root with a subfolder a class")
    _check_settings(image_size, channels, fractions)
    stamps = list_tree(root, "*/*")
    classes = _classes(root, list(stamps))
    names = _split_by_csv(Path(split_csv), classes) if split_csv else _split_by_seed(list(classes), seed, fractions)
    _check_splits(names, split_csv or root)

    def build() -> Dataset:
        shape = (channels, image_size, image_size)
        return Dataset("folder", *(_read(root, {name: classes[name] for name in split}, shape) for split in names))

    return cached("folder", fingerprint([root], stamps, image_size, channels, names), build)


def _check_settings(image_size: int, channels: int, fractions: Sequence[float]) -> None:
    if image_size < 1:
        raise FewShotError(f"image_size is {image_size}; expected at least 1 pixel")
    if channels not in (1, 3):
        raise FewShotError(f"channels is {channels}; expected 1 (grey) or 3 (RGB)")
    if len(fractions) != 3 or not all(share > 0 for share in fractions) or not math.isclose(sum(fractions), 1):
        raise FewShotError(f"fractions are {tuple(fractions)}; expected three positive shares that add up to 1")


def _classes(root: Path, files: Sequence[str]) -> Classes:
    if not root.is_dir():
        raise FewShotError(f"{root} is not a folder; expected one with a subfolder of images a class")
    try:
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise FewShotError(f"{root} cannot be read ({error}); expected a readable folder") from error
    classes: Classes = {name: [] for name in folders}
    if not classes:
        raise FewShotError(f"{root} has no subfolders; expected one a class, with its images in it")
    for file in files:
        name, image = file.split("/")
        if image.lower().endswith(SUFFIXES):
            classes[name].append(file)
    if empty := [name for name, images in classes.items() if not images]:
        raise FewShotError(
            f"{root} has classes without images: {', '.join(empty)}; "
            f"expected {', '.join(SUFFIXES)} files directly in each subfolder"
        )
    return classes


def _split_by_seed(names: list[str], seed: int, fractions: Sequence[float]) -> list[list[str]]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = (round(len(names) * share) for share in (fractions[0], fractions[0] + fractions[1]))
    return [sorted(names[i] for i in part) for part in (order[:first], order[first:second], order[second:])]


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
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
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


def _read(root: Path, classes: Classes, shape: tuple[int, int, int]) -> ImageSet:
    files = [file for members in classes.values() for file in members]
    images = np.empty((len(files), *shape), np.uint8)
    for index, path in enumerate(root / file for file in files):
        images[index] = decode_image(read_file(path), str(path), "L" if shape[0] == 1 else "RGB", shape[1:])
    counts = torch.tensor([len(members) for members in classes.values()])
    return ImageSet(torch.from_numpy(images), counts, tuple(classes))
