"""What many runs of few seeds say: intervals over seeds, paired differences and verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_asam.training.evaluation import Interval, interval, paired_difference

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5th percentile, for 1 to 9 degrees of freedom."""

ONE_SEED = "one seed: no verdict"
NOISE = "inside the noise"
BELOW_CONTROL = "no more than the control shows"
BETTER, WORSE = "better", "worse"


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

    def verdict(self, noise_floor: float | None) -> str:
        """`better` or `worse` where both intervals leave out 0 and the difference is above the noise floor.

        - `noise_floor`: what two rules that are equal but for rounding may differ by, as `reach` of a control says.
        """
        if self.seeds.half_width is None:
            return ONE_SEED
        if abs(self.tasks.mean) <= self.half_width:
            return NOISE
        if abs(self.tasks.mean) <= (noise_floor or 0.0):
            return BELOW_CONTROL
        return BETTER if self.tasks.mean > 0 else WORSE

    @property
    def reach(self) -> float | None:
        """The size of the largest difference that the interval over seeds leaves room for; None for one seed."""
        return None if self.seeds.half_width is None else abs(self.seeds.mean) + self.seeds.half_width


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
