"""Intervals over seeds and tasks, and paired differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fewshot_asam.reproduce import statistics
from fewshot_asam.training.evaluation import Interval


@pytest.mark.parametrize("count", range(2, 11))
def test_intervals_over_seeds_are_student_s(count: int) -> None:
    values = np.random.default_rng(count).normal(0.9, 0.02, count)
    mean, half_width, seeds = statistics.over_seeds(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (mean - half_width, mean + half_width, seeds) == pytest.approx((low, high, count), rel=2e-4)


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    ease = generator.normal(0.8, 0.1, (3, 500))
    first, second = (ease + generator.normal(shift, 0.01, (3, 500)) for shift in (0.01, 0.0))
    found = statistics.compare(*({s: torch.tensor(values[s]) for s in range(3)} for values in (first, second)))
    assert found is not None
    for seed in range(3):
        expected = stats.ttest_rel(first[seed], second[seed]).confidence_interval(0.95)
        mean, half_width = found.each[seed]
        assert (mean - half_width, mean + half_width) == pytest.approx((expected.low, expected.high), rel=1e-2)
    expected = stats.ttest_1samp((first - second).mean(1), 0).confidence_interval(0.95)
    low, high = found.seeds.mean - found.seeds.half_width, found.seeds.mean + found.seeds.half_width
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=2e-4)
    assert found.tasks.mean == pytest.approx((first - second).mean())
    assert found.leaves_out_0


@pytest.mark.parametrize(
    ("tasks", "seeds", "leaves_out"),
    [
        ((0.02, 0.01), (0.02, 0.015, 3), True),
        ((-0.02, 0.01), (-0.02, 0.015, 3), True),
        ((0.02, 0.03), (0.02, 0.015, 3), False),
        ((-0.02, 0.01), (-0.02, 0.05, 3), False),
        ((0.0, 0.0), (0.0, 0.0, 3), False),
        ((0.02, 0.01), (0.02, None, 1), False),
    ],
)
def test_both_intervals_must_leave_out_0(tasks: tuple[float, float], seeds: tuple[Any, ...], leaves_out: bool) -> None:
    assert statistics.Comparison({}, Interval(*tasks), statistics.Spread(*seeds)).leaves_out_0 == leaves_out


def test_rules_without_a_common_seed_are_not_compared() -> None:
    assert statistics.compare({0: torch.zeros(2)}, {1: torch.zeros(2)}) is None
