"""The results' first page: three sentences, a figure, a table, how it was done, and what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fewshot_asam.reproduce.comparisons import misleading, noise_floor, pair_results, single_seed_differences
from fewshot_asam.reproduce.markdown import accuracy, block, figure, picture, table
from fewshot_asam.reproduce.plan import Plan
from fewshot_asam.reproduce.plan_page import progress
from fewshot_asam.reproduce.section_results import PlanResults, SectionResults
from fewshot_asam.reproduce.statistics import BETTER
from fewshot_asam.training.evaluation import Interval

FIGURE = "accuracy.png"
MOST_ROWS = 10
NAMES = {"maml": "MAML", "sharp_maml_low": "Sharp-MAML_low", "agnostic_sam": "Agnostic-SAM"}
"""Rules that have a column."""

HOW = """## How it was done

- The weights that were best on fixed validation tasks are tested on 6,000 tasks, the same ones for all runs on one kind
  of device. ± is a 95 % interval: over seeds (Student's t) where there are several, otherwise over tasks (normal), and
  then it says nothing of other seeds. The Agnostic-SAM paper gives neither intervals nor a number of tasks. Its
  protocol has 400, which alone makes about ±1 point.
- Rules are compared after equal iterations, task by task and seed by seed. A rule is called **better** or **worse**
  where the intervals over tasks and over seeds both leave out 0 and the difference is larger than what a control of two
  equal rules leaves room for. **Inside the noise** does not say that rules are equal. One seed gets no verdict.
- Times are of runs that may have shared their machine; `python -m benchmarks.rules` measures better.
- Congruence is the cosine of `∇L_t(θ)` and `∇L_v(θ_v)`, with an augmented copy of the support set as validation set.
  `θ_v` is at the rule's own radius, so only rules of one radius can be compared.
"""


class Row(NamedTuple):
    """A section as the table and the figure show it: by rule, what was published, in %, and our accuracy by seed."""

    plan: Plan
    title: str
    published: dict[str, float]
    ours: dict[str, dict[int, Interval]]


def render(plans: Sequence[PlanResults]) -> str:
    """The page as text."""
    rows = table_rows(plans)
    parts = [
        "# Do the sharpness-aware rules help?\n",
        "\n".join(f"- {sentence}" for sentence in (_accuracy(rows), _help(plans), _one_seed(plans))) + "\n",
    ]
    if rows:
        parts.append(f"{picture(FIGURE, 'Accuracy of each rule beside the published one')}\n")
        parts.append(_table(rows))
    parts.append(HOW)
    parts.append(_pages(plans))
    parts += _not_run(plans)
    return "\n".join(parts)


def table_rows(plans: Sequence[PlanResults]) -> list[Row]:
    """The sections with runs, of plans that are not superseded."""
    found = [_row(plan.plan, one) for plan in plans if not plan.plan.superseded for one in plan.sections]
    return [row for row in found if row.ours][:MOST_ROWS]


def _row(plan: Plan, results: SectionResults) -> Row:
    """With the first rule of each kind."""
    section = results.section
    first = {config.inner: label for label, config in reversed(section.rules.items()) if config.inner in NAMES}
    ours = {NAMES[inner]: results.means(label, results.main_test) for inner, label in first.items()}
    published = {NAMES[inner]: section.published[label] for inner, label in first.items() if label in section.published}
    for label, value in section.published.items():
        published.setdefault(label.partition(" (")[0], value)  # MAML (Finn et al.) where the paper has no row
    return Row(plan, section.title, published, {rule: means for rule, means in ours.items() if means})


def _accuracy(rows: Sequence[Row]) -> str:
    """Of MAML, in the first section of each plan."""
    first = {row.plan.name: row for row in reversed(rows) if "MAML" in row.ours}
    said = [
        f"{accuracy([*row.ours['MAML'].values()])} % on {row.title} ([{row.plan.name}]({row.plan.name}.md)"
        + (f"; published: {row.published['MAML']:.2f})" if "MAML" in row.published else ")")
        for row in reversed(first.values())
    ]
    if not said:
        return "**How accurate?** Nothing has been run with the present defaults yet."
    seeds = {len(row.ours["MAML"]) for row in first.values()}
    return f"**How accurate?** MAML reaches {' and '.join(said)}{'; one seed each' if seeds == {1} else ''}."


def _help(plans: Sequence[PlanResults]) -> str:
    """What became of the claims, as far as several seeds tell."""
    told = [(plan, one) for plan in plans for one in pair_results(plan, plan.plan.claims) if one.seeds > 1]
    if not told:
        return "**Does sharpness help?** Not known: no claim has been tested with several seeds yet."
    counts = "; ".join(f"{n} {verdict}" for verdict, n in Counter(one.claim_verdict for _, one in told).most_common())
    names = {plan.plan.name: ", runs of superseded settings" * bool(plan.plan.superseded) for plan, _ in told}
    where = " and ".join(f"[{name}]({name}.md){note}" for name, note in names.items())
    better = sum(one.verdict == BETTER for _, one in told)
    answer = f"In {better}" if better else "Not shown:"
    return (
        f"**Does sharpness help?** {answer} of {len(told)} test{'s' * (len(told) > 1)} of a published claim over "
        f"several seeds ({where}): {counts}."
    )


def _one_seed(plans: Sequence[PlanResults]) -> str:
    """How far one seed can be trusted."""
    differences = [one for plan in plans for one in single_seed_differences(plan)]
    floors = [floor for plan in plans if (floor := noise_floor(plan)) is not None]
    if not differences:
        return "**What does one seed say?** Little: the interval over tasks does not cover the choice of the seed."
    control = (
        f", and rules that are equal but for rounding may differ by {100 * max(floors):.1f} points" if floors else ""
    )
    return (
        f"**What does one seed say?** Little: of {len(differences)} differences that several seeds call noise, "
        f"{misleading(differences)} look certain over the tasks of one seed{control}."
    )


def _table(rows: Sequence[Row]) -> str:
    rules = list(NAMES.values())
    lines = []
    for row in rows:
        cells = [
            f"{accuracy([*row.ours.get(rule, {}).values()])} ({figure(row.published.get(rule))})" for rule in rules
        ]
        seeds = ", ".join(dict.fromkeys(str(len(means)) for means in row.ours.values()))
        page = f"[{row.plan.name}]({row.plan.name}.md)"
        lines.append([row.title, *(cell.replace("– (–)", "–") for cell in cells), seeds, page])
    caption = "Test accuracy in %; in brackets the published one, of training that the plan's page names.\n\n"
    return caption + table(["setting", *rules, "seeds", "plan"], lines)


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
            commands.append(f"reproduce_maml experiments/{plan.plan.path.name} --data-root DATA")
    if lines:
        yield "## What was not run\n"
        yield "\n".join(lines) + "\n"
        yield (
            "These commands run it, on a GPU where there is one, and go on with what was stopped; `--max-minutes 9` "
            f"cuts them into short pieces:\n\n{block(commands)}"
        )
