"""Where the lower level's validation loss `L_v` comes from."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_asam.errors import FewShotError

Validation = Literal["duplicate", "augment", "split", "other_task"]
LabelledImages = tuple[Tensor, Tensor]

SHIFT = 0.07
"""Largest shift of an augmented image, as a part of its side (2 pixels of 28)."""
ROTATION = math.radians(10)
"""Largest rotation of an augmented image, in radians."""
NOISE = 0.05
"""Standard deviation of the noise on an augmented image, in units of its range."""


def lower_level_sets(
    x: Tensor,
    y: Tensor,
    validation: Validation,
    generator: torch.Generator | None,
    queries: LabelledImages | None = None,
) -> tuple[LabelledImages, LabelledImages | None]:
    """The training and validation sets of the lower level, from the support and query sets of `T` tasks.

    **Arguments:**

    - `x`, `y`: support images `[T, S, C, H, W]` and labels `[T, S]`.
    - `generator`: for `augment`, on the images' device.
    - `queries`: for `other_task`: images `[T, N*Q, C, H, W]` and labels `[T, N*Q]`.

    Every rule trains on the first set: `split` leaves MAML and Sharp-MAML_low fewer shots too.

    **Returns:** `(x, y)` and, except for `duplicate`, `(x_v, y_v)`. `split` holds out a quarter of each class's shots,
    one at least (the paper's supervised form has `|B_v| = |B_t| / 4`). `other_task` takes the query set of the task
    before in the batch, and for the first task that of the last: other classes under the same numbers.
    """
    if validation == "duplicate":
        return (x, y), None
    if validation == "other_task":
        return (x, y), _of_other_tasks(queries)
    if validation == "augment":
        if generator is None:
            raise FewShotError("validation 'augment' draws random numbers; pass generator=, on the images' device")
        return (x, y), (augmented(x.flatten(0, 1), generator).view_as(x), y)
    return _split(x, y)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """A randomly shifted, slightly rotated and noisy copy of images `[n, C, H, W]`."""
    options = {"generator": generator, "device": x.device, "dtype": x.dtype}
    angle, dx, dy = torch.rand(3, len(x), **options) * 2 - 1  # type: ignore[call-overload]
    cos, sin = torch.cos(angle * ROTATION), torch.sin(angle * ROTATION)
    rows = [torch.stack([cos, -sin, 2 * SHIFT * dx], 1), torch.stack([sin, cos, 2 * SHIFT * dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    noise: Tensor = torch.randn(x.shape, **options)  # type: ignore[call-overload]
    return moved + NOISE * noise


def _of_other_tasks(queries: LabelledImages | None) -> LabelledImages:
    """The query set of the task before each; never a task's own, so one task alone is refused."""
    if queries is None or len(queries[1]) < 2:
        raise FewShotError("validation 'other_task' takes the queries of another task; expected a batch of 2 or more")
    x, y = queries
    return x.roll(1, 0), y.roll(1, 0)


def _split(x: Tensor, y: Tensor) -> tuple[LabelledImages, LabelledImages]:
    ways = int(y.max()) + 1
    counts = F.one_hot(y, ways).sum(1)
    shots = int(counts[0, 0])
    if shots < 2 or bool((counts != shots).any()):
        raise FewShotError(
            f"validation 'split' holds out shots of each class, but {y.shape[1]} support images of {ways} classes were "
            "given; it needs the same number of shots for each class, 2 at least: use 'duplicate' or 'augment'"
        )
    order = y.argsort(dim=1, stable=True).view(len(y), ways, shots)
    held_out, kept = torch.split(order, [max(1, shots // 4), shots - max(1, shots // 4)], dim=2)
    return _take(x, y, kept), _take(x, y, held_out)


def _take(x: Tensor, y: Tensor, index: Tensor) -> LabelledImages:
    tasks = torch.arange(len(y), device=y.device).unsqueeze(1)
    return x[tasks, index.flatten(1)], y[tasks, index.flatten(1)]
