"""The results' first page: three sentences, a figure, a table, how it was done, and what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fewshot_asam.reproduce.comparisons import PairResult, control, estimate, noise_floor
from fewshot_asam.reproduce.inference import Estimate, holm
from fewshot_asam.reproduce.markdown import accuracy, block, picture, probability, simultaneous, table
from fewshot_asam.reproduce.plan_page import progress
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults
from fewshot_asam.reproduce.verdicts import Verdict, Verdicts, compared, key, verdicts

FIGURE = "differences.png"
MOST_ROWS = 10
MOST_PANELS = 6

HOW = """## How it was done

- A **registered** plan says its hypotheses, runs, tests and when to stop, and is committed before its first run. Every
  run records the commit and the digest of what the plan said, and a fingerprint of its data. No seed is added after
  looking. Other plans give no verdicts.
- Runs are compared after equal iterations, on the same seeds and test tasks. A two-way model (rule and seed) of all
  runs of a section gives one global test, and differences whose 95 % intervals hold together: to one rule (Dunnett), or
  of all pairs (Tukey). The error that other test tasks would add is in the intervals.
- Each difference has two tests: against 0, and two one-sided ones that it is smaller than half a point (equivalence).
  All p-values of all registered plans, the global ones too, are corrected together by Holm's method at 5 %. A test that
  is not finished counts as one that finds nothing.
- **Better** and **worse** need a corrected p below 0.05 and a difference beyond the **control**: two rules that are
  equal but for rounding, run like the others. **Equal within 0.5 points** needs it of the equivalence. All else is
  **not decided**.
- Times are of runs that may have shared their machine; `python -m benchmarks.rules` measures better.
"""


class Row(NamedTuple):
    """A comparison as the table shows it, and whether its plan is registered."""

    plan: PlanResults
    pair: PairResult
    verdict: Verdict


class Panel(NamedTuple):
    """A section as the figure shows it: differences to MAML by rule, and the plan's control.

    - `margin`: of equivalence, a part of 1.
    """

    title: str
    differences: dict[str, Estimate]
    control: Estimate | None
    margin: float


def render(plans: Sequence[PlanResults]) -> str:
    """The page as text."""
    found, rows = verdicts(plans), table_rows(plans)
    answers = (_help(plans, found), _earlier(plans), _accuracy(plans))
    parts = ["# Do the sharpness-aware rules help?\n", "\n".join(f"- {sentence}" for sentence in answers) + "\n"]
    if panels(plans):
        parts.append(f"{picture(FIGURE, 'Differences to MAML with simultaneous intervals')}\n")
    if rows:
        parts.append(_table(rows))
    parts.append(HOW)
    parts.append(_pages(plans))
    parts += _not_run(plans)
    return "\n".join(parts)


def _registered(plans: Sequence[PlanResults], wanted: bool) -> list[PlanResults]:
    return [plan for plan in plans if bool(plan.plan.registered and not plan.plan.superseded) == wanted]


def table_rows(plans: Sequence[PlanResults]) -> list[Row]:
    """The comparisons over several seeds, the most certain first: of registered plans, or else of all others."""
    found = verdicts(plans)
    for wanted in (True, False):
        rows = [
            Row(plan, one, found.pairs[key(plan, one)])
            for plan in _registered(plans, wanted)
            for one in compared(plan)
            if one.estimate is not None
        ]
        if rows:
            return sorted(rows, key=lambda row: row.pair.estimate.p if row.pair.estimate else 1.0)[:MOST_ROWS]
    return []


def panels(plans: Sequence[PlanResults]) -> list[Panel]:
    """The sections with MAML and several seeds: of registered plans, or else of all others."""
    for wanted in (True, False):
        found = [panel for plan in _registered(plans, wanted) for r in plan.sections for panel in _panel(plan, r)]
        if found:
            return found[:MOST_PANELS]
    return []


def _panel(plan: PlanResults, results: SectionResults) -> Iterable[Panel]:
    rules, same = results.section.rules, control(plan)
    maml = next((rule for rule, config in rules.items() if config.inner == "maml"), None)
    if maml is None:
        return
    hidden = {same.first} if same else set()
    each = {rule: estimate(plan, results, rule, maml) for rule in rules if rule != maml and rule not in hidden}
    known = {rule: one for rule, one in each.items() if one is not None}
    if known:
        note = "" if plan.plan.registered and not plan.plan.superseded else " (not registered)"
        seeds = f"\n{len(results.complete_seeds)} of {len(results.section.seeds)} seeds{note}"
        margin = plan.plan.registered.margin if plan.plan.registered else 0.5
        yield Panel(results.section.title + seeds, known, same.estimate if same else None, margin / 100)


def _accuracy(plans: Sequence[PlanResults]) -> str:
    """Of MAML, in the first section of each plan that is not superseded."""
    said, seeds = [], set()
    for plan in plans:
        for results in () if plan.plan.superseded else plan.sections:
            rule = next((rule for rule, config in results.section.rules.items() if config.inner == "maml"), None)
            means = results.means(rule, results.main_test) if rule else {}
            if rule and means:
                published = results.section.published.get(rule)
                note = f"; published: {published:.2f}" if published else ""
                name = plan.plan.name
                said.append(f"{accuracy([*means.values()])} % on {results.section.title} ([{name}]({name}.md){note})")
                seeds.add(len(means))
                break
    if not said:
        return "**How accurate?** Nothing has been run with the present defaults yet."
    return f"**How accurate?** MAML reaches {' and '.join(said)}{'; one seed each' if seeds == {1} else ''}."


def _help(plans: Sequence[PlanResults], found: Verdicts) -> str:
    """What the registered plans say."""
    standing = _registered(plans, True)
    told = [found.pairs[key(plan, one)] for plan in standing for one in compared(plan)]
    finished = [one for one in told if one.p is not None]
    if finished:
        counts = "; ".join(f"{n} {words}" for words, n in Counter(one.words for one in finished).most_common())
        rest = f" {len(told) - len(finished)} more are not finished." if len(told) > len(finished) else ""
        return f"**Does sharpness help?** Of {len(finished)} registered comparisons: {counts}.{rest}"
    if not standing:
        return "**Does sharpness help?** Not known: no plan is registered."
    runs = "; ".join(f"[{p.plan.name}]({p.plan.name}.md) {progress(p)[0]} of {progress(p)[1]}" for p in standing)
    return f"**Does sharpness help?** Not known yet: no registered plan is finished (runs done: {runs})."


def _earlier(plans: Sequence[PlanResults]) -> str:
    """What is to be thought of runs that no plan was registered for."""
    others = _registered(plans, False)
    ones = [one.estimate for plan in others for one in compared(plan) if one.estimate is not None]
    if not ones:
        return "**What did unregistered runs show?** Nothing over several seeds."
    corrected = holm([one.p for one in ones])
    floors = [floor for plan in others if (floor := noise_floor(plan)) is not None]
    control = f"; two rules equal but for rounding may differ by {100 * max(floors):.1f} points" if floors else ""
    survive = sum(p < 0.05 for p in corrected)
    return (
        f"**What did unregistered runs show?** Of {len(ones)} differences over several seeds {survive or 'none'} "
        f"survive{'s' * (survive < 2)} a correction for their number (smallest p {probability(min(corrected))}). That "
        f"is no verdict, as nobody had to say beforehand what to run{control}."
    )


def _table(rows: Sequence[Row]) -> str:
    lines = [
        [
            f"{row.pair.first} − {row.pair.second}",
            row.pair.results.section.title,
            simultaneous(row.pair.estimate),
            probability(row.verdict.p),
            probability(row.verdict.p_equivalence),
            str(row.pair.seeds),
            f"**{row.verdict.words}**" if row.verdict.decided else row.verdict.words,
            f"[{row.plan.plan.name}]({row.plan.plan.name}.md)",
        ]
        for row in rows
    ]
    head = ["difference", "setting", "points", "p", "p of equivalence", "seeds", "answer", "plan"]
    caption = "Points of accuracy with simultaneous 95 % intervals; p-values are corrected for the whole page.\n\n"
    return caption + table(head, lines)


def _pages(plans: Sequence[PlanResults]) -> str:
    lines = []
    for plan in plans:
        done, wanted = progress(plan)
        note = f" Superseded: {plan.plan.superseded}" if plan.plan.superseded else ""
        lines.append(f"- [{plan.plan.name}]({plan.plan.name}.md): {done} of {wanted} runs are done.{note}")
    return (
        "## Every run, table and command\n\nAll pages are computed from [ledger.jsonl](ledger.jsonl), which has how "
        "many answers were right in each test task: `reproduce_maml experiments/*.yaml --render` does it anew.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _not_run(plans: Sequence[PlanResults]) -> Iterable[str]:
    lines, commands = [], []
    for plan in plans:
        for results in plan.sections:
            if results.missing:
                count = len(results.section.rules) * len(results.section.seeds)
                lines.append(f"- {results.section.title} ({plan.plan.name}): {len(results.missing)} of {count} runs")
        if any(results.missing for results in plan.sections):
            forks = any(cell.config.init_digest for section in plan.plan.sections for cell in section.cells())
            start = " --init-from RUN" if forks else ""
            commands.append(f"reproduce_maml experiments/{plan.plan.path.name} --data-root DATA{start}")
    if lines:
        yield "## What was not run\n"
        yield "\n".join(lines) + "\n"
        yield (
            "These commands run it, on a GPU where there is one, and go on with what was stopped; `--max-minutes 9` "
            f"cuts them into short pieces:\n\n{block(commands)}"
        )
