"""Pairs of rules that a plan compares: what its sections say on each claim, question and control."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

from fewshot_asam.reproduce.plan import Pairs, cell_name
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults
from fewshot_asam.reproduce.statistics import BETTER, NOISE, WORSE, Comparison, Spread
from fewshot_asam.training.evaluation import Interval

NOT_RUN = "not run"
DIVERGED = "diverged"


class PairResult(NamedTuple):
    """What a section says on a claim, a question or a control: its first rule minus its second.

    - `published`: the published difference, in points.
    - `time_ratio`: the first rule's seconds an iteration over the second's.
    - `diverged`: the number of runs of either rule that diverged.
    - `noise_floor`: that of the plan.
    """

    text: str
    results: SectionResults
    published: float | None
    comparison: Comparison | None
    time_ratio: Spread | None
    diverged: int
    noise_floor: float | None

    @property
    def seeds(self) -> int:
        """How many seeds both rules have."""
        return self.comparison.seeds.seeds if self.comparison else 0

    @property
    def verdict(self) -> str:
        """On the first rule; `not run` without a seed that both have."""
        if self.comparison is None:
            return DIVERGED if self.diverged else NOT_RUN
        return self.comparison.verdict(self.noise_floor)

    @property
    def claim_verdict(self) -> str:
        """On a claim: confirmed or contradicted where a difference is published, else in favour of it or against it."""
        verdict = self.verdict
        if self.comparison is None or self.published is None:
            return {BETTER: "in favour", WORSE: "against"}.get(verdict, verdict)
        mean = 100 * self.comparison.tasks.mean
        if verdict in (BETTER, WORSE):
            return "confirmed" if mean * self.published > 0 else "contradicted"
        if verdict != NOISE:
            return verdict
        inside = abs(mean - self.published) <= 100 * self.comparison.half_width
        return f"not confirmed: {NOISE}, the published difference {'too' if inside else 'outside of it'}"


def pair_results(plan: PlanResults, pairs: Pairs) -> list[PairResult]:
    """Of each section that has both rules, finished ones first.

    Where several sections compare the same runs in the same test, the one that knows most is taken.
    """
    floor = noise_floor(plan)
    best: dict[tuple[object, ...], PairResult] = {}
    for text, (first, second) in pairs.items():
        for results in plan.sections:
            rules = results.section.rules
            if first in rules and second in rules:
                found = _pair_result(text, results, first, second, floor)
                tests = (results.test(rule, results.main_test) for rule in (first, second))
                key = (text, cell_name(rules[first]), cell_name(rules[second]), *tests)
                best[key] = max(best.get(key, found), found, key=lambda one: (one.published is not None, one.seeds))
    return sorted(best.values(), key=lambda one: one.comparison is None)


def _pair_result(text: str, results: SectionResults, first: str, second: str, floor: float | None) -> PairResult:
    published = results.section.published
    difference = published[first] - published[second] if first in published and second in published else None
    diverged = sum(rule in (first, second) for rule, _ in results.diverged)
    comparison, ratio = results.difference(first, second), results.time_ratio(first, second)
    return PairResult(text, results, difference, comparison, ratio, diverged, floor)


def noise_floor(plan: PlanResults) -> float | None:
    """The largest difference that the plan's controls leave room for; None where none has several seeds."""
    pairs = plan.plan.controls.values()
    found = [results.difference(*pair) for results in plan.sections for pair in pairs if _has(results, pair)]
    return max((one.reach for one in found if one is not None and one.reach is not None), default=None)


def _has(results: SectionResults, pair: tuple[str, str]) -> bool:
    return all(rule in results.section.rules for rule in pair)


def single_seed_differences(plan: PlanResults) -> list[Interval]:
    """Each seed's difference of two rules that several seeds cannot tell apart, of the same runs once."""
    by_runs: dict[frozenset[str], Comparison] = {}
    for results in plan.sections:
        for first, second in combinations(results.section.rules, 2):
            runs = frozenset(cell_name(results.section.rules[rule]) for rule in (first, second))
            comparison = results.difference(first, second)
            if comparison is not None and comparison.verdict(None) == NOISE:
                by_runs[runs] = comparison
    return [one for comparison in by_runs.values() for one in comparison.each.values()]


def misleading(differences: Iterable[Interval]) -> int:
    """How many of these differences leave out 0 by their interval over tasks."""
    return sum(abs(one.mean) > one.half_width for one in differences)
