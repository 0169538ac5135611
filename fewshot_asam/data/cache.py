"""Decoded datasets kept as safetensors, so that the second start takes a second."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.cache_folder import cache_dir
from fewshot_asam.runtime.files import require_regular

SPLITS = ("train", "val", "test")


def fingerprint(files: Iterable[Path], *settings: object) -> str:
    """A key that changes when a source file (path, size, time) or a setting does."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    return hashlib.sha256(repr((stats, settings)).encode()).hexdigest()[:16]


def cached(name: str, key: str, build: Callable[[], Dataset]) -> Dataset:
    """The dataset stored under `name` and `key`, or `build()`, which is then stored.

    A damaged entry is built anew; one that may not be read and a folder that cannot be written are done without. Each
    with a warning.
    """
    folder = cache_dir() / "datasets" / f"{name}-{key}"
    if os.path.isdir(folder):  # Path's own raises where the cache may not be entered
        try:
            return Dataset(name, *(_read(folder / f"{split}.safetensors") for split in SPLITS))
        except PermissionError as error:
            warnings.warn(f"the cached copy of {name} in {folder} may not be read ({error.strerror})", stacklevel=2)
            return build()
        except (OSError, SafetensorError, FewShotError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"the cached copy of {name} in {folder} is damaged and built anew ({error})", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
    dataset = build()
    try:
        _write(dataset, folder)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{name} is not cached, as {folder.parent} cannot be written ({error})", stacklevel=2)
    return dataset


def _read(file: Path) -> ImageSet:
    require_regular(file)
    with safe_open(file, framework="pt") as stored:
        names = tuple(json.loads(stored.metadata()["names"]))
        return ImageSet(stored.get_tensor("images"), stored.get_tensor("counts"), names)


def _write(dataset: Dataset, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        whole = scratch / folder.name
        whole.mkdir()
        for split in SPLITS:
            images: ImageSet = getattr(dataset, split)
            tensors = {"images": images.images.contiguous(), "counts": images.counts}
            file = whole / f"{split}.safetensors"
            save_file(tensors, file, metadata={"names": json.dumps(images.names)})
            file.chmod(whole.stat().st_mode & 0o666)  # as the umask has it, for others who share the cache
        whole.rename(folder)
    except OSError:
        if not folder.is_dir():  # or else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
