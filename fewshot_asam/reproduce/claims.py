"""What the page says first: which claims hold, what the open questions came to, and what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

from fewshot_asam.reproduce.markdown import NOTHING, block, cosine, figure, percent, table, text
from fewshot_asam.reproduce.plan import Pairs, Plan, cell_name
from fewshot_asam.reproduce.section_results import Found, Looked, cosines_of, of_seeds
from fewshot_asam.reproduce.statistics import NOISE, Comparison, Spread, compare, over_seeds
from fewshot_asam.training.evaluation import Interval

NOT_RUN = "not run"
DIVERGED = "diverged"


class Answer(NamedTuple):
    """What a section says on a claim or a question: its first rule minus its second.

    - `published`: the published difference, in points.
    - `time`: the first rule's seconds an iteration over the second's.
    - `diverged`: runs of either that diverged.
    """

    asked: str
    plan: Plan
    found: Found
    published: float | None
    result: Comparison | None
    time: Spread | None
    diverged: int

    @property
    def verdict(self) -> str:
        """On the first rule; `not run` without a seed that both have."""
        if self.result is None:
            return DIVERGED if self.diverged else NOT_RUN
        return self.result.verdict

    @property
    def of_claim(self) -> str:
        """What the verdict makes of a claim: confirmed or not where a difference is published, else a sign of it."""
        if self.result is None or self.published is None:
            return {"better": "in favour", "worse": "against"}.get(self.verdict, self.verdict)
        mean = 100 * self.result.tasks.mean
        if self.verdict in ("better", "worse"):
            return "confirmed" if mean * self.published > 0 else "contradicted"
        if self.verdict != NOISE:
            return self.verdict
        inside = abs(mean - self.published) <= 100 * self.result.half_width
        return f"not confirmed: {NOISE}, the published difference {'too' if inside else 'outside of it'}"


def render(looked: Looked) -> Iterable[str]:
    """The page's part that comes before the plans."""
    claims = _finished_first(one for plan, sections in looked for one in answers(plan, sections, plan.claims))
    questions = _finished_first(one for plan, sections in looked for one in answers(plan, sections, plan.questions))
    if claims:
        counted = _counted((one.plan, one.of_claim) for one in claims)
        yield (
            "## Which published claims hold?\n\nWhere the paper gives figures for a setting, a claim is confirmed or "
            "contradicted. Elsewhere a difference is in favour of it or against it: the same rules at another size.\n\n"
            f"{counted}\n"
        )
        yield _answers("claim", [(one, one.of_claim) for one in claims])
    if questions:
        counted = _counted((one.plan, one.verdict) for one in questions)
        yield f"## Open questions\n\nThe answer is about the first of the two rules.\n\n{counted}\n"
        yield _answers("question", [(one, one.verdict) for one in questions])
    sections = [(plan, found) for plan, several in looked for found in several]
    yield from _chance([*claims, *questions], (found for _, found in sections))
    if standing := [row for plan, found in sections for row in _standing(plan, found)]:
        head = ["setting", "published", "%", "our training", "our MAML", "n", "ours − published"]
        yield f"## Where our MAML stands\n\n{table(head, standing)}"
    if shares := [row for _, found in sections for row in _shares(found)]:
        yield _told_apart(shares)
    if congruences := [row for plan, found in sections for row in _congruences(plan, found)]:
        yield _congruent(congruences)
    yield from _left(looked)


def answers(plan: Plan, sections: Iterable[Found], asked: Pairs) -> list[Answer]:
    """What the sections that have both rules say; of the same runs and test, the section that knows most."""
    told: dict[tuple[object, ...], Answer] = {}
    for asking, (first, second) in asked.items():
        for found in sections:
            rules, published = found.section.rules, found.section.published
            if first in rules and second in rules:
                both = first in published and second in published
                difference = published[first] - published[second] if both else None
                diverged = sum(rule in (first, second) for rule, _ in found.diverged)
                result = found.difference(first, second)
                one = Answer(asking, plan, found, difference, result, found.time(first, second), diverged)
                tests = (found.test(rule, found.main) for rule in (first, second))
                key = (asking, cell_name(rules[first]), cell_name(rules[second]), *tests)
                told[key] = max(told.get(key, one), one, key=_known)
    return list(told.values())


def _known(answer: Answer) -> tuple[bool, int]:
    return answer.published is not None, answer.result.seeds.seeds if answer.result else 0


def _finished_first(told: Iterable[Answer]) -> list[Answer]:
    return sorted(told, key=lambda one: one.result is None)


def _counted(told: Iterable[tuple[Plan, str]]) -> str:
    """How many claims or questions came to what, by plan."""
    by_plan: dict[str, Counter[str]] = {}
    for plan, words in told:
        by_plan.setdefault(plan.path.name, Counter())[words] += 1
    lines = []
    for name, counts in by_plan.items():
        words = "; ".join(f"{count} {answer}" for answer, count in counts.most_common())
        lines.append(f"- `{name}`, {counts.total()} in all: {words}")
    return "\n".join(lines)


def _answers(kind: str, told: Iterable[tuple[Answer, str]]) -> str:
    rows = []
    for one, words in told:
        result = one.result
        head = [one.asked, _where(one.plan, one.found), figure(one.published, "+")]
        if result is None:
            rows.append([*head, *[NOTHING] * 3, words, NOTHING])
        else:
            count = f"{result.seeds.seeds}" + (f", {one.diverged} {DIVERGED}" if one.diverged else "")
            time = NOTHING if one.time is None else f"× {_ratio(one.time)}"
            rows.append([*head, percent(result.tasks), text(result.seeds), count, f"**{words}**", time])
    return table([kind, "setting", "published", "over tasks", "over seeds", "n", "answer", "time"], rows)


def _where(plan: Plan, found: Found) -> str:
    return f"{found.section.title} (`{plan.name}`)"


def _ratio(time: Spread) -> str:
    return f"{time.mean:.2f}" + ("" if time.half_width is None else f" ± {time.half_width:.2f}")


def _chance(asked: Sequence[Answer], sections: Iterable[Found]) -> Iterable[str]:
    """How many verdicts equal rules would get, and what one seed alone would have shown."""
    told = [one.verdict for one in asked if one.verdict in ("better", "worse", NOISE)]
    parts = []
    if told:
        decided = len(told) - told.count(NOISE)
        parts.append(
            f"Of the {len(told)} comparisons above that have a verdict, {decided} are better or worse. Were all rules "
            f"equal, about {len(told) / 20:.1f} would be by chance, and several together where they share runs.\n"
        )
    each = _inside_the_noise(sections)
    if each:
        apart = sum(abs(one.mean) > one.half_width for one in each)
        parts.append(
            f"Of the {len(each)} differences of two rules in one seed whose verdict over seeds is {NOISE}, {apart} "
            f"leave out 0 by their interval over tasks: {apart} findings that other seeds do not bear out.\n"
        )
    if parts:
        yield "## How much of this is chance?\n"
        yield from parts


def _inside_the_noise(sections: Iterable[Found]) -> list[Interval]:
    """Each seed's difference of two rules that cannot be told apart over seeds, the same runs but once."""
    told: dict[frozenset[str], Comparison] = {}
    for found in sections:
        for first, second in combinations(found.section.rules, 2):
            runs = frozenset(cell_name(found.section.rules[rule]) for rule in (first, second))
            result = found.difference(first, second)
            if result is not None and result.verdict == NOISE:
                told[runs] = result
    return [one for result in told.values() for one in result.each.values()]


def _standing(plan: Plan, found: Found) -> Iterable[list[str]]:
    """The section's MAML beside every figure that is published for MAML."""
    section = found.section
    for rule, config in ((rule, config) for rule, config in section.rules.items() if config.inner == "maml"):
        training = f"{config.iterations:,} iterations of {config.meta_batch_size} tasks, {config.hidden} filters"
        ours = found.mean(rule, found.main)
        for label, value in section.published.items():
            if label == rule or label.startswith(f"{rule} ("):
                whose = f"{rule} (the paper's row)" if label == rule else label
                row = [_where(plan, found), whose, figure(value), training]
                if ours is None:
                    yield [*row, NOT_RUN, "0", NOTHING]
                else:
                    yield [*row, text(ours), str(ours.seeds), text(ours._replace(mean=ours.mean - value / 100))]


def _shares(found: Found) -> Iterable[list[str]]:
    """For each rule and way of adapting: what training with it changes, what adapting with it does, and both."""
    rules = found.section.rules
    baselines = [rule for rule, config in rules.items() if config.inner == "maml"]
    for rule in (rule for rule in rules if baselines and rule not in baselines):
        own, plain = _tests_with(found, rule, rules[rule].inner), _tests_with(found, rule, "maml")
        for way in sorted(own.keys() & plain.keys() & _tests_with(found, baselines[0], "maml").keys()):
            names = {rule: (own[way], plain[way]), baselines[0]: (plain[way],)}
            tasks = min(found.test(of, name).tasks for of, several in names.items() for name in several)
            (mine, adapted), (theirs,) = (
                [found.accuracies(of, name, tasks) for name in several] for of, several in names.items()
            )
            seeds = [s for s in found.paired(rule, baselines[0]) if s in mine and s in adapted and s in theirs]
            pairs = ((adapted, theirs), (mine, adapted), (mine, theirs))
            told = [_of(seeds, first, second) for first, second in pairs]
            if all(told):
                yield [rule, found.section.title, str(way[0]), f"{tasks:,}", *told, str(len(seeds))]


def _tests_with(found: Found, rule: str, inner: str) -> dict[tuple[int, float], str]:
    """The tests in which a rule's weights adapt by `inner`, by steps and rate."""
    tests = {name: found.test(rule, name) for name in found.section.tests}
    return {(test.inner_steps, test.inner_lr): name for name, test in tests.items() if test.inner == inner}


def _of(seeds: Sequence[int], first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> str:
    """A difference for some seeds, its intervals and a verdict."""
    result = compare(of_seeds(seeds, first), of_seeds(seeds, second))
    if result is None:
        return ""
    width = result.seeds.half_width
    seeds_text = "" if width is None else f", seeds ± {100 * width:.2f}"
    return f"{100 * result.tasks.mean:+.2f} (tasks ± {100 * result.tasks.half_width:.2f}{seeds_text}): {result.verdict}"


def _told_apart(rows: Iterable[Sequence[str]]) -> str:
    head = ["rule", "setting", "steps", "tasks", "from training", "from adapting", "together", "n"]
    return (
        "## From training, or from adapting with the rule?\n\n"
        "From training: weights trained with the rule minus weights trained with MAML, both adapted by MAML. From "
        "adapting: the weights trained with the rule, adapted by it minus adapted by MAML. In this order; MAML's "
        f"weights adapted by the rule were not tested. First tasks of the test alone.\n\n{table(head, rows)}"
    )


def _congruences(plan: Plan, found: Found) -> Iterable[list[str]]:
    """Of the rules that claims and questions are about, where their congruence is taken alike."""
    rules = found.section.rules
    for first, second in dict.fromkeys([*plan.claims.values(), *plan.questions.values()]):
        if not {first, second} <= rules.keys() or cosines_of(rules[first]) != cosines_of(rules[second]):
            continue
        columns = []
        for name in ("congruence_before", "congruence_after"):
            one, other = found.congruence(first, name), found.congruence(second, name)
            seeds = [seed for seed in found.paired(first, second) if seed in one and seed in other]
            columns.append([one[seed] - other[seed] for seed in seeds])
        if all(columns):
            tasks = rules[first].congruence_tasks
            cosines = [cosine(over_seeds(column)) for column in columns]
            yield [f"{first} − {second}", _where(plan, found), *cosines, str(tasks), str(len(columns[0]))]


def _congruent(rows: Iterable[Sequence[str]]) -> str:
    head = ["difference of cosines", "setting", "before the inner step", "after it", "tasks", "n"]
    return (
        "## Are the gradients more congruent?\n\nThe paper's Figure 1 says so of Agnostic-SAM against SAM, in its "
        "supervised form. The intervals are over seeds alone: all runs are measured on the same few tasks, whose noise "
        f"comes on top, so no verdict is given.\n\n{table(head, rows)}"
    )


def _left(looked: Looked) -> Iterable[str]:
    """The plans that are not done, and the commands that do them."""
    lines = []
    for plan, sections in looked:
        if any(found.missing for found in sections):
            lines.append(f"reproduce_maml experiments/{plan.path.name} --data-root DATA")
    if lines:
        yield (
            "## What was not run\n\nWhat the tables above call not run, and what each plan lists as missing below. "
            "These commands run it, on a GPU where there is one, and go on with what was stopped; `--max-minutes 9` "
            f"cuts them into short stays:\n\n{block(lines)}"
        )
