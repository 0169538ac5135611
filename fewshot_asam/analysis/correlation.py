"""Whether flatter goes with better over tasks."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fewshot_asam.analysis.scipy_import import scipy_module
from fewshot_asam.errors import FewShotError


class Correlation(NamedTuple):
    """A correlation and its 95 % confidence interval; all are not a number where one of the two is constant."""

    value: float
    low: float
    high: float


def rank_correlation(first: Tensor, second: Tensor) -> Correlation:
    """Spearman's rank correlation of two quantities of the same tasks, `[n]` each, with Fisher's interval.

    Raises `FewShotError` for fewer than four tasks or different numbers of them, and where scipy is missing.
    """
    if first.shape != second.shape or len(first) < 4:
        raise FewShotError(f"{len(first)} and {len(second)} tasks are given; expected the same ones, at least 4")
    stats = scipy_module("stats")
    ranks = [stats.rankdata(values.double().cpu().numpy()) for values in (first, second)]
    if any(column.min() == column.max() for column in ranks):
        return Correlation(math.nan, math.nan, math.nan)
    found = stats.pearsonr(*ranks)
    return Correlation(float(found.statistic), *map(float, found.confidence_interval(0.95)))
