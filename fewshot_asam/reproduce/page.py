"""The page: plans and ledger to Markdown, with the figures beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from fewshot_asam.reproduce import claims, ledger, plots
from fewshot_asam.reproduce.markdown import NOTHING, block, cosine, figure, percent, picture, table, text
from fewshot_asam.reproduce.plan import Plan, adaptation_command, cells, command
from fewshot_asam.reproduce.radius_sweeps import sweeps
from fewshot_asam.reproduce.runner import FEWER
from fewshot_asam.reproduce.section_results import Found, Looked, cosines_of, look_up, machine, seconds
from fewshot_asam.reproduce.statistics import over_seeds
from fewshot_asam.training.checkpoint import write_text
from fewshot_asam.training.evaluation import interval

INTRODUCTION = """# Do the published claims hold?

Rendered from `ledger.jsonl` by `reproduce_maml {plans} --render`; do not edit it by hand.

- Accuracies are in %. A seed's ± is a 95 % interval over test tasks (normal); that of a mean over n seeds is a 95 %
  t-interval over the seeds (4.303 standard errors for n = 3). The test tasks are the same for all runs on one kind of
  device, and only such runs are compared.
- Each run is tested with the weights that were best on fixed validation tasks. "First 600" are the first 600 of the
  same tasks, a number that papers often test on. The Agnostic-SAM paper gives neither intervals nor a number of tasks;
  the protocol it follows has 400, which alone makes about ±1 point, more than most of the differences it claims.
- Differences are paired: task by task, for one seed, then averaged. A rule is called **better** or **worse** where the
  interval over tasks (of the differences averaged over seeds) and the interval over seeds both leave out 0, and
  **inside the noise** otherwise. That does not say that the rules are equal: the interval says what it leaves room for.
  With one seed there is no verdict.
- Rules are compared after the same number of iterations. Time is of an iteration, the first rule's over the second's,
  from runs that may have shared their machine: a rough figure, which `python -m benchmarks.rules` measures better.
- Congruence is the cosine of `∇L_t(θ)` and `∇L_v(θ_v)`. Its validation set is an augmented copy of the support set also
  for rules that have a duplicate, with which it would be near 1 whatever the weights. `θ_v` is at the rule's own
  radius, so only rules of one radius and kind of validation set can be compared.
"""


def write_page(plans: Sequence[Plan], results: Path) -> None:
    """Writes `README.md` and its figures into the folder that holds the ledger."""
    looked = look_up(plans, ledger.read_cells(results / ledger.FILE))
    results.mkdir(parents=True, exist_ok=True)
    plots.draw(looked, results)
    write_text(results / "README.md", render(looked))


def render(looked: Looked) -> str:
    """The page as text."""
    parts = [INTRODUCTION.format(plans=" ".join(f"experiments/{plan.path.name}" for plan, _ in looked))]
    parts += claims.render(looked)
    for plan, sections in looked:
        parts += _plan(plan, sections)
    return "\n".join(parts)


def _plan(plan: Plan, sections: Sequence[Found]) -> Iterable[str]:
    wanted = {cell.name for cell in cells([plan])}
    missing = {found.section.cell(rule, seed).name for found in sections for rule, seed in found.missing}
    yield f"## Plan `{plan.path.name}`: {len(wanted - missing)} of {len(wanted)} runs are done\n"
    for found in sections:
        if found.runs or found.diverged:
            yield from _section(plan, found)
    for name, group in plots.sweep_names(plan, sweeps(sections)).items():
        yield f"### Accuracy against the radius\n\n{picture(name, ', '.join(group))}\n"
    yield from _missing(plan, sections)


def _section(plan: Plan, found: Found) -> Iterable[str]:
    section = found.section
    yield f"### {section.title}\n"
    yield f"{_setting(found)}\n"
    if section.note:
        yield f"{section.note}\n"
    yield _accuracies(found)
    if differences := _differences(found):
        yield f"Paired differences, in points:\n\n{differences}"
    if len(section.tests) > 1:
        yield f"The same weights adapted in other ways, mean over seeds ± 95 %:\n\n{_side_tests(found)}"
    if congruence := _congruence(found):
        yield congruence
    if found.runs:
        yield _costs(found)
        yield f"{picture(plots.curves_name(plan, section), f'{section.title}: accuracy while training')}\n"
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
    head = ["rule", *(f"seed {seed}" for seed in section.seeds), "mean over seeds", "n"]
    head += [f"first {FEWER}"] if section.tests[found.main]["tasks"] > FEWER else []
    rows = []
    for rule, config in section.rules.items():
        values = found.accuracies(rule, found.main)
        each = [percent(interval(values[seed])) if seed in values else NOTHING for seed in section.seeds]
        mean = found.mean(rule, found.main)
        fewer = found.mean(rule, found.main, FEWER)
        row = [f"{rule} (`{config.rule_text}`)", *each, text(mean), str(mean.seeds if mean else 0), text(fewer)]
        rows.append([*row[: len(head)], figure(section.published.get(rule))])
    for label, value in section.published.items():
        if label not in section.rules:
            rows.append([label, *[NOTHING] * (len(head) - 1), figure(value)])
    return table([*head, "published"], rows, bool(section.published))


def _differences(found: Found) -> str:
    seeds = found.section.seeds
    rows = []
    for first, second in combinations(found.section.rules, 2):
        result = found.difference(second, first)
        if result is not None:
            each = [percent(result.each[seed]) if seed in result.each else NOTHING for seed in seeds]
            rows.append([f"{second} − {first}", *each, percent(result.tasks), text(result.seeds), result.verdict])
    head = ["difference", *(f"seed {seed}" for seed in seeds), "over tasks", "over seeds", "verdict"]
    return table(head, rows) if rows else ""


def _side_tests(found: Found) -> str:
    tests = found.section.tests
    head = ["trained with", *(f"{name} ({test['tasks']:,} tasks)" for name, test in tests.items()), "n"]
    counts = {rule: str(len(found.runs.get(rule, {}))) for rule in found.section.rules}
    return table(head, [[rule, *(text(found.mean(rule, name)) for name in tests), n] for rule, n in counts.items()])


def _congruence(found: Found) -> str:
    """Of the weights that were tested, from the validation that chose them."""
    rows = []
    for rule in found.runs:
        columns = [found.congruence(rule, name).values() for name in ("congruence_before", "congruence_after")]
        if all(columns):
            taken = cosines_of(found.section.rules[rule])
            cosines = [cosine(over_seeds(list(column))) for column in columns]
            rows.append([rule, *taken, *cosines, str(len(columns[0]))])
    if not rows:
        return ""
    head = ["rule", "radius", "validation", "before the inner step", "after it", "n"]
    return f"Congruence of the gradients, mean over tasks:\n\n{table(head, rows)}"


def _costs(found: Found) -> str:
    first = next(iter(found.runs))
    rows = []
    for rule, by_seed in found.runs.items():
        ours = by_seed.values()
        minutes = over_seeds([record["wall_seconds"] / 60 for record in ours]).mean
        iteration = over_seeds([1000 * seconds(record) for record in ours]).mean
        ratio = found.time(rule, first)
        best = ", ".join(f"{record['best_iteration']:,}" for record in ours)
        where = [*sorted({machine(record) for record in ours}), *sorted({f"commit {r['commit']}" for r in ours})]
        times = f"{ratio.mean:.2f}" if ratio else NOTHING
        rows.append([rule, f"{minutes:.1f}", f"{iteration:.0f}", times, best, "; ".join(where), str(len(by_seed))])
    head = ["rule", "minutes of training", "ms an iteration", "times the first", "best iterations", "where", "n"]
    return f"Costs, validations included, mean over seeds:\n\n{table(head, rows)}"


def _commands(found: Found) -> str:
    lines = [command(config) for config in found.section.rules.values()]
    tests = [adaptation_command(test) for test in found.section.tests.values()]
    seeds = ", ".join(f"`--seed {seed}`" for seed in found.section.seeds[1:])
    others = f" (the others: {seeds})" if seeds else ""
    return f"The runs of the first seed{others} and their tests:\n\n{block(lines + tests)}"


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
