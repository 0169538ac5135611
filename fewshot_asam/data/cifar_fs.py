"""CIFAR-FS: CIFAR-100's classes divided at random.

Source: L. Bertinetto, J. F. Henriques, P. H. S. Torr, A. Vedaldi, "Meta-learning with differentiable closed-form
solvers", ICLR 2019.
"""

from __future__ import annotations

from pathlib import Path

from fewshot_asam.data.cifar100 import load_divided
from fewshot_asam.data.images import Dataset


def load(root: Path | None = None) -> Dataset:
    """Bertinetto's 64 / 16 / 20 classes of 600 images, uint8 `[n, 3, 32, 32]`, named as in CIFAR-100 and sorted.

    **Arguments:**

    - `root`: a folder with CIFAR-100 in one of the forms of `cifar100.FORMS`; `None` downloads it (169 MB).

    Raises `FewShotError` where nothing is found, or what is found is damaged or not the whole of CIFAR-100.
    """
    return load_divided("cifar_fs", root)
