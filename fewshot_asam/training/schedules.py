"""What changes over the iterations of a run by plan: the meta learning rate, and the weights of the inner steps."""

from __future__ import annotations

import math
from typing import Literal

SMALLEST_WEIGHT = 0.03
"""Of an inner step in the multi-step loss, divided by their number, as in MAML++'s code."""


def cosine(done: float) -> float:
    """What a learning rate is multiplied by after that part of the training: from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def meta_rate(schedule: Literal["constant", "cosine"], done: float) -> float:
    """What `meta_lr` is multiplied by after that part of the training."""
    return cosine(done) if schedule == "cosine" else 1.0


def step_weights(steps: int, done: float) -> list[float]:
    """The weights of the query losses after each inner step in MAML++'s multi-step loss (Antoniou et al. 2019).

    They begin equal. Those of all steps but the last fall linearly, to a small rest, and the last one takes the
    difference, so that they always add up to 1.

    **Arguments:**

    - `done`: the part of the annealing that is over; from 1 on the last step alone counts.
    """
    if done >= 1:
        return [0.0] * (steps - 1) + [1.0]
    earlier = max(1 / steps * (1 - done), SMALLEST_WEIGHT / steps)
    return [earlier] * (steps - 1) + [1 - (steps - 1) * earlier]
