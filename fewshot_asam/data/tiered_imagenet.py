"""tieredImageNet: 608 classes of ImageNet, divided by the categories that they are kinds of.

Source: M. Ren, E. Triantafillou, S. Ravi, J. Snell, K. Swersky, J. B. Tenenbaum, H. Larochelle, R. S. Zemel,
"Meta-learning for semi-supervised few-shot classification", ICLR 2018.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fewshot_asam.data.archives import decode_image, locate, open_zip
from fewshot_asam.data.cache import SPLITS, cached_on_disk, create, fingerprint
from fewshot_asam.data.images import Dataset
from fewshot_asam.data.pickles import load_plain, stream_plain
from fewshot_asam.errors import FewShotError


class Size(NamedTuple):
    """How many classes and images a split has."""

    classes: int
    images: int


EXPECTED = {"train": Size(351, 448_695), "val": Size(97, 124_261), "test": Size(160, 206_209)}
SIDE = 84
"""Height and width of an image, in pixels."""
IMAGE = SIDE * SIDE * 3
"""Bytes of an image."""
SUBFOLDERS = ("tiered-imagenet", "tiered_imagenet", "tieredimagenet")


class Labels(NamedTuple):
    """The labels of a split's images in the order of the file, int64 `[n]`, and by label the names of the classes."""

    of_images: NDArray[np.int64]
    names: dict[int, str]


def load(root: Path | None = None) -> Dataset:
    """Ren's 351 / 97 / 160 classes of 732 to 1,300 images, uint8 `[n, 3, 84, 84]`, RGB.

    Classes are sorted by their labels and named `<split> NNN`, followed by the labels' words where the file has them.
    For each split, `<split>_images_png.pkl` is read or else `<split>_images.npz` (whose channels are blue, green, red,
    as OpenCV wrote them), and `<split>_labels.pkl`, in `root` or its folder `tiered-imagenet`, `tiered_imagenet` or
    `tieredimagenet`.

    Decoding takes minutes and 16 GiB in the cache folder, once. The images stay in that file and are mapped to memory:
    on a CPU they take what of them was read last and memory has room for.

    **Arguments:**

    - `root`: the folder to search; the dataset has no address to be downloaded from.

    Raises `FewShotError` where nothing is found, or what is found is damaged or not the whole of tieredImageNet, or
    where the cache folder has no room.
    """
    files = {split: _files(root, split) for split in SPLITS}
    key = fingerprint({file for pair in files.values() for file in pair}, EXPECTED)
    size = sum(EXPECTED[split].images for split in SPLITS) * IMAGE
    return cached_on_disk("tiered_imagenet", key, size, lambda folder: _fill(folder, files))


def _files(root: Path | None, split: str) -> tuple[Path, Path]:
    """The files of a split's images and labels."""
    names = (f"{split}_images_png.pkl", f"{split}_images.npz")
    images = None if root is None else locate(root, names, SUBFOLDERS)
    labels = None if images is None else locate(images.parent, (f"{split}_labels.pkl",))
    if images is None or labels is None:
        where = "no --data-root was given" if root is None else f"{root} has not all of tieredImageNet"
        raise FewShotError(
            f"{where}; expected {' or '.join(names)}, and {split}_labels.pkl, there or in its folder {SUBFOLDERS[0]}; "
            "unpack the archive that its authors' few-shot-ssl-public names"
        )
    return images, labels


def _fill(folder: Path, files: dict[str, tuple[Path, Path]]) -> None:
    for split, (images, labels) in files.items():
        _fill_split(folder, split, images, _read_labels(labels, split))


def _fill_split(folder: Path, split: str, file: Path, labels: Labels) -> None:
    number = len(labels.of_images)
    places = np.empty(number, np.int64)
    places[labels.of_images.argsort(kind="stable")] = np.arange(number)
    counts = torch.from_numpy(np.unique(labels.of_images, return_counts=True)[1])
    stored = create(folder, split, tuple(labels.names.values()), counts, (3, SIDE, SIDE))
    images = _read_png(file) if file.suffix == ".pkl" else _read_npz(file, number)
    index = -1
    for index, pixels in enumerate(tqdm(images, f"tieredImageNet {split}", number, unit="image", disable=None)):
        if index >= number:
            break
        stored[places[index]] = pixels
    if index + 1 != number:
        more = "more" if index >= number else f"{index + 1}"
        raise FewShotError(f"{file} has {more} images; expected {number}, one a label")


def _read_labels(file: Path, split: str) -> Labels:
    content = load_plain(file)
    given = content.get("label_specific", content.get("labels")) if isinstance(content, dict) else None
    words = content.get("label_specific_str") if isinstance(content, dict) else None
    if isinstance(given, list) and all(isinstance(label, int | np.integer) for label in given):
        given = np.array(given)
    values = given if isinstance(given, np.ndarray) else np.empty(0)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise FewShotError(f"{file} has other content; expected a dict with whole numbers label_specific or labels")
    labels = values.astype(np.int64)
    found = np.unique(labels).tolist()
    if Size(len(found), len(labels)) != EXPECTED[split]:
        expected = EXPECTED[split]
        raise FewShotError(
            f"{file} has {len(labels):,} images of {len(found)} classes; expected the {expected.images:,} of "
            f"{expected.classes} of {split}"
        )
    known = dict(enumerate(words)) if isinstance(words, list) else {}
    return Labels(labels, {label: f"{split} {label:03d} {known.get(label, '')}".strip() for label in found})


def _read_png(file: Path) -> Iterator[NDArray[np.uint8]]:
    for index, part in enumerate(stream_plain(file)):
        origin = f"{file}: image {index}"
        content = part.tobytes() if isinstance(part, np.ndarray) and part.dtype == np.uint8 else part
        if not isinstance(content, bytes):
            raise FewShotError(f"{origin} is a {type(part).__name__}; expected the bytes of a PNG")
        yield decode_image(content, origin, "RGB", (SIDE, SIDE))


def _read_npz(file: Path, number: int) -> Iterator[NDArray[np.uint8]]:
    with open_zip(file) as archive:
        try:
            member = archive.getinfo("images.npy")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"compression method {member.compress_type}")
            with archive.open(member) as content:
                _require_header(content, number)
                for _ in range(number):
                    pixels = np.frombuffer(content.read(IMAGE), np.uint8).reshape(SIDE, SIDE, 3)
                    yield pixels[:, :, ::-1].transpose(2, 0, 1)
                content.read(1)  # to the CRC
        except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FewShotError(
                f"{file}: images cannot be read ({reason}); expected uint8 [{number}, {SIDE}, {SIDE}, 3]"
            ) from error


def _require_header(content: IO[bytes], number: int) -> None:
    """Reads the head of a numpy array; raises `ValueError` for any other than that of so many images."""
    version = np.lib.format.read_magic(content)
    if version != (1, 0):
        raise ValueError(f"version {version} of numpy's format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
    if shape != (number, SIDE, SIDE, 3) or fortran or dtype != np.uint8:
        raise ValueError(f"{dtype} {list(shape)}")
