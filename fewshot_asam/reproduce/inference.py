"""What runs of several rules and seeds say together: a two-way model, simultaneous intervals, tests and corrections.

The model is additive, accuracy = rule + seed + residual, with one run a rule and seed (a randomised block design). The
residuals' variance is taken to be one, whatever the rule. What is computed is SciPy's and statsmodels'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
"""Of all tests and intervals."""
SMALLEST = 1e-20
"""A variance of accuracies below which it is rounding."""


class TwoWay(NamedTuple):
    """A fitted two-way model.

    - `means`: by rule, over the seeds.
    - `seeds`: how many, `>= 2`.
    - `variance`, `degrees`: of the residuals.
    - `global_p`: of the F test that all rules are equal.
    """

    means: dict[str, float]
    seeds: int
    variance: float
    degrees: int
    global_p: float


class Estimate(NamedTuple):
    """A difference of two rules.

    - `mean`: of the accuracies, a part of 1.
    - `error`: its standard error, over seeds and over tasks.
    - `half_width`: of its interval, which holds together with all others of its family.
    - `p`: of the t test against 0.
    - `p_equivalence`: of the two one-sided tests (TOST) against the margin.
    """

    mean: float
    error: float
    half_width: float
    p: float
    p_equivalence: float


def two_way(accuracies: Mapping[str, Sequence[float]]) -> TwoWay:
    """The model of a table of mean accuracies: by rule, one a seed, the same seeds in the same order for all.

    At least two rules and two seeds.
    """
    from pandas import DataFrame
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    rows = [(rule, seed, value) for rule, values in accuracies.items() for seed, value in enumerate(values)]
    fitted = ols("accuracy ~ C(rule) + C(seed)", DataFrame(rows, columns=["rule", "seed", "accuracy"])).fit()
    means = {rule: math.fsum(values) / len(values) for rule, values in accuracies.items()}
    seeds = len(next(iter(accuracies.values())))
    if fitted.mse_resid < SMALLEST:
        equal = max(means.values()) - min(means.values()) < math.sqrt(SMALLEST)
        return TwoWay(means, seeds, 0.0, int(fitted.df_resid), float(equal))
    p = float(anova_lm(fitted).loc["C(rule)", "PR(>F)"])
    return TwoWay(means, seeds, float(fitted.mse_resid), int(fitted.df_resid), p)


def estimate(
    model: TwoWay, first: str, second: str, *, margin: float, baseline: bool = False, task_error: float = 0.0
) -> Estimate:
    """`first - second` in a fitted model.

    **Arguments:**

    - `margin`: of the equivalence test, a part of 1.
    - `baseline`: the family is all rules against one (Dunnett), instead of each against each (Tukey).
    - `task_error`: the standard error of the difference over the test tasks, all runs being tested on the same ones. It
        is added in quadrature, as other tasks would give another difference however many seeds there are.
    """
    mean = model.means[first] - model.means[second]
    error = math.sqrt(2 * model.variance / model.seeds + task_error**2)
    rules = len(model.means)
    width = error * (dunnett(rules - 1, model.degrees) if baseline else tukey(rules, model.degrees))
    if error == 0:
        return Estimate(mean, error, width, float(mean == 0), float(abs(mean) >= margin))
    t = stats.t(model.degrees)
    equivalence = max(t.sf((mean + margin) / error), t.cdf((mean - margin) / error))
    return Estimate(mean, error, width, float(2 * t.sf(abs(mean) / error)), float(equivalence))


@cache
def tukey(rules: int, degrees: int) -> float:
    """How many standard errors all pairwise differences of so many rules stay within, at 95 % (Tukey)."""
    return float(stats.studentized_range.ppf(1 - LEVEL, rules, degrees) / math.sqrt(2))


@cache
def dunnett(others: int, degrees: int) -> float:
    """How many standard errors the differences of so many rules to one stay within, at 95 % (Dunnett 1955).

    Two such differences correlate by 1/2, as they share that rule.
    """
    if others == 1:
        return float(stats.t.ppf(1 - LEVEL / 2, degrees))
    joint = stats.multivariate_t(shape=(np.eye(others) + 1) / 2, df=degrees, seed=0)

    def beyond(width: float) -> float:
        edge = np.full(others, width)
        return float(joint.cdf(edge, lower_limit=-edge, random_state=0) - (1 - LEVEL))

    return float(optimize.brentq(beyond, 1.0, 30.0, xtol=1e-4))


def holm(values: Sequence[float | None]) -> list[float]:
    """p-values corrected for their number by Holm's method; those not known yet, None, count as 1."""
    from statsmodels.stats.multitest import multipletests

    if not values:
        return []
    known = [1.0 if value is None else value for value in values]
    return [float(value) for value in multipletests(known, LEVEL, method="holm")[1]]
