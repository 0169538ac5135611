"""A section of a plan as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations

from fewshot_asam.reproduce import plots
from fewshot_asam.reproduce.comparisons import estimate, model
from fewshot_asam.reproduce.markdown import (
    NOTHING,
    accuracy,
    block,
    cosine,
    figure,
    percent,
    picture,
    probability,
    ratio,
    simultaneous,
    spread,
    table,
)
from fewshot_asam.reproduce.plan import adaptation_command, command
from fewshot_asam.reproduce.runner import SHORT_TEST
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults, congruence_kind, machine, seconds
from fewshot_asam.reproduce.statistics import over_seeds

FEW_TESTS = 3
"""So many tests fit into the first table; more have one of their own."""


def render(found: PlanResults, results: SectionResults, corrected: float | None) -> Iterable[str]:
    """A section that has runs; `corrected` is the p-value of its global test after the page's correction."""
    plan, section = found.plan, results.section
    yield f"## {section.title}\n"
    yield f"{_setting(results)}\n"
    if section.note:
        yield f"{section.note}\n"
    yield _results(results)
    yield f"{_precision(results)}\n"
    if results.runs:
        yield f"{picture(plots.curves_name(plan, section), f'{section.title}: accuracy while training')}\n"
    if len(section.tests) > FEW_TESTS:
        yield f"The same weights in other tests:\n\n{_other_tests(results)}"
    if len(section.seeds) > 1:
        yield f"Seed by seed, ± over tasks:\n\n{_by_seed(results)}"
        if differences := _differences(found, results):
            yield f"{_model(results, corrected)}\n\n{differences}"
    if congruence := _congruence(results):
        yield congruence
    for rule, seed in results.diverged:
        yield f"Diverged, so without an accuracy: {rule}, seed {seed}.\n"
    yield _commands(results)


def _setting(results: SectionResults) -> str:
    """What the section's accuracies must not be quoted without."""
    config = next(iter(results.section.rules.values()))
    steps = f"{config.inner_steps} inner step{'s' if config.inner_steps > 1 else ''} of {config.inner_lr:g}"
    return (
        f"{config.dataset}, {config.ways}-way {config.shots}-shot, {config.queries} queries a class, "
        f"{config.norm} norm; {config.model}, {config.hidden} filters, init {config.init}, head {config.head_init}, "
        f"adapt {config.adapt}; {config.iterations:,} iterations of {config.meta_batch_size} tasks, Adam of "
        f"{config.meta_lr:g} ({config.schedule}); {steps}."
    )


def _precision(results: SectionResults) -> str:
    """What the ± of the first table is, and where the runs were made."""
    records = [record for runs in results.runs.values() for record in runs.values()]
    where = "; ".join([*sorted({machine(r) for r in records}), *sorted({f"commit {r['commit']}" for r in records})])
    if any(len(runs) > 1 for runs in results.runs.values()):
        kind = "± is over seeds (with one seed: over tasks)."
    else:
        kind = "One seed, and ± is over tasks: other seeds would give other differences between the rules."
    weights = "The weights are those that were best on validation tasks, unless it says last."
    return f"{weights} {kind} Time includes validations{f'; {where}' if where else ''}."


def _results(results: SectionResults) -> str:
    """Published and own accuracy, iterations and time of each rule."""
    section = results.section
    tests = list(section.tests) if len(section.tests) <= FEW_TESTS else [results.main_test]
    last_tasks = sorted({r["test_tasks"] for runs in results.runs.values() for r in runs.values() if "test_tasks" in r})
    tested = any(section.tests[name].get("weights") == "last" for name in tests)
    last = f"last weights, {', '.join(f'{n:,}' for n in last_tasks)} tasks"
    head = ["rule", "published, %", *(_test_title(results, name) for name in tests), last]
    head += ["iterations", "best at", "minutes", "ms an iteration", "time", "seeds"]
    first, rows = next(iter(results.runs), None), []
    for rule, config in section.rules.items():
        runs = results.runs.get(rule, {}).values()
        row = [rule, figure(section.published.get(rule))]
        row += [accuracy([*results.means(rule, name).values()]) for name in tests]
        row += [NOTHING if tested else accuracy([*results.last_weights(rule).values()]), f"{config.iterations:,}"]
        if runs:
            row += [", ".join(dict.fromkeys(f"{record['best_iteration']:,}" for record in runs))]
            row += [f"{over_seeds([record['wall_seconds'] / 60 for record in runs]).mean:.1f}"]
            row += [f"{over_seeds([1000 * seconds(record) for record in runs]).mean:.0f}"]
            row += [ratio(results.time_ratio(rule, first) if first else None)]
        rows.append([*row, *[NOTHING] * (len(head) - 1 - len(row)), str(len(runs))])
    for label, value in section.published.items():
        if label not in section.rules:
            rows.append([label, figure(value), *[NOTHING] * (len(head) - 2)])
    return table(head, rows)


def _test_title(results: SectionResults, name: str) -> str:
    return f"{name}, {results.section.tests[name]['tasks']:,} tasks"


def _other_tests(results: SectionResults) -> str:
    tests = results.section.tests
    rows = [
        [rule, *(accuracy([*results.means(rule, name).values()]) for name in tests)] for rule in results.section.rules
    ]
    return table(["trained with", *(f"{name} ({test['tasks']:,} tasks)" for name, test in tests.items())], rows)


def _by_seed(results: SectionResults) -> str:
    section = results.section
    rows = []
    for rule in section.rules:
        means = results.means(rule, results.main_test)
        each = [percent(means[seed]) if seed in means else NOTHING for seed in section.seeds]
        fewer = [*results.means(rule, results.main_test, SHORT_TEST).values()]
        rows.append(
            [rule, *each, accuracy(fewer) if section.tests[results.main_test]["tasks"] > SHORT_TEST else NOTHING]
        )
    return table(["rule", *(f"seed {seed}" for seed in section.seeds), f"first {SHORT_TEST} tasks, over seeds"], rows)


def _model(results: SectionResults, corrected: float | None) -> str:
    """The global test, and what the simultaneous intervals are of."""
    fitted = model(results)
    if fitted is None:
        return "Paired differences, in points:"
    family = f"all differences to {results.section.baseline} (Dunnett)" if results.section.baseline else "all (Tukey)"
    after = f", {probability(corrected)} after the page's correction" if corrected is not None else ""
    return (
        f"Two-way model of {len(fitted.means)} rules and {fitted.seeds} seeds: residual deviation "
        f"{100 * math.sqrt(fitted.variance):.2f} points, {fitted.degrees} degrees of freedom; that all rules are "
        f"equal has p = {probability(fitted.global_p)}{after}. Paired differences, in points; simultaneous intervals "
        f"hold together for {family}. † marks pairs of runs by different commits:"
    )


def _differences(plan: PlanResults, results: SectionResults) -> str:
    seeds = results.section.seeds
    rows = []
    for first, second in combinations(results.section.rules, 2):
        found = results.difference(second, first)
        if found is not None:
            each = [percent(found.each[seed]) if seed in found.each else NOTHING for seed in seeds]
            mark = " †" if results.across_commits(second, first) else ""
            own = results.section.baseline in ("", first, second)
            together = simultaneous(estimate(plan, results, second, first)) if own else NOTHING
            rows.append([f"{second} − {first}{mark}", *each, percent(found.tasks), spread(found.seeds), together])
    head = ["difference", *(f"seed {seed}" for seed in seeds), "over tasks", "over seeds", "simultaneous"]
    return table(head, rows) if rows else ""


def _congruence(results: SectionResults) -> str:
    """Of the best weights, from the validation that chose them."""
    rows = []
    for rule in results.runs:
        columns = [results.congruence(rule, name).values() for name in ("congruence_before", "congruence_after")]
        if all(columns):
            kind = congruence_kind(results.section.rules[rule])
            cosines = [cosine(over_seeds(list(column))) for column in columns]
            rows.append([rule, *kind, *cosines, str(len(columns[0]))])
    head = ["rule", "radius", "validation", "before the inner step", "after it", "seeds"]
    return f"Congruence of the gradients, mean over tasks:\n\n{table(head, rows)}" if rows else ""


def _commands(results: SectionResults) -> str:
    lines = [command(config) for config in results.section.rules.values()]
    tests = [adaptation_command(test) for test in results.section.tests.values()]
    seeds = ", ".join(f"`--seed {seed}`" for seed in results.section.seeds[1:])
    others = f" (the others: {seeds})" if seeds else ""
    return f"The runs of the first seed{others} and their tests:\n\n{block(lines + tests)}"
