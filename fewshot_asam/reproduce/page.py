"""The page: plans and ledger to Markdown, with the figures beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from fewshot_asam import runs
from fewshot_asam.evaluate import Interval, interval
from fewshot_asam.reproduce import ledger, plots
from fewshot_asam.reproduce.found import Found, look_up, sweeps
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.plan import Plan, adaptation_command, cells, command
from fewshot_asam.reproduce.queue import FEWER
from fewshot_asam.reproduce.statistics import Spread, compare, over_seeds

NOTHING = "–"
INTRODUCTION = """# Do the published claims hold?

Rendered from `ledger.jsonl` by `reproduce_maml {plans} --render`; do not edit it by hand.

- Accuracies are in %. A seed's ± is a 95 % interval over test tasks (normal); that of a mean over n seeds is a 95 %
  t-interval over the seeds (4.303 standard errors for n = 3). The test tasks are the same for all runs.
- Each run is tested with the weights that were best on fixed validation tasks. "First 600" are the first 600 of the
  same tasks, the number that papers test on.
- Differences are paired: task by task, for one seed, then averaged. A rule is called **better** or **worse** where the
  interval over tasks (of the differences averaged over seeds) and the interval over seeds both leave out 0, and
  **inside the noise** otherwise; with one seed there is no verdict. One in 20 verdicts on equal rules may be wrong, so
  a lone one among many says little.
- Rules are compared after the same number of iterations; their costs stand in a table of their own.
"""


def write_page(plans: Sequence[Plan], results: Path) -> None:
    """Writes `README.md` and its figures into the folder that holds the ledger."""
    records = ledger.read_cells(results / ledger.FILE)
    results.mkdir(parents=True, exist_ok=True)
    plots.draw(plans, records, results)
    runs.write_text(results / "README.md", render(plans, records))


def render(plans: Sequence[Plan], records: Mapping[str, Record]) -> str:
    """The page as text."""
    parts = [INTRODUCTION.format(plans=" ".join(f"plans/{plan.path.name}" for plan in plans))]
    for plan in plans:
        parts += _plan(plan, records)
    return "\n".join(parts)


def _plan(plan: Plan, records: Mapping[str, Record]) -> Iterable[str]:
    sections = [look_up(section, records) for section in plan.sections]
    wanted = cells([plan])
    done = sum(ledger.is_done(cell, records) for cell in wanted)
    yield f"## Plan `{plan.path.name}`: {done} of {len(wanted)} runs are done\n"
    for found in sections:
        if found.runs or found.diverged:
            yield from _section(plan, found)
    for name, group in plots.sweep_names(plan, sweeps(plan, records)).items():
        yield f"### Accuracy against the radius\n\n{_picture(name, ', '.join(group))}\n"
    yield from _missing(plan, sections)


def _section(plan: Plan, found: Found) -> Iterable[str]:
    section = found.section
    yield f"### {section.title}\n"
    yield f"{_setting(found)}\n"
    yield _accuracies(found)
    if differences := _differences(found):
        yield f"Paired differences, in points:\n\n{differences}"
    if len(section.tests) > 1:
        yield f"The same weights adapted in other ways, mean over seeds ± 95 %:\n\n{_side_tests(found)}"
    if congruence := _congruence(found):
        yield congruence
    if found.runs:
        yield _costs(found)
        if plots.has_curves(found):
            yield f"{_picture(plots.curves_name(plan, section), f'{section.title}: accuracy while training')}\n"
    for rule, seed in found.diverged:
        yield f"Diverged, so without an accuracy: {rule}, seed {seed}.\n"
    yield _commands(found)


def _setting(found: Found) -> str:
    """What all of the section's accuracies must not be quoted without."""
    config = next(iter(found.section.rules.values()))
    tasks = found.section.tests[found.main]["tasks"]
    return (
        f"{config.dataset}, {config.ways}-way {config.shots}-shot, {config.queries} queries a class, "
        f"{config.norm} norm; {config.model}, {config.hidden} filters; {config.iterations:,} iterations of "
        f"{config.meta_batch_size} tasks, Adam of {config.meta_lr:g} ({config.schedule}); "
        f"{config.inner_steps} inner step{'s' if config.inner_steps > 1 else ''} of {config.inner_lr:g}; "
        f"tested on {tasks:,} tasks."
    )


def _accuracies(found: Found) -> str:
    section = found.section
    head = ["rule", *(f"seed {seed}" for seed in section.seeds), "mean over seeds", "n", f"first {FEWER}"]
    rows = []
    for rule, config in section.rules.items():
        values = found.accuracies(rule, found.main)
        each = [_percent(interval(values[seed])) if seed in values else NOTHING for seed in section.seeds]
        mean = found.mean(rule, found.main)
        fewer = found.mean(rule, found.main, FEWER)
        row = [f"{rule} (`{config.rule_text}`)", *each, _text(mean), str(mean.seeds if mean else 0), _text(fewer)]
        rows.append([*row, _published(section.published.get(rule))])
    for label, value in section.published.items():
        if label not in section.rules:
            rows.append([label, *[NOTHING] * (len(head) - 1), _published(value)])
    return _table([*head, "published"], rows, bool(section.published))


def _differences(found: Found) -> str:
    seeds = found.section.seeds
    rows = []
    for first, second in combinations(found.section.rules, 2):
        result = compare(found.accuracies(second, found.main), found.accuracies(first, found.main))
        if result is not None:
            each = [_percent(result.each[seed]) if seed in result.each else NOTHING for seed in seeds]
            rows.append([f"{second} − {first}", *each, _percent(result.tasks), _text(result.seeds), result.verdict])
    head = ["difference", *(f"seed {seed}" for seed in seeds), "over tasks", "over seeds", "verdict"]
    return _table(head, rows) if rows else ""


def _side_tests(found: Found) -> str:
    tests = found.section.tests
    head = ["trained with", *(f"{name} ({test['tasks']:,} tasks)" for name, test in tests.items())]
    return _table(head, [[rule, *(_text(found.mean(rule, name)) for name in tests)] for rule in found.section.rules])


def _congruence(found: Found) -> str:
    """Of the weights that were tested, from the validation that chose them."""
    rows = []
    for rule, by_seed in found.runs.items():
        if courses := [record for record in by_seed.values() if "congruence_before" in record["validation"]]:
            at = [record["validation"]["iteration"].index(record["best_iteration"]) for record in courses]
            pairs = [(record["validation"], i) for record, i in zip(courses, at, strict=True)]
            names = ("congruence_before", "congruence_after")
            columns = [over_seeds([course[name][i] for course, i in pairs]) for name in names]
            rows.append([rule, *(_cosine(column) for column in columns), str(len(courses))])
    if not rows:
        return ""
    table = _table(["rule", "before the inner step", "after it", "n"], rows)
    return (
        "Congruence of the gradients: the cosine of `∇L_t(θ)` and `∇L_v(θ_v)`, mean over tasks. The validation set is "
        "an augmented copy of the support set where the rule itself has a duplicate, with which the cosine would be "
        f"near 1 whatever the weights:\n\n{table}"
    )


def _costs(found: Found) -> str:
    first = None
    rows = []
    for rule, by_seed in found.runs.items():
        seconds = over_seeds([record["wall_seconds"] / record["iterations"] for record in by_seed.values()]).mean
        first = first or seconds
        minutes = over_seeds([record["wall_seconds"] / 60 for record in by_seed.values()]).mean
        best = ", ".join(f"{record['best_iteration']:,}" for record in by_seed.values())
        where = sorted({_machine(record) for record in by_seed.values()})
        rows.append([rule, f"{minutes:.1f}", f"{1000 * seconds:.0f}", f"{seconds / first:.2f}", best, "; ".join(where)])
    head = ["rule", "minutes of training", "ms an iteration", "times the first", "best iterations", "where"]
    return f"Costs, validations included, mean over seeds:\n\n{_table(head, rows)}"


def _machine(record: Record) -> str:
    device = record["device"]
    threads = f" ({record['threads']} threads)" if device == "cpu" else ""
    return f"{device}{threads}, {record['engine']}, torch {record['versions']['torch']}"


def _commands(found: Found) -> str:
    lines = [command(config) for config in found.section.rules.values()]
    tests = [adaptation_command(test) for test in found.section.tests.values()]
    seeds = ", ".join(f"`--seed {seed}`" for seed in found.section.seeds[1:])
    others = f" (the others: {seeds})" if seeds else ""
    return f"The runs of the first seed{others} and their tests:\n\n```\n" + "\n".join(lines + tests) + "\n```\n"


def _missing(plan: Plan, sections: Sequence[Found]) -> Iterable[str]:
    lines = []
    for found in sections:
        seeds: dict[str, list[int]] = {}
        for rule, seed in found.missing:
            seeds.setdefault(rule, []).append(seed)
        for alike in dict.fromkeys(map(tuple, seeds.values())):
            rules = "; ".join(rule for rule, missing in seeds.items() if tuple(missing) == alike)
            lines.append(f"- {found.section.title}, seed {', '.join(map(str, alike))}: {rules}")
    if lines:
        yield f"### Missing in `{plan.path.name}`\n"
        yield "\n".join(lines) + "\n"
        yield (
            "This runs them, on a GPU where there is one, and goes on with what was stopped:\n\n"
            f"```\nreproduce_maml plans/{plan.path.name} --data-root DATA\n```\n"
        )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], last: bool = True) -> str:
    """A Markdown table, without its last column unless `last`."""
    width = len(head) if last else len(head) - 1
    lines = [head[:width], ["---"] * width, *(row[:width] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.2f} ± {100 * value.half_width:.2f}"


def _text(value: Spread | None) -> str:
    return NOTHING if value is None else str(value)


def _cosine(value: Spread) -> str:
    return f"{value.mean:.3f}" + ("" if value.half_width is None else f" ± {value.half_width:.3f}")


def _published(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _picture(name: str, text: str) -> str:
    return f"![{text}]({name})"
