"""A plan's page: what it compares, every section, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fewshot_asam.reproduce import plots, section_page
from fewshot_asam.reproduce.comparisons import (
    PairResult,
    misleading,
    noise_floor,
    pair_results,
    single_seed_differences,
)
from fewshot_asam.reproduce.decomposition import decompositions
from fewshot_asam.reproduce.markdown import cosine, difference, figure, percent, picture, ratio, spread, table
from fewshot_asam.reproduce.plan import cells
from fewshot_asam.reproduce.radius_sweeps import radius_sweeps
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults, congruence_kind
from fewshot_asam.reproduce.statistics import BETTER, NOISE, ONE_SEED, WORSE, over_seeds


def render(plan: PlanResults) -> str:
    """The page as text."""
    name = plan.plan.path.name
    done, wanted = progress(plan)
    floor = noise_floor(plan)
    parts = [
        f"# Plan `{name}`: {done} of {wanted} runs are done\n\n[The answers, and how they were found](README.md). "
        "Rendered from `ledger.jsonl` by `reproduce_maml experiments/*.yaml --render`; do not edit it by hand.\n"
    ]
    if plan.plan.superseded:
        parts.append(f"> **Superseded.** {plan.plan.superseded}\n")
    parts += _pairs(plan)
    for results in plan.sections:
        if results.runs or results.diverged:
            parts += section_page.render(plan.plan, results, floor)
    parts += _decompositions(plan, floor)
    parts += _congruences(plan)
    for file, sweep in plots.sweep_names(plan.plan, radius_sweeps(plan.sections)).items():
        parts.append(f"## Accuracy against the radius\n\n{picture(file, ', '.join(sweep))}\n")
    parts += _missing(plan.sections)
    return "\n".join(parts)


def progress(plan: PlanResults) -> tuple[int, int]:
    """How many of the plan's runs are done, of how many."""
    wanted = {cell.name for cell in cells([plan.plan])}
    missing = {results.section.cell(rule, seed).name for results in plan.sections for rule, seed in results.missing}
    return len(wanted - missing), len(wanted)


def _pairs(plan: PlanResults) -> Iterable[str]:
    """Claims, questions and controls, as far as they were run."""
    claims, questions, controls = (
        [one for one in pair_results(plan, pairs) if one.comparison is not None or one.diverged]
        for pairs in (plan.plan.claims, plan.plan.questions, plan.plan.controls)
    )
    if claims + questions and all(one.seeds < 2 and not one.diverged for one in claims + questions):
        yield "One seed: the plan's claims and questions have no verdict yet.\n"
        return
    if claims:
        yield (
            "## Published claims\n\nA claim is confirmed or contradicted where the paper gives figures for the "
            "setting. Elsewhere a difference is in favour of it or against it.\n\n"
            f"{_counted(one.claim_verdict for one in claims)}\n"
        )
        yield _pair_table("claim", [(one, one.claim_verdict) for one in claims])
    if questions:
        yield "## Open questions\n\nThe answer is about the first of the two rules.\n"
        yield f"{_counted(one.verdict for one in questions)}\n"
        yield _pair_table("question", [(one, one.verdict) for one in questions])
    chance = [*_controls(controls), *_by_chance([*claims, *questions]), *_misleading(plan)]
    if chance:
        yield "## How much of this is chance?\n"
        yield "\n".join(chance) + "\n"


def _counted(verdicts: Iterable[str]) -> str:
    counts = Counter(verdicts)
    return f"Of {counts.total()}: " + "; ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) + "."


def _pair_table(kind: str, rows: Iterable[tuple[PairResult, str]]) -> str:
    lines = []
    for one, verdict in rows:
        comparison = one.comparison
        tasks, seeds = (percent(comparison.tasks), spread(comparison.seeds)) if comparison else ("–", "–")
        count = ", ".join([str(one.seeds), *([f"{one.diverged} diverged"] if one.diverged else [])])
        answer = verdict if verdict == ONE_SEED or comparison is None else f"**{verdict}**"
        line = [one.text, one.results.section.title, figure(one.published, "+"), tasks, seeds, count, answer]
        lines.append([*line, ratio(one.time_ratio)])
    return table([kind, "setting", "published", "over tasks", "over seeds", "seeds", "answer", "time"], lines)


def _controls(controls: Iterable[PairResult]) -> Iterable[str]:
    for one in controls:
        comparison = one.comparison
        if comparison is not None and comparison.reach is not None:
            each = ", ".join(f"{100 * value.mean:+.2f}" for value in comparison.each.values())
            yield (
                f"- Control: {one.text}. They differ by {each} points seed by seed, {comparison.seeds} on average, so "
                f"equal rules may differ by {100 * comparison.reach:.2f}: no smaller difference is called better or "
                "worse."
            )


def _by_chance(pairs: Sequence[PairResult]) -> Iterable[str]:
    """How many verdicts equal rules would get."""
    told = [one.comparison.verdict(None) for one in pairs if one.comparison is not None and one.seeds > 1]
    decided = sum(verdict in (BETTER, WORSE) for verdict in told)
    if told:
        yield (
            f"- Of {len(told)} comparisons over several seeds, {decided} have intervals that leave out 0. Were all "
            f"rules equal, about {len(told) / 20:.1f} would. No interval is corrected for their number."
        )


def _misleading(plan: PlanResults) -> Iterable[str]:
    """What one seed alone would have shown."""
    each = single_seed_differences(plan)
    if each:
        yield (
            f"- One seed misleads: of {len(each)} differences within one seed where several seeds say {NOISE}, "
            f"{misleading(each)} have an interval over tasks that leaves out 0."
        )


def _decompositions(plan: PlanResults, floor: float | None) -> Iterable[str]:
    rows = [
        [one.rule, one.setting, str(one.steps), f"{one.tasks:,}"]
        + [difference(part, floor) for part in (one.training, one.adapting, one.both)]
        + [str(one.both.seeds.seeds)]
        for results in plan.sections
        for one in decompositions(results)
    ]
    if rows:
        head = ["rule", "setting", "steps", "tasks", "from training", "from adapting", "together", "seeds"]
        yield (
            "## From training, or from adapting with the rule?\n\nFrom training: weights trained with the rule minus "
            "weights trained with MAML, both adapted by MAML. From adapting: the weights trained with the rule, "
            f"adapted by it minus adapted by MAML. First tasks of the test alone.\n\n{table(head, rows)}"
        )


def _congruences(plan: PlanResults) -> Iterable[str]:
    """Differences of congruence, of the pairs whose congruence is taken alike."""
    pairs = [*plan.plan.claims.values(), *plan.plan.questions.values(), *plan.plan.controls.values()]
    rows = [
        row
        for results in plan.sections
        for pair in dict.fromkeys(pairs)
        for row in _congruence_difference(results, *pair)
    ]
    if rows:
        head = ["difference of cosines", "setting", "before the inner step", "after it", "tasks", "seeds"]
        yield (
            "## Are the gradients more congruent?\n\nThe paper's Figure 1 says so of Agnostic-SAM against SAM, in its "
            "supervised form. The intervals are over seeds alone. All runs are measured on the same few tasks, whose "
            f"noise comes on top, so no verdict is given.\n\n{table(head, rows)}"
        )


def _congruence_difference(results: SectionResults, first: str, second: str) -> Iterable[list[str]]:
    rules = results.section.rules
    if {first, second} <= rules.keys() and congruence_kind(rules[first]) == congruence_kind(rules[second]):
        columns = []
        for name in ("congruence_before", "congruence_after"):
            one, other = results.congruence(first, name), results.congruence(second, name)
            seeds = [seed for seed in results.paired_seeds(first, second) if seed in one and seed in other]
            columns.append([one[seed] - other[seed] for seed in seeds])
        if all(columns):
            cosines = [cosine(over_seeds(column)) for column in columns]
            tasks, count = str(rules[first].congruence_tasks), str(len(columns[0]))
            yield [f"{first} − {second}", results.section.title, *cosines, tasks, count]


def _missing(sections: Sequence[SectionResults]) -> Iterable[str]:
    lines = []
    for results in sections:
        seeds: dict[str, list[int]] = {}
        for rule, seed in results.missing:
            seeds.setdefault(rule, []).append(seed)
        for alike in dict.fromkeys(map(tuple, seeds.values())):
            rules = "; ".join(rule for rule, missing in seeds.items() if tuple(missing) == alike)
            lines.append(f"- {results.section.title}, seed {', '.join(map(str, alike))}: {rules}")
    if lines:
        yield "## Missing\n"
        yield "\n".join(lines) + "\n"
