"""A plan's page: what it compares, every section, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from fewshot_asam.reproduce import plots, section_page
from fewshot_asam.reproduce.comparisons import PairResult, misleading, pair_results, reach, single_seed_differences
from fewshot_asam.reproduce.decomposition import decompositions
from fewshot_asam.reproduce.markdown import (
    cosine,
    difference,
    figure,
    percent,
    picture,
    probability,
    ratio,
    simultaneous,
    spread,
    table,
)
from fewshot_asam.reproduce.plan import cells
from fewshot_asam.reproduce.radius_sweeps import radius_sweeps
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults, congruence_kind
from fewshot_asam.reproduce.statistics import over_seeds
from fewshot_asam.reproduce.verdicts import Verdicts, key, unregistered_runs


def render(plan: PlanResults, found: Verdicts) -> str:
    """The page as text, with the verdicts that were found for all plans together."""
    name = plan.plan.path.name
    done, wanted = progress(plan)
    parts = [
        f"# Plan `{name}`: {done} of {wanted} runs are done\n\n[The answers, and how they were found](README.md). "
        "Rendered from `ledger.jsonl` by `reproduce_maml experiments/*.yaml --render`; do not edit it by hand.\n"
    ]
    if plan.plan.superseded:
        parts.append(f"> **Superseded.** {plan.plan.superseded}\n")
    parts += _registration(plan)
    parts += _pairs(plan, found)
    for results in plan.sections:
        if results.runs or results.diverged:
            corrected = found.sections.get((plan.plan.name, results.section.title))
            parts += section_page.render(plan, results, corrected)
    parts += _decompositions(plan)
    parts += _congruences(plan)
    for file, sweep in plots.sweep_names(plan.plan, radius_sweeps(plan.sections)).items():
        parts.append(f"## Accuracy against the radius\n\n{picture(file, ', '.join(sweep))}\n")
    parts += _missing(plan.sections)
    return "\n".join(parts)


@cache
def progress(plan: PlanResults) -> tuple[int, int]:
    """How many of the plan's runs are done, of how many."""
    wanted = {cell.name for cell in cells([plan.plan])}
    missing = {results.section.cell(rule, seed).name for results in plan.sections for rule, seed in results.missing}
    return len(wanted - missing), len(wanted)


def _registration(plan: PlanResults) -> Iterable[str]:
    """What the plan committed itself to, and what became otherwise."""
    said = plan.plan.registered
    if said is None:
        yield "This plan is not registered, so it gives no verdicts: its intervals are for reading alone.\n"
        return
    hypotheses = "\n".join(f"- {text}" for text in said.hypotheses)
    yield (
        f"## What was registered\n\nBefore its first run, under the digest `{plan.plan.digest}`: {said.runs} runs, "
        f"hypotheses, tests, and when to stop.\n\n{hypotheses}\n\n{said.tests}\n\n{said.stopping}\n\n"
        f"A difference below {said.margin:g} points is one that does not matter.\n"
    )
    records = [record for r in plan.sections for runs in r.runs.values() for record in runs.values()]
    stamps = [stamp for r in records for stamp in r.get("registered", []) if stamp["plan"] == plan.plan.name]
    commits = sorted({f"`{stamp['commit']}`" for stamp in stamps})
    if not records:
        yield "No run has been made yet.\n"
        return
    deviations = [*plan.plan.deviations, *_found_deviations(plan)]
    begun = (
        f"Its runs say that they were begun when the plan was committed as {', '.join(commits)}. " if commits else ""
    )
    lines = "".join(f"- {text}\n" for text in deviations)
    yield f"{begun}{'What deviated:' if deviations else 'Nothing deviated.'}\n" + (f"\n{lines}" if lines else "")


def _found_deviations(plan: PlanResults) -> Iterable[str]:
    if wrong := unregistered_runs(plan):
        yield f"{len(wrong)} runs were made before the plan was committed, or while it said something else"
    for results in plan.sections:
        for rule, seed in results.diverged:
            yield f"{results.section.title}: {rule}, seed {seed} diverged"
    data = {
        tuple(record["data"].values())
        for r in plan.sections
        for runs in r.runs.values()
        for record in runs.values()
        if "data" in record
    }
    datasets = {config.dataset for r in plan.sections for config in r.section.rules.values()}
    if len(data) > len(datasets):
        yield "its runs were made with different data; only those of the same are compared"


def _pairs(plan: PlanResults, found: Verdicts) -> Iterable[str]:
    """Claims, questions and controls, as far as they were run."""
    claims, questions, controls = (
        [one for one in pair_results(plan, pairs) if one.comparison is not None or one.diverged]
        for pairs in (plan.plan.claims, plan.plan.questions, plan.plan.controls)
    )
    if claims:
        yield "## Claims\n\nThat the first of two rules is better.\n"
        yield _pair_table("claim", plan, claims, found)
    if questions:
        yield "## Questions\n\nThe answer is about the first of the two rules.\n"
        yield _pair_table("question", plan, questions, found)
    chance = [*_controls(controls), *_by_chance([*claims, *questions]), *_misleading(plan)]
    if chance:
        yield "## How much of this is chance?\n"
        yield "\n".join(chance) + "\n"


def _pair_table(kind: str, plan: PlanResults, pairs: Iterable[PairResult], found: Verdicts) -> str:
    lines = []
    for one in pairs:
        verdict, comparison = found.pairs[key(plan, one)], one.comparison
        tasks, seeds = (percent(comparison.tasks), spread(comparison.seeds)) if comparison else ("–", "–")
        count = ", ".join([str(one.seeds), *([f"{one.diverged} diverged"] if one.diverged else [])])
        mark = " †" if one.across_commits else ""
        line = [one.text + mark, one.results.section.title, figure(one.published, "+"), tasks, seeds]
        line += [simultaneous(one.estimate), probability(verdict.p), probability(verdict.p_equivalence), count]
        lines.append([*line, f"**{verdict.words}**" if verdict.decided else verdict.words, ratio(one.time_ratio)])
    head = [kind, "setting", "published", "over tasks", "over seeds", "simultaneous", "p", "p of equivalence", "seeds"]
    return table([*head, "answer", "time"], lines)


def _controls(controls: Iterable[PairResult]) -> Iterable[str]:
    for one in controls:
        if one.comparison is not None and one.estimate is not None:
            each = ", ".join(f"{100 * value.mean:+.2f}" for value in one.comparison.each.values())
            yield (
                f"- Control: {one.text}. Seed by seed they differ by {each} points, {simultaneous(one.estimate)} "
                f"together, so equal rules may differ by {100 * reach(one.estimate):.2f}: no smaller difference is "
                "called better or worse."
            )


def _by_chance(pairs: Sequence[PairResult]) -> Iterable[str]:
    """How many differences equal rules would show."""
    told = [one.comparison.leaves_out_0 for one in pairs if one.comparison is not None and one.seeds > 1]
    if told:
        yield (
            f"- Of {len(told)} comparisons over several seeds, {sum(told)} have intervals over tasks and over seeds "
            f"that leave out 0. Were all rules equal, up to {len(told) / 20:.1f} would. They are not corrected for "
            "their number, so they are no verdict."
        )


def _misleading(plan: PlanResults) -> Iterable[str]:
    """What one seed alone would have shown."""
    each = single_seed_differences(plan)
    if each:
        yield (
            f"- One seed misleads: of {len(each)} differences within one seed where several seeds show none, "
            f"{misleading(each)} have an interval over tasks that leaves out 0."
        )


def _decompositions(plan: PlanResults) -> Iterable[str]:
    rows = [
        [one.rule, one.setting, str(one.steps), f"{one.tasks:,}"]
        + [difference(part) for part in (one.training, one.adapting, one.both)]
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
