"""Datasets: one file each, all of one type, resident on the device."""

from __future__ import annotations

import difflib
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.yaml_settings import expanded

if TYPE_CHECKING:
    import torch

    from fewshot_asam.data.images import Dataset, ImageSet

__all__ = ["DATASETS", "Dataset", "ImageSet", "load_dataset"]

DATASETS = tuple(
    sorted(file.stem for file in Path(__file__).parent.glob("*.py") if "\ndef load(" in file.read_text("utf-8"))
)
"""The names that `load_dataset` knows: the modules of this package with a function `load(root, **options)`."""


def load_dataset(
    name: str, root: str | Path | None = None, *, device: torch.device | str = "cpu", **options: object
) -> Dataset:
    """The dataset of that name, on `device`.

    **Arguments:**

    - `name`: one of `DATASETS`.
    - `root`: the folder its files are in.
    - `device`: where its images are kept.
    - `options`: what the dataset's own `load` accepts.

    Raises `FewShotError` where the name or an option is unknown, the root is not a folder or the images do not fit the
    device, and whatever the dataset's own `load` does.
    """
    import torch

    if name not in DATASETS:
        raise FewShotError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}{_nearest(name)}")
    load = importlib.import_module(f"{__name__}.{name}").load
    accepted = [option for option in inspect.signature(load).parameters if option != "root"]
    for option in options:
        if option not in accepted:
            known = f"expected {', '.join(accepted)}" if accepted else "it has none"
            raise FewShotError(f"dataset {name!r} has no option {option!r}; {known}")
    folder = None if root is None else expanded(Path(root))
    if folder is not None and not folder.is_dir():
        raise FewShotError(f"root {folder} is not a folder; expected the one that the data of {name!r} is in")
    with torch.device("cpu"):  # whatever PyTorch's default device
        dataset: Dataset = load(folder, **options)
    try:
        return dataset.to(device)
    except torch.OutOfMemoryError as error:
        needed = sum(images.images.nbytes for images in (dataset.train, dataset.val, dataset.test))
        raise FewShotError(
            f"the images of {name!r} take {needed / 2**30:,.1f} GiB and do not fit the memory of {device}; "
            "use a larger one, or the CPU"
        ) from error


def _nearest(name: str) -> str:
    matches = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def __getattr__(name: str) -> Any:
    """The types on first use, so that the names of the datasets are known before PyTorch is imported."""
    if name not in ("Dataset", "ImageSet"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.images"), name)
