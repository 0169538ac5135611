"""Pairs of rules that a plan compares: what its sections say on each claim, question and control."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations
from typing import NamedTuple

from fewshot_asam.reproduce import inference
from fewshot_asam.reproduce.inference import Estimate, TwoWay
from fewshot_asam.reproduce.plan import Pairs, cell_name
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults
from fewshot_asam.reproduce.statistics import Comparison, Spread
from fewshot_asam.training.evaluation import Interval

MARGIN = 0.5
"""Points of accuracy below which a difference does not matter, where a plan does not say otherwise."""


class PairResult(NamedTuple):
    """What a section says on a claim, a question or a control: its first rule minus its second.

    - `published`: the published difference, in points.
    - `comparison`: paired, over the seeds that both have; `estimate` in the model of all rules of the section.
    - `time_ratio`: the first rule's seconds an iteration over the second's.
    - `diverged`: the number of runs of either rule that diverged.
    """

    text: str
    results: SectionResults
    first: str
    second: str
    published: float | None
    comparison: Comparison | None
    estimate: Estimate | None
    time_ratio: Spread | None
    diverged: int

    @property
    def seeds(self) -> int:
        """How many seeds both rules have."""
        return self.comparison.seeds.seeds if self.comparison else 0

    @property
    def across_commits(self) -> bool:
        """Whether its runs were made by different commits."""
        return self.results.across_commits(self.first, self.second)


def pair_results(plan: PlanResults, pairs: Pairs) -> list[PairResult]:
    """Of each section that has both rules, finished ones first.

    Where several sections compare the same runs in the same test, the one that knows most is taken.
    """
    best: dict[tuple[object, ...], PairResult] = {}
    for text, (first, second) in pairs.items():
        for results in plan.sections:
            rules = results.section.rules
            if first in rules and second in rules:
                found = _pair_result(text, plan, results, first, second)
                tests = (results.test(rule, results.main_test) for rule in (first, second))
                key = (text, cell_name(rules[first]), cell_name(rules[second]), *tests)
                best[key] = max(best.get(key, found), found, key=lambda one: (one.published is not None, one.seeds))
    return sorted(best.values(), key=lambda one: one.comparison is None)


def _pair_result(text: str, plan: PlanResults, results: SectionResults, first: str, second: str) -> PairResult:
    published = results.section.published
    difference = published[first] - published[second] if first in published and second in published else None
    diverged = sum(rule in (first, second) for rule, _ in results.diverged)
    comparison, ratio = results.difference(first, second), results.time_ratio(first, second)
    found = estimate(plan, results, first, second)
    return PairResult(text, results, first, second, difference, comparison, found, ratio, diverged)


@cache
def model(results: SectionResults) -> TwoWay | None:
    """The two-way model of a section's runs in its main test; None where not two seeds are complete."""
    seeds = results.complete_seeds
    if len(seeds) < 2 or len(results.section.rules) < 2:
        return None
    means = {rule: results.means(rule, results.main_test) for rule in results.section.rules}
    return inference.two_way({rule: [found[seed].mean for seed in seeds] for rule, found in means.items()})


@cache
def estimate(plan: PlanResults, results: SectionResults, first: str, second: str) -> Estimate | None:
    """One rule minus another in the model of their section, with the error that other tasks would add."""
    fitted, comparison = model(results), results.difference(first, second)
    if fitted is None or comparison is None:
        return None
    margin = plan.plan.registered.margin if plan.plan.registered else MARGIN
    return inference.estimate(
        fitted,
        first,
        second,
        margin=margin / 100,
        baseline=results.section.baseline in (first, second),
        task_error=comparison.tasks.half_width / 1.96,
    )


def control(plan: PlanResults) -> PairResult | None:
    """The control with the largest reach; None where none has several seeds."""
    known = [one for one in pair_results(plan, plan.plan.controls) if one.estimate is not None]
    return max(known, key=lambda one: reach(one.estimate), default=None)


def reach(found: Estimate | None) -> float:
    """The size of the largest difference that a control's interval leaves room for."""
    return abs(found.mean) + found.half_width if found else 0.0


def noise_floor(plan: PlanResults) -> float | None:
    """The largest difference that the plan's controls leave room for; None where none has several seeds."""
    found = control(plan)
    return reach(found.estimate) if found else None


def single_seed_differences(plan: PlanResults) -> list[Interval]:
    """Each seed's difference of two rules that several seeds cannot tell apart, of the same runs once."""
    by_runs: dict[frozenset[str], Comparison] = {}
    for results in plan.sections:
        for first, second in combinations(results.section.rules, 2):
            runs = frozenset(cell_name(results.section.rules[rule]) for rule in (first, second))
            comparison = results.difference(first, second)
            if comparison is not None and comparison.seeds.seeds > 1 and not comparison.leaves_out_0:
                by_runs[runs] = comparison
    return [one for comparison in by_runs.values() for one in comparison.each.values()]


def misleading(differences: Iterable[Interval]) -> int:
    """How many of these differences leave out 0 by their interval over tasks."""
    return sum(abs(one.mean) > one.half_width for one in differences)
