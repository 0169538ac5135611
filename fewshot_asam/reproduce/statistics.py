"""What a few seeds of one rule or of two say: intervals over seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_asam.training.evaluation import Interval, interval, paired_difference

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5th percentile, for 1 to 9 degrees of freedom."""


class Spread(NamedTuple):
    """A mean over `seeds` runs and the half width of its 95 % t-interval, None for one run."""

    mean: float
    half_width: float | None
    seeds: int

    def __str__(self) -> str:
        width = "" if self.half_width is None else f" ± {100 * self.half_width:.2f}"
        return f"{100 * self.mean:.2f}{width}"


class Comparison(NamedTuple):
    """One rule minus another on the same tasks.

    - `each`: by seed, the mean over tasks and its interval.
    - `tasks`: of the differences that are averaged over the seeds, the mean over tasks and its interval.
    - `seeds`: of the seeds' mean differences, their mean and its interval.
    """

    each: dict[int, Interval]
    tasks: Interval
    seeds: Spread

    @property
    def half_width(self) -> float:
        """Of the wider of the two intervals."""
        return max(self.tasks.half_width, self.seeds.half_width or 0.0)

    @property
    def leaves_out_0(self) -> bool:
        """Whether both intervals do, each for itself: uncorrected for how many comparisons were made, so no verdict."""
        return self.seeds.half_width is not None and abs(self.tasks.mean) > self.half_width


def over_seeds(values: Sequence[float]) -> Spread:
    """The mean of one to ten independent values and its t-interval."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Spread(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Spread(mean, T_975[count - 2] * deviation / math.sqrt(count), count)


def compare(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> Comparison | None:
    """`first - second`, accuracies `[tasks]` by seed, for the seeds that both have; None where there is no such."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    each = {seed: paired_difference(first[seed], second[seed]) for seed in shared}
    average = torch.stack([first[seed] - second[seed] for seed in shared]).mean(0)
    return Comparison(each, interval(average), over_seeds([one.mean for one in each.values()]))
