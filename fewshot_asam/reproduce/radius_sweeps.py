"""Radius sweeps: runs of a plan that differ in rule, radius and validation set alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fewshot_asam.reproduce.plan import NOT_IN_PLANS
from fewshot_asam.reproduce.section_results import RuleOfSection, SectionResults, difference
from fewshot_asam.reproduce.statistics import Spread, over_seeds
from fewshot_asam.training.config import plain


class Point(NamedTuple):
    """The runs of a rule with one radius, over seeds.

    - `accuracy`: in the test that rules are compared by.
    - `over_maml`: the paired difference to MAML; None for MAML itself and where they share no seed.
    """

    accuracy: Spread
    over_maml: Spread | None


Curve = dict[float, Point]
"""The points of a rule and validation set, by radius."""
Sweep = dict[str, Curve]
"""Curves that can be drawn in one picture, by rule and validation set."""


def radius_sweeps(sections: Sequence[SectionResults]) -> list[Sweep]:
    """The sweeps of a plan.

    A sweep has three radii of one rule at least. MAML, which has none, stands at radius 0. Of a run that stands in
    several sections the one with most seeds counts.
    """
    sweeps: dict[str, dict[str, dict[float, RuleOfSection]]] = {}
    for results in sections:
        for rule, config in results.section.rules.items():
            settings = {name: value for name, value in plain(config).items() if name not in NOT_IN_PLANS}
            name = settings["inner"] + _suffix(settings["validation"])
            radius = 0.0 if settings["inner"] == "maml" else settings["rho"]
            alike = {k: v for k, v in settings.items() if k not in ("inner", "rho", "validation")}
            adaptation, tasks = results.test(rule, results.main_test)
            key = json.dumps([alike, adaptation[1:], tasks])
            radii = sweeps.setdefault(key, {}).setdefault(name, {})
            known = _seeds(*radii[radius]) if radius in radii else 0
            if _seeds(results, rule) > known:
                radii[radius] = (results, rule)
    return [_sweep(curves) for curves in sweeps.values() if max(map(len, curves.values())) >= 3]


def _seeds(results: SectionResults, rule: str) -> int:
    return len(results.accuracies(rule, results.main_test))


def _sweep(curves: Mapping[str, Mapping[float, RuleOfSection]]) -> Sweep:
    maml = curves.get("maml", {}).get(0.0)
    return {name: {radius: _point(run, maml) for radius, run in radii.items()} for name, radii in curves.items()}


def _point(run: RuleOfSection, maml: RuleOfSection | None) -> Point:
    results, rule = run
    accuracy = over_seeds([mean for mean, _ in results.means(rule, results.main_test).values()])
    over = difference(run, maml) if maml and run != maml else None
    return Point(accuracy, over.seeds if over else None)


def _suffix(validation: str) -> str:
    return "" if validation == "duplicate" else f", {validation}"
