"""Radius sweeps: runs of a plan that differ in rule, radius and validation set alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fewshot_asam.reproduce.plan import ELSEWHERE
from fewshot_asam.reproduce.section_results import Found, Ruled, difference
from fewshot_asam.reproduce.statistics import Spread, over_seeds
from fewshot_asam.training.config import plain


class Point(NamedTuple):
    """The runs of a rule with one radius, over seeds.

    - `accuracy`: in the test that rules are compared by.
    - `over_maml`: the paired difference to MAML; None for MAML itself and where they share no seed.
    """

    accuracy: Spread
    over_maml: Spread | None


Family = dict[float, Point]
"""The points of a rule and validation set, by radius."""


def sweeps(sections: Sequence[Found]) -> list[dict[str, Family]]:
    """The sweeps of a plan, by rule and validation set.

    A sweep has three radii of one rule at least. MAML, which has none, stands at radius 0. Of a run that stands in
    several sections the one with most seeds counts.
    """
    groups: dict[str, dict[str, dict[float, Ruled]]] = {}
    for found in sections:
        for rule, config in found.section.rules.items():
            settings = {name: value for name, value in plain(config).items() if name not in ELSEWHERE}
            name = settings["inner"] + _suffix(settings["validation"])
            radius = 0.0 if settings["inner"] == "maml" else settings["rho"]
            alike = {k: v for k, v in settings.items() if k not in ("inner", "rho", "validation")}
            test = found.test(rule, found.main)
            radii = groups.setdefault(json.dumps([alike, test[1:]]), {}).setdefault(name, {})
            known = _seeds(*radii[radius]) if radius in radii else 0
            if _seeds(found, rule) > known:
                radii[radius] = (found, rule)
    return [_points(group) for group in groups.values() if max(map(len, group.values())) >= 3]


def _seeds(found: Found, rule: str) -> int:
    return len(found.accuracies(rule, found.main))


def _points(group: Mapping[str, Mapping[float, Ruled]]) -> dict[str, Family]:
    maml = group.get("maml", {}).get(0.0)
    return {name: {radius: _point(at, maml) for radius, at in radii.items()} for name, radii in group.items()}


def _point(at: Ruled, maml: Ruled | None) -> Point:
    found, rule = at
    accuracy = over_seeds([one.mean().item() for one in found.accuracies(rule, found.main).values()])
    over = difference(at, maml) if maml and at != maml else None
    return Point(accuracy, over.seeds if over else None)


def _suffix(validation: str) -> str:
    return "" if validation == "duplicate" else f", {validation}"
