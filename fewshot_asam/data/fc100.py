"""FC100 (Fewshot-CIFAR100): CIFAR-100's classes divided by superclass, so that train and test are less alike.

Source: B. N. Oreshkin, P. Rodríguez, A. Lacoste, "TADAM: Task dependent adaptive metric for improved few-shot
learning", NeurIPS 2018.
"""

from __future__ import annotations

from pathlib import Path

from fewshot_asam.data.cifar100 import load_divided
from fewshot_asam.data.images import Dataset


def load(root: Path | None = None) -> Dataset:
    """Oreshkin's 60 / 20 / 20 classes of 600 images, uint8 `[n, 3, 32, 32]`, named as in CIFAR-100 and sorted.

    They are 12, 4 and 4 of CIFAR-100's superclasses.

    **Arguments:**

    - `root`: a folder with CIFAR-100 in one of the forms of `cifar100.FORMS`; `None` downloads it (169 MB).

    Raises `FewShotError` where nothing is found, or what is found is damaged or not the whole of CIFAR-100.
    """
    return load_divided("fc100", root)
