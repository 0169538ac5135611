"""The two-way model, simultaneous intervals, equivalence and Holm, against libraries, a table and known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multicomp import pairwise_tukeyhsd
from statsmodels.stats.weightstats import ttost_paired

from fewshot_asam.reproduce import inference
from fewshot_asam.reproduce.inference import Estimate, TwoWay

MARGIN = 0.005


def table(generator: np.random.Generator, effects: list[float], seeds: int, noise: float) -> dict[str, list[float]]:
    """Accuracies of rules with these effects, whose seeds differ much more than they do within a seed."""
    of_seeds = generator.normal(0.9, 0.02, seeds)
    values = np.array(effects)[:, None] + of_seeds + generator.normal(0, noise, (len(effects), seeds))
    return {f"rule {i}": row.tolist() for i, row in enumerate(values)}


def test_two_rules_are_a_paired_t_test() -> None:
    """And two one-sided paired tests; every interval is then the paired one."""
    found = table(np.random.default_rng(0), [0.0, 0.004], 8, 0.004)
    first, second = (np.array(values) for values in found.values())
    one = inference.estimate(inference.two_way(found), "rule 1", "rule 0", margin=MARGIN)
    expected = stats.ttest_rel(second, first)
    assert one.p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval(0.95)
    assert (one.mean - one.half_width, one.mean + one.half_width) == pytest.approx((low, high), rel=1e-4)
    assert one.p_equivalence == pytest.approx(ttost_paired(second, first, -MARGIN, MARGIN)[0], rel=1e-6)
    assert inference.two_way(found).global_p == pytest.approx(expected.pvalue, rel=1e-6)


def test_without_an_effect_of_the_seeds_it_is_the_block_design_of_textbooks() -> None:
    """The sums of squares written out."""
    found = table(np.random.default_rng(1), [0.0, 0.01, 0.02, 0.0], 5, 0.01)
    values = np.array(list(found.values()))
    grand = values.mean()
    rules, seeds = ((values.mean(axis) - grand) for axis in (1, 0))
    residual = values - grand - rules[:, None] - seeds
    mean_square = (residual**2).sum() / 12
    f = 5 * (rules**2).sum() / 3 / mean_square
    model = inference.two_way(found)
    assert model.degrees == 12
    assert model.variance == pytest.approx(mean_square, rel=1e-8)
    assert model.global_p == pytest.approx(stats.f.sf(f, 3, 12), rel=1e-6)
    assert inference.estimate(model, "rule 2", "rule 0", margin=MARGIN).error == pytest.approx(
        (mean_square / 2.5) ** 0.5
    )


@pytest.mark.parametrize(("rules", "seeds"), [(3, 4), (5, 10)])
def test_simultaneous_intervals_are_tukey_s_and_dunnett_s(rules: int, seeds: int) -> None:
    """Those of statsmodels and SciPy, which know one-way models alone: with their variance and degrees of freedom."""
    values = np.random.default_rng(2).normal(0.9, 0.02, (rules, seeds))
    variance, degrees = values.var(1, ddof=1).mean(), rules * (seeds - 1)
    model = TwoWay({str(i): row.mean() for i, row in enumerate(values)}, seeds, variance, degrees, 1.0)
    tukey = pairwise_tukeyhsd(values.flatten(), np.repeat(np.arange(rules), seeds))
    pairs = [(i, j) for i in range(rules) for j in range(i + 1, rules)]
    for (i, j), (low, high) in zip(pairs, tukey.confint, strict=True):
        one = inference.estimate(model, str(j), str(i), margin=MARGIN)
        assert (one.mean - one.half_width, one.mean + one.half_width) == pytest.approx((low, high), abs=1e-5)
    dunnett = stats.dunnett(*values[1:], control=values[0], random_state=np.random.default_rng(0)).confidence_interval()
    for i in range(1, rules):
        one = inference.estimate(model, str(i), "0", margin=MARGIN, baseline=True)
        assert one.mean - one.half_width == pytest.approx(dunnett.low[i - 1], abs=2e-4)
        assert one.mean + one.half_width == pytest.approx(dunnett.high[i - 1], abs=2e-4)


@pytest.mark.parametrize(
    ("others", "degrees", "width"),
    [(1, 10, 2.23), (2, 10, 2.57), (3, 10, 2.76), (9, 10, 3.25), (2, 60, 2.27), (4, 60, 2.51), (3, 5, 3.29)],
)
def test_dunnett_s_own_table(others: int, degrees: int, width: float) -> None:
    """Two-sided, 5 %: Dunnett, Biometrics 20 (1964), table II."""
    assert inference.dunnett(others, degrees) == pytest.approx(width, abs=0.011)


def test_other_tasks_would_differ_too() -> None:
    """The tasks' own error is added in quadrature, so that many seeds on few tasks are not certain."""
    model = TwoWay({"a": 0.91, "b": 0.9}, 100, 0.0, 99, 0.0)
    assert inference.estimate(model, "a", "b", margin=MARGIN).p == 0.0
    few = inference.estimate(model, "a", "b", margin=MARGIN, task_error=0.01)
    assert few.error == 0.01
    assert few.p == pytest.approx(2 * stats.t.sf(1, 99))


def simulated(
    effects: list[float], noise: float, rounds: int = 300, **options: Any
) -> list[tuple[TwoWay, list[Estimate]]]:
    """Models of tables with known truth, and in each the differences of all rules to the first."""
    generator, found = np.random.default_rng(3), []
    for _ in range(rounds):
        values = np.array(list(table(generator, effects, 6, noise).values()))
        centred = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
        degrees = (len(values) - 1) * 5
        means = {str(i): row.mean() for i, row in enumerate(values)}
        model = TwoWay(means, 6, (centred**2).sum() / degrees, degrees, 1.0)
        rows = [inference.estimate(model, str(i), "0", margin=MARGIN, **options) for i in range(1, len(values))]
        found.append((model, rows))
    return found


def test_false_positives_are_as_rare_as_is_said() -> None:
    """300 tables of 5 equal rules: at least one interval that leaves out 0, or Holm's p below 5 %, in about 5 %."""
    rounds = simulated([0.0] * 5, 0.01, baseline=True)
    beyond = sum(any(abs(one.mean) > one.half_width for one in rows) for _, rows in rounds)
    corrected = sum(4 * min(one.p for one in rows) < 0.05 for _, rows in rounds)  # Holm's for the smallest of four
    single = sum(any(one.p < 0.05 for one in rows) for _, rows in rounds)
    assert stats.binomtest(beyond, 300, 0.05).pvalue > 0.01
    assert corrected < 300 * 0.09
    assert single > 2 * beyond, "which uncorrected tests are not"


def test_equivalence_is_claimed_wrongly_as_rarely() -> None:
    """Of a rule exactly at the margin, in about 5 %; of an equal one, with little noise, nearly always."""
    at_margin = simulated([0.0, MARGIN, MARGIN], 0.002)
    claimed = sum(rows[0].p_equivalence < 0.05 for _, rows in at_margin)
    assert stats.binomtest(claimed, 300, 0.05).pvalue > 0.01
    assert sum(rows[0].p_equivalence < 0.05 for _, rows in simulated([0.0, 0.0, 0.0], 0.002)) > 280


def test_power_is_what_the_noncentral_t_says() -> None:
    """A difference of one point at a residual of 0.6 points, 6 seeds: the test finds it as often as theory says."""
    rounds = simulated([0.0, 0.01, 0.0], 0.006)
    found = sum(rows[0].p < 0.05 for _, rows in rounds)
    shift, edge = 0.01 / (0.006 * (2 / 6) ** 0.5), stats.t.ppf(0.975, 10)
    power = stats.nct.sf(edge, 10, shift) + stats.nct.cdf(-edge, 10, shift)
    assert stats.binomtest(found, 300, power).pvalue > 0.01


def test_the_model_that_is_simulated_is_the_one_that_is_fitted() -> None:
    values = table(np.random.default_rng(3), [0.0] * 5, 6, 0.01)
    (model, _), *_ = simulated([0.0] * 5, 0.01, rounds=1)
    fitted = inference.two_way(values)
    assert (fitted.variance, fitted.degrees) == pytest.approx((model.variance, model.degrees))


def test_holm() -> None:
    """By hand; what is not known yet counts as a test that finds nothing."""
    assert inference.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert inference.holm([0.01, None, None, 0.03]) == pytest.approx([0.04, 1, 1, 0.09])
    assert inference.holm([]) == []


@pytest.mark.parametrize(("second", "p"), [(0.9, 1.0), (0.8, 0.0)])
def test_runs_without_any_noise(second: float, p: float) -> None:
    model = inference.two_way({"a": [0.9, 0.9, 0.9], "b": [second] * 3})
    one = inference.estimate(model, "a", "b", margin=MARGIN)
    assert (model.global_p, one.p, one.p_equivalence) == (p, p, 1.0 - p)
