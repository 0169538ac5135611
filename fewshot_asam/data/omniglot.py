"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each, as 28x28 grey images.

Source: B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 350 (2015). The class split is that of O. Vinyals et al., "Matching networks for one shot
learning", NeurIPS 2016.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot_asam.data.archives import decode_image, fetch, list_tree, locate, open_zip, read_file, read_member
from fewshot_asam.data.cache import SPLITS, cached, fingerprint
from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.errors import FewShotError

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
HASHES = {
    "images_background": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "md5:6b91aef0f799c5bb55b94e3f2daec811",
}
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
CLASSES = {"train": 4 * 1028, "val": 4 * 172, "test": 423}
DRAWINGS = 20
SIZE = 28
LISTED = 20
"""How many missing characters an error names."""
SUBFOLDERS = ("omniglot", "omniglot-py", "omniglot/python")
TREE = "*/character*/*.png"
MEMBER = re.compile(r"(?:.*/)?([^/]+/character\d+)/[^./][^/]*\.png")

Members = dict[str, list[str]]
"""Character, as `<Alphabet>/characterNN`, to the names of its drawings in their archive or tree, in order."""


def load(root: Path | None = None) -> Dataset:
    """Omniglot in Vinyals' split; in train and val each quarter turn of a character is a class of its own.

    **Arguments:**

    - `root`: a folder that holds, itself or in `omniglot`, `images_background` and `images_evaluation`, each as the
        official zip archive or as the unpacked tree. Without it both archives are downloaded.

    **Returns:** uint8 `[classes * 20, 1, 28, 28]` a split, ink 255 on paper 0, antialiased; 4112, 688 and 423 classes.
    Those of train and val are named `<Alphabet>/characterNN/rotDDD` after the counter-clockwise turn in degrees.
    Raises `FewShotError` where a part is missing, damaged or not what the official archives hold.
    """
    sources = {part: _source(part, root) for part in HASHES}
    trees = [list_tree(source, TREE) for source in sources.values() if source.is_dir()]
    dataset = cached("omniglot", fingerprint(sources.values(), trees, SIZE), lambda: _build(sources))
    _check_dataset(dataset)
    return dataset


def split_characters(split: str) -> list[str]:
    """The characters of Vinyals' `"train"`, `"val"` or `"test"` split, each as `<Alphabet>/characterNN`."""
    return (resources.files(__package__) / "splits" / f"omniglot_{split}.txt").read_text("utf-8").split()


def _source(part: str, root: Path | None) -> Path:
    if root is None:
        return fetch(f"{URL}/{part}.zip", HASHES[part], f"{part}.zip")
    found = locate(root, (f"{part}.zip", part), SUBFOLDERS)
    if found is None:
        raise FewShotError(
            f"neither {part}.zip nor {part}/ is in {root} or its subfolder omniglot; expected Omniglot's official "
            f"archive or its unpacked tree; get it from {URL}/{part}.zip, or leave the root out to download it"
        )
    return found


def _build(sources: dict[str, Path]) -> Dataset:
    members = {part: _members(source) for part, source in sources.items()}
    _check_members(sources, members)
    drawings: dict[str, Tensor] = {}
    for part, source in sources.items():
        drawings |= _read(source, members[part])
    return Dataset("omniglot", *(_split(split, drawings) for split in SPLITS))


@contextmanager
def _opened(source: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The names of an archive's members or a tree's files, and what reads one of them."""
    if source.is_dir():
        yield list(list_tree(source, TREE)), lambda name: read_file(source / name)
    else:
        with open_zip(source) as archive:
            yield archive.namelist(), partial(read_member, archive)


def _members(source: Path) -> Members:
    members: Members = defaultdict(list)
    with _opened(source) as (names, _):
        for name in sorted(names):
            if match := MEMBER.fullmatch(name):
                members[match[1]].append(name)
    return members


def _check_members(sources: dict[str, Path], members: dict[str, Members]) -> None:
    missing = sorted({name for split in SPLITS for name in split_characters(split)}.difference(*members.values()))
    more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
    listed = f"; missing: {', '.join(missing[:LISTED])}{more}" if missing else ""
    for part, source in sources.items():
        if len(members[part]) != CHARACTERS[part]:
            raise FewShotError(f"{source} holds {len(members[part])} characters; expected {CHARACTERS[part]}{listed}")
        for character, names in members[part].items():
            if len(names) != DRAWINGS:
                raise FewShotError(f"{source} holds {len(names)} drawings of {character}; expected {DRAWINGS}")
    if missing:
        raise FewShotError(f"{' and '.join(map(str, sources.values()))} lack characters of Vinyals' split{listed}")


def _read(source: Path, members: Members) -> dict[str, Tensor]:
    """Character to its drawings, uint8 `[20, 1, 28, 28]`, ink 255 on paper 0."""
    decode = partial(decode_image, mode="L", size=(SIZE, SIZE), resample=Image.Resampling.LANCZOS)
    with _opened(source) as (_, read):
        return {
            character: torch.from_numpy(255 - np.stack([decode(read(name), f"{source}/{name}") for name in names]))
            for character, names in members.items()
        }


def _split(split: str, drawings: dict[str, Tensor]) -> ImageSet:
    characters = split_characters(split)
    classes = {name: drawings[name] for name in characters}
    if split != "test":
        classes = {
            f"{name}/rot{90 * turns:03d}": torch.rot90(drawings[name], turns, (-2, -1))
            for name in characters
            for turns in range(4)
        }
    return ImageSet(torch.cat(list(classes.values())), torch.full((len(classes),), DRAWINGS), tuple(classes))


def _check_dataset(dataset: Dataset) -> None:
    for split, classes in CLASSES.items():
        images: ImageSet = getattr(dataset, split)
        if images.shape != (1, SIZE, SIZE) or images.counts.tolist() != [DRAWINGS] * classes:
            raise FewShotError(
                f"omniglot's {split} split has {len(images.names)} classes of {list(images.shape)} images; "
                f"expected {classes} of {DRAWINGS} images of {[1, SIZE, SIZE]}; empty the cache folder and load it anew"
            )
