"""Verdicts in words, corrected together for all that the registered plans of the page compare."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from fewshot_asam.reproduce.comparisons import PairResult, model, noise_floor, pair_results
from fewshot_asam.reproduce.inference import LEVEL, Estimate, holm
from fewshot_asam.reproduce.registration import UNCOMMITTED
from fewshot_asam.reproduce.section_results import PlanResults

NOT_REGISTERED = "not registered: no verdict"
NOT_DECIDED = "not decided"
BELOW_CONTROL = "no more than the control shows"
BETTER, WORSE, EQUAL = "better", "worse", "equal within {margin:g} points"
SMALL = ", by less than {margin:g} points"

Key = tuple[str, str, str, str]
"""A plan, a section, and two of its rules."""


class Verdict(NamedTuple):
    """What is said of a pair, and its p-values after the correction; None where there is nothing to correct yet."""

    words: str
    p: float | None = None
    p_equivalence: float | None = None

    @property
    def decided(self) -> bool:
        """Whether it says something of the rules."""
        return self.words.startswith((BETTER, WORSE, "equal"))


class Verdicts(NamedTuple):
    """Of all pairs by key, and of each section's global test by plan and section."""

    pairs: dict[Key, Verdict]
    sections: dict[tuple[str, str], float]


def key(plan: PlanResults, one: PairResult) -> Key:
    """Where to find a pair's verdict."""
    return plan.plan.name, one.results.section.title, one.first, one.second


def compared(plan: PlanResults) -> list[PairResult]:
    """The claims and questions of a plan in all its sections."""
    return [*pair_results(plan, plan.plan.claims), *pair_results(plan, plan.plan.questions)]


def verdicts(plans: Sequence[PlanResults]) -> Verdicts:
    """Of all plans. One family for Holm's method: every global test, difference and equivalence of those that are
    registered, and what is not finished counts as a test that finds nothing, so that the family does not grow with the
    runs."""
    words: dict[Key, Verdict] = {}
    values: dict[tuple[str, tuple[str, ...]], float | None] = {}
    standing = [plan for plan in plans if plan.plan.registered and not plan.plan.superseded]
    for plan in plans:
        for one in compared(plan):
            words[key(plan, one)] = Verdict(_pending(plan) or NOT_DECIDED)
    for plan in standing:
        final = not _pending(plan)
        for results in plan.sections:
            fitted = model(results) if final else None
            values["global", (plan.plan.name, results.section.title)] = fitted.global_p if fitted else None
        for one in compared(plan):
            found = one.estimate if final else None
            values["p", key(plan, one)] = found.p if found else None
            values["equal", key(plan, one)] = found.p_equivalence if found else None
    corrected = dict(zip(values, holm(list(values.values())), strict=True))
    for plan in standing:
        for one in compared(plan):
            if not _pending(plan) and one.estimate:
                place = key(plan, one)
                words[place] = _worded(plan, one.estimate, corrected["p", place], corrected["equal", place])
    sections = {(place[0], place[1]): p for (kind, place), p in corrected.items() if kind == "global"}
    return Verdicts(words, sections)


@cache
def _pending(plan: PlanResults) -> str:
    """Why a plan gives no verdicts; empty where it does."""
    registered = plan.plan.registered
    if registered is None or plan.plan.superseded:
        return NOT_REGISTERED
    missing = {r.section.cell(rule, seed).name for r in plan.sections for rule, seed in r.missing}
    if missing:
        return f"unfinished: {registered.runs - len(missing)} of {registered.runs} runs"
    return "made under another plan than the registered one: no verdict" if unregistered_runs(plan) else ""


def unregistered_runs(plan: PlanResults) -> list[str]:
    """The runs of a registered plan that were made before it was committed, or while it said something else."""
    found = []
    for results in plan.sections:
        for record in (record for runs in results.runs.values() for record in runs.values()):
            stamps = {stamp["plan"]: stamp for stamp in record.get("registered", [])}
            stamp = stamps.get(plan.plan.name)
            if stamp is None or stamp["digest"] != plan.plan.digest or stamp["commit"] == UNCOMMITTED:
                found.append(record["cell"])
    return list(dict.fromkeys(found))


def _worded(plan: PlanResults, found: Estimate, p: float, p_equivalence: float) -> Verdict:
    assert plan.plan.registered is not None
    margin, differs, equal = plan.plan.registered.margin, p < LEVEL, p_equivalence < LEVEL
    if differs and abs(found.mean) > (noise_floor(plan) or 0.0):
        words = (BETTER if found.mean > 0 else WORSE) + (SMALL.format(margin=margin) if equal else "")
    elif equal:
        words = EQUAL.format(margin=margin)
    else:
        words = BELOW_CONTROL if differs else NOT_DECIDED
    return Verdict(words, p, p_equivalence)
