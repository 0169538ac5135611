"""What the ledger holds of a plan's sections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.plan import Plan, Section, Test, resolved
from fewshot_asam.reproduce.statistics import Comparison, Spread, compare, over_seeds

Runs = dict[int, Record]
"""The records of a rule's runs by seed."""


class Found(NamedTuple):
    """A section and its runs by rule; `diverged` and `missing` hold the rule and seed of the others."""

    section: Section
    runs: dict[str, Runs]
    diverged: list[tuple[str, int]]
    missing: list[tuple[str, int]]

    def test(self, rule: str, name: str) -> Test:
        """A test of the section as a rule takes it."""
        return resolved(self.section.tests[name], self.section.rules[rule])

    @property
    def main(self) -> str:
        """The test that rules are compared by."""
        return next(iter(self.section.tests))

    def accuracies(self, rule: str, name: str, tasks: int | None = None) -> dict[int, Tensor]:
        """A test's accuracies `[tasks]` by seed, all tasks that the section asks for or the first ones."""
        test = self.test(rule, name)
        tests = {seed: ledger.find(record, test) for seed, record in self.runs.get(rule, {}).items()}
        return {seed: ledger.accuracies(t, tasks or test.tasks) for seed, t in tests.items() if t is not None}

    def mean(self, rule: str, name: str, tasks: int | None = None) -> Spread | None:
        """A test's mean accuracy over the seeds; None where no seed is done."""
        values = [found.mean().item() for found in self.accuracies(rule, name, tasks).values()]
        return over_seeds(values) if values else None

    def difference(self, first: str, second: str) -> Comparison | None:
        """One rule minus another in the test that rules are compared by; None where they share no seed."""
        return compare(self.accuracies(first, self.main), self.accuracies(second, self.main))

    def seconds(self, rule: str) -> float:
        """Seconds an iteration of training, validations included, mean over the seeds."""
        runs = self.runs[rule].values()
        return over_seeds([record["wall_seconds"] / record["iterations"] for record in runs]).mean

    def congruence(self, rule: str, name: str) -> dict[int, float]:
        """A congruence of the weights that were tested, by seed, from the validation that chose them."""
        runs = {seed: run for seed, run in self.runs.get(rule, {}).items() if name in run["validation"]}
        at = {seed: run["validation"]["iteration"].index(run["best_iteration"]) for seed, run in runs.items()}
        return {seed: run["validation"][name][at[seed]] for seed, run in runs.items()}


def look_up(section: Section, records: Mapping[str, Record]) -> Found:
    """The section's runs in the ledger."""
    found = Found(section, {}, [], [])
    for rule in section.rules:
        for seed in section.seeds:
            cell = section.cell(rule, seed)
            if not ledger.is_done(cell, records):
                found.missing.append((rule, seed))
            elif "diverged" in records[cell.name]:
                found.diverged.append((rule, seed))
            else:
                found.runs.setdefault(rule, {})[seed] = records[cell.name]
    return found


Family = dict[float, Spread]
"""Accuracies over seeds by radius."""


def sweeps(plan: Plan, records: Mapping[str, Record]) -> list[dict[str, Family]]:
    """The plan's radius sweeps: runs that differ in rule, radius and validation set alone, by rule and validation set.

    A sweep has three radii of one rule at least. MAML, which has none, stands at radius 0.
    """
    groups: dict[str, dict[str, Family]] = {}
    for found in (look_up(section, records) for section in plan.sections):
        for rule in found.runs:
            settings = next(iter(found.runs[rule].values()))["settings"]
            alike = {k: v for k, v in settings.items() if k not in ("inner", "rho", "validation", "seed")}
            name = settings["inner"] + _suffix(settings["validation"])
            radius = 0.0 if settings["inner"] == "maml" else settings["rho"]
            mean = found.mean(rule, found.main)
            if mean is not None:
                groups.setdefault(json.dumps(alike), {}).setdefault(name, {})[radius] = mean
    return [group for group in groups.values() if max(len(family) for family in group.values()) >= 3]


def _suffix(validation: str) -> str:
    return "" if validation == "duplicate" else f", {validation}"
