"""What training with a rule changes, and what adapting with it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fewshot_asam.reproduce.section_results import SectionResults, of_seeds
from fewshot_asam.reproduce.statistics import Comparison, compare


class Decomposition(NamedTuple):
    """Accuracies of a rule minus MAML's, in two parts.

    - `training`: weights trained with the rule minus weights trained with MAML, both adapted by MAML.
    - `adapting`: the weights trained with the rule, adapted by it minus adapted by MAML.
    - `both`: the sum.
    """

    rule: str
    setting: str
    steps: int
    tasks: int
    training: Comparison
    adapting: Comparison
    both: Comparison


def decompositions(results: SectionResults) -> Iterator[Decomposition]:
    """Of each rule of a section that was also tested with MAML's steps, by number of steps."""
    rules = results.section.rules
    baseline = next((rule for rule, config in rules.items() if config.inner == "maml"), None)
    for rule in rules:
        if baseline is not None and rules[rule].inner != "maml":
            for own, plain in _matching_tests(results, rule):
                found = _decomposition(results, rule, baseline, own, plain)
                if found is not None:
                    yield found


def _matching_tests(results: SectionResults, rule: str) -> list[tuple[str, str]]:
    """Pairs of tests of a rule's weights that differ in rule alone: its own, and MAML."""
    inner = results.section.rules[rule].inner
    tests = {name: results.test(rule, name).adaptation for name in results.section.tests}
    pairs = {
        (one.inner_steps, one.inner_lr): (own, plain)
        for own, one in tests.items()
        for plain, other in tests.items()
        if one.inner == inner and other == one._replace(inner="maml")
    }
    return [pairs[key] for key in sorted(pairs)]


def _decomposition(results: SectionResults, rule: str, baseline: str, own: str, plain: str) -> Decomposition | None:
    tests = results.test(rule, own), results.test(rule, plain), results.test(baseline, plain)
    if tests[2].adaptation != tests[1].adaptation:
        return None
    tasks = min(test.tasks for test in tests)
    by_rule, by_maml = results.accuracies(rule, own, tasks), results.accuracies(rule, plain, tasks)
    trained_with_maml = results.accuracies(baseline, plain, tasks)
    shared = by_rule.keys() & by_maml.keys() & trained_with_maml.keys()
    seeds = [seed for seed in results.paired_seeds(rule, baseline) if seed in shared]
    mine, adapted, theirs = (of_seeds(seeds, values) for values in (by_rule, by_maml, trained_with_maml))
    parts = compare(adapted, theirs), compare(mine, adapted), compare(mine, theirs)
    training, adapting, both = parts
    if training is None or adapting is None or both is None:
        return None
    steps = tests[0].adaptation.inner_steps
    return Decomposition(rule, results.section.title, steps, tasks, training, adapting, both)
