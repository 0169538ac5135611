"""Decoded datasets kept as safetensors, so that the second start takes a second."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.cache_folder import cache_dir
from fewshot_asam.runtime.files import require_regular

SPLITS = ("train", "val", "test")


def fingerprint(files: Iterable[Path], *settings: object) -> str:
    """A key that changes when a source file (path, size, time) or a setting does.

    Raises `FewShotError` where a file cannot be looked at.
    """
    try:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FewShotError(f"{error.filename} cannot be read ({reason}); expected a readable file") from error
    return hashlib.sha256(repr((stats, settings)).encode()).hexdigest()[:16]


def cached(name: str, key: str, build: Callable[[], Dataset]) -> Dataset:
    """The dataset stored under `name` and `key`, or `build()`, which is then stored.

    A damaged entry is built anew; one that may not be read and a folder that cannot be written are done without. Each
    with a warning.
    """
    folder = _folder(name, key)
    try:
        stored = _stored(name, folder)
    except PermissionError as error:
        warnings.warn(f"the cached copy of {name} in {folder} may not be read ({error.strerror})", stacklevel=2)
        return build()
    if stored is not None:
        return stored
    dataset = build()
    try:
        _publish(folder, lambda scratch: _write(dataset, scratch))
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{name} is not cached, as {folder.parent} cannot be written ({error})", stacklevel=2)
    return dataset


def cached_on_disk(name: str, key: str, size: int, fill: Callable[[Path], None]) -> Dataset:
    """The dataset stored under `name` and `key`, whose images stay in the file and are mapped to memory.

    Where there is none, `fill` makes it: it is given a folder and calls `create` there for each split.

    Raises `FewShotError` where the cache has no room for `size` bytes, or cannot be read or written.
    """
    folder = _folder(name, key)
    needed = f"{name} takes {size / 2**30:,.1f} GiB in the cache folder {folder.parent}"
    otherwise = "set FEWSHOT_ASAM_CACHE to a folder with that much room"
    try:
        stored = _stored(name, folder)
        if stored is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(folder.parent).free) < size:
                raise FewShotError(f"{needed}, which has {free / 2**30:,.1f} GiB; {otherwise}")
            _publish(folder, fill)
            stored = _read(folder, name)
    except (OSError, SafetensorError) as error:
        raise FewShotError(f"{needed}, which cannot be used ({error}); {otherwise}") from error
    return stored


def create(
    folder: Path, split: str, names: tuple[str, ...], counts: Tensor, shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """The images of a split, uint8 `[n, C, H, W]`, as zeros in a new file; what is written to them is in the file."""
    number, own = int(counts.sum()), counts.numpy().tobytes()
    ends = len(own), len(own) + number * math.prod(shape)
    header = {
        "__metadata__": {"names": json.dumps(names)},
        "counts": {"dtype": "I64", "shape": [len(counts)], "data_offsets": [0, ends[0]]},
        "images": {"dtype": "U8", "shape": [number, *shape], "data_offsets": list(ends)},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / f"{split}.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + own)
        start = file.tell()
        file.truncate(start + ends[1] - ends[0])
        if hasattr(os, "posix_fallocate"):  # or else a full disk would end the process
            os.posix_fallocate(file.fileno(), 0, start + ends[1] - ends[0])
    return np.memmap(folder / f"{split}.safetensors", np.uint8, "r+", start, (number, *shape))


def _folder(name: str, key: str) -> Path:
    return cache_dir() / "datasets" / f"{name}-{key}"


def _stored(name: str, folder: Path) -> Dataset | None:
    """The dataset in a folder; a damaged one is removed with a warning. Raises `PermissionError`."""
    if not os.path.isdir(folder):  # Path's own raises where the cache may not be entered
        return None
    try:
        return _read(folder, name)
    except PermissionError:
        raise
    except (OSError, SafetensorError, FewShotError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"the cached copy of {name} in {folder} is damaged and built anew ({error})", stacklevel=3)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _read(folder: Path, name: str) -> Dataset:
    return Dataset(name, *(_read_split(folder / f"{split}.safetensors") for split in SPLITS))


def _read_split(file: Path) -> ImageSet:
    require_regular(file)
    with safe_open(file, framework="pt") as stored:
        names = tuple(json.loads(stored.metadata()["names"]))
        return ImageSet(stored.get_tensor("images"), stored.get_tensor("counts"), names)


def _write(dataset: Dataset, folder: Path) -> None:
    for split in SPLITS:
        images: ImageSet = getattr(dataset, split)
        tensors = {"images": images.images.contiguous(), "counts": images.counts}
        save_file(tensors, folder / f"{split}.safetensors", metadata={"names": json.dumps(images.names)})


def _publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder appear whole, with what `fill` writes to it, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        whole = scratch / folder.name
        whole.mkdir()
        fill(whole)
        for file in whole.iterdir():
            file.chmod(whole.stat().st_mode & 0o666)  # as the umask has it, for others who share the cache
        whole.rename(folder)
    except OSError:
        if not folder.is_dir():  # or else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
