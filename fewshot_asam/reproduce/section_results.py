"""What the ledger holds of a plan's sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import Tensor

from fewshot_asam.analysis.congruence import ascent_radius
from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.plan import Plan, Section, Test, resolved
from fewshot_asam.reproduce.statistics import Comparison, Spread, compare, over_seeds
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import Interval, interval

Runs = dict[int, Record]
"""The records of a rule's runs by seed."""


@dataclass(frozen=True, eq=False)  # so that what is computed of it can be kept
class SectionResults:
    """A section and its runs by rule; `missing` holds the rule and seed of each run that is not done."""

    section: Section
    runs: dict[str, Runs]
    diverged: list[tuple[str, int]]
    missing: list[tuple[str, int]]

    def test(self, rule: str, name: str) -> Test:
        """A test of the section as a rule takes it."""
        return resolved(self.section.tests[name], self.section.rules[rule])

    @property
    def main_test(self) -> str:
        """The test that rules are compared by."""
        return next(iter(self.section.tests))

    def accuracies(self, rule: str, name: str, tasks: int | None = None) -> dict[int, Tensor]:
        """A test's accuracies `[tasks]` by seed: of all tasks that the section asks for, or of the first ones."""
        test = self.test(rule, name)
        records = {seed: ledger.find(record, test) for seed, record in self.runs.get(rule, {}).items()}
        return {seed: ledger.accuracies(r, tasks or test.tasks) for seed, r in records.items() if r is not None}

    def means(self, rule: str, name: str, tasks: int | None = None) -> dict[int, Interval]:
        """A test's mean accuracy by seed, with its interval over tasks."""
        return {seed: interval(values) for seed, values in self.accuracies(rule, name, tasks).items()}

    def last_weights(self, rule: str) -> dict[int, Interval]:
        """The accuracy of the last weights by seed, in the test that ends a training; older runs have none."""
        runs = {seed: run for seed, run in self.runs.get(rule, {}).items() if "last_test_accuracy" in run}
        return {seed: Interval(run["last_test_accuracy"], run["last_test_ci95"]) for seed, run in runs.items()}

    def paired_seeds(self, first: str, second: str) -> list[int]:
        """The seeds that two rules have from the same data and kind of device, so that they met the same tasks."""
        return _paired_seeds(self.runs.get(first, {}), self.runs.get(second, {}))

    @property
    def complete_seeds(self) -> list[int]:
        """The seeds that all rules of the section have, as comparable runs: those that the two-way model is of."""
        rules, name = list(self.section.rules), self.main_test
        tested = [self.accuracies(rule, name).keys() for rule in rules]
        return [
            seed
            for seed in self.section.seeds
            if all(seed in seeds for seeds in tested)
            and all(seed in self.paired_seeds(rules[0], rule) for rule in rules[1:])
        ]

    def across_commits(self, first: str, second: str) -> bool:
        """Whether a pair of runs of these rules was made by different commits of the package."""
        one, other = self.runs.get(first, {}), self.runs.get(second, {})
        return any(one[seed]["commit"] != other[seed]["commit"] for seed in self.paired_seeds(first, second))

    def difference(self, first: str, second: str) -> Comparison | None:
        """One rule minus another in the test that rules are compared by; None where they share no seed."""
        return difference((self, first), (self, second))

    def time_ratio(self, first: str, second: str) -> Spread | None:
        """One rule's seconds an iteration over another's, for the seeds that both have from the same machine."""
        pairs = [(self.runs[first][seed], self.runs[second][seed]) for seed in self.paired_seeds(first, second)]
        ratios = [seconds(one) / seconds(other) for one, other in pairs if machine(one) == machine(other)]
        return over_seeds(ratios) if ratios else None

    def congruence(self, rule: str, name: str) -> dict[int, float]:
        """A congruence of the best weights by seed, from the validation that chose them."""
        runs = {seed: run for seed, run in self.runs.get(rule, {}).items() if name in run["validation"]}
        at = {seed: run["validation"]["iteration"].index(run["best_iteration"]) for seed, run in runs.items()}
        return {seed: run["validation"][name][at[seed]] for seed, run in runs.items()}


@dataclass(frozen=True, eq=False)
class PlanResults:
    """A plan, and its sections in the ledger."""

    plan: Plan
    sections: Sequence[SectionResults]


RuleOfSection = tuple[SectionResults, str]


@cache
def difference(first: RuleOfSection, second: RuleOfSection) -> Comparison | None:
    """`SectionResults.difference` of rules that may stand in different sections, whose main tests must be the same."""
    (one, ours), (other, theirs) = first, second
    seeds = _paired_seeds(one.runs.get(ours, {}), other.runs.get(theirs, {}))
    return compare(
        of_seeds(seeds, one.accuracies(ours, one.main_test)), of_seeds(seeds, other.accuracies(theirs, other.main_test))
    )


def plan_results(plans: Iterable[Plan], records: Mapping[str, Record]) -> list[PlanResults]:
    """What the ledger holds of these plans."""
    return [PlanResults(plan, [_section_results(section, records) for section in plan.sections]) for plan in plans]


def _section_results(section: Section, records: Mapping[str, Record]) -> SectionResults:
    """The section's runs in the ledger, with whatever tests they have."""
    results = SectionResults(section, {}, [], [])
    for rule in section.rules:
        for seed in section.seeds:
            cell = section.cell(rule, seed)
            if not ledger.is_done(cell, records):
                results.missing.append((rule, seed))
            if cell.name in records and "diverged" in records[cell.name]:
                results.diverged.append((rule, seed))
            elif cell.name in records:
                results.runs.setdefault(rule, {})[seed] = records[cell.name]
    return results


def seconds(record: Record) -> float:
    """Seconds an iteration of training, validations included."""
    return float(record["wall_seconds"] / record["iterations"])


def machine(record: Record) -> str:
    """What a run's time depends on."""
    device = record["device"]
    threads = f" ({record['threads']} threads)" if device == "cpu" else ""
    return f"{device}{threads}, {record['engine']}, torch {record['versions']['torch']}"


def _paired_seeds(one: Runs, other: Runs) -> list[int]:
    return [seed for seed in one if seed in other and _comparable(one[seed], other[seed])]


def _comparable(one: Record, other: Record) -> bool:
    """Whether two runs met the same tasks: on one kind of device, and on the same images as far as that is known."""
    same_data = "data" not in one or "data" not in other or one["data"] == other["data"]
    return _on_cpu(one) == _on_cpu(other) and same_data


def _on_cpu(record: Record) -> bool:
    return bool(record["device"] == "cpu")


def of_seeds(seeds: Sequence[int], accuracies: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The accuracies of these seeds alone, those that there are."""
    return {seed: accuracies[seed] for seed in seeds if seed in accuracies}


class CongruenceKind(NamedTuple):
    """How a run's congruence is taken: only what is taken alike can be compared."""

    radius: str
    validation: str


def congruence_kind(config: TrainConfig) -> CongruenceKind:
    """The radius of `theta_v` and the validation set of a run's congruence."""
    radius = f"{ascent_radius(config.rule, config.rho):g}" + (" (ASAM)" if config.adaptive else "")
    return CongruenceKind(radius, "held out" if config.validation == "split" else "augmented copy")
