"""What the page says first: which claims hold, what the open questions came to, and what was not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fewshot_asam.reproduce.found import Found, look_up
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.markdown import NOTHING, block, cosine, figure, percent, table, text
from fewshot_asam.reproduce.plan import Pairs, Plan, cell_name
from fewshot_asam.reproduce.statistics import NOISE, ONE_SEED, Comparison, compare, in_words, over_seeds

NOT_RUN = "not run"
OF_CLAIMS = {"better": "confirmed", "worse": "contradicted", NOISE: f"not confirmed: {NOISE}", ONE_SEED: ONE_SEED}
"""What a verdict on its first rule makes of a claim."""


class Answer(NamedTuple):
    """What a section says on a claim or a question: its first rule minus its second.

    - `published`: the published difference, in points.
    - `time`: the first rule's seconds an iteration over the second's.
    """

    asked: str
    plan: Plan
    found: Found
    published: float | None
    result: Comparison | None
    time: float | None

    @property
    def verdict(self) -> str:
        """On the first rule; `not run` without a seed that both have."""
        return NOT_RUN if self.result is None else self.result.verdict


def render(plans: Sequence[Plan], records: Mapping[str, Record]) -> Iterable[str]:
    """The page's part that comes before the plans."""
    looked = [(plan, [look_up(section, records) for section in plan.sections]) for plan in plans]
    claims = [one for plan, sections in looked for one in answers(plan, sections, plan.claims)]
    questions = [one for plan, sections in looked for one in answers(plan, sections, plan.questions)]
    if claims:
        yield f"## Which published claims hold?\n\n{_counted(claims)}\n"
        yield _answers("claim", claims, OF_CLAIMS)
    if questions:
        yield "## Open questions\n\nThe answer is about the first of the two rules.\n"
        yield _answers("question", questions, {})
    sections = [(plan, found) for plan, several in looked for found in several]
    if standing := [row for plan, found in sections for row in _standing(plan, found)]:
        head = ["setting", "published", "%", "our MAML", "n", "ours − published"]
        yield f"## Where our MAML stands\n\n{table(head, standing)}"
    if shares := [row for _, found in sections for row in _shares(found)]:
        yield _told_apart(shares)
    if congruences := [row for plan, found in sections for row in _congruences(plan, found)]:
        head = ["difference of cosines", "setting", "before the inner step", "", "after it", "", "n"]
        yield f"## Are the gradients more congruent?\n\n{table(head, congruences)}"
    yield from _left(looked)


def answers(plan: Plan, sections: Iterable[Found], asked: Pairs) -> list[Answer]:
    """What the sections that have both rules say, each pair of runs once."""
    told: dict[tuple[str, str, str], Answer] = {}
    for found in sections:
        rules, published = found.section.rules, found.section.published
        for asking, (first, second) in asked.items():
            if first in rules and second in rules:
                key = (asking, cell_name(rules[first]), cell_name(rules[second]))
                both = first in published and second in published
                result = found.difference(first, second)
                time = None if result is None else found.seconds(first) / found.seconds(second)
                difference = published[first] - published[second] if both else None
                told.setdefault(key, Answer(asking, plan, found, difference, result, time))
    order = list(asked)
    return sorted(told.values(), key=lambda one: (one.result is None, order.index(one.asked)))


def _counted(claims: Iterable[Answer]) -> str:
    """How many claims came to what, by plan."""
    by_plan: dict[str, Counter[str]] = {}
    for one in claims:
        by_plan.setdefault(one.plan.path.name, Counter())[OF_CLAIMS.get(one.verdict, one.verdict)] += 1
    lines = []
    for name, counts in by_plan.items():
        words = ", ".join(f"{answer} {count}" for answer, count in counts.most_common())
        lines.append(f"- `{name}`, {counts.total()} in all: {words}")
    return "\n".join(lines)


def _answers(kind: str, told: Iterable[Answer], words: Mapping[str, str]) -> str:
    rows = []
    for one in told:
        result, where = one.result, f"{one.found.section.title} (`{one.plan.name}`)"
        head = [one.asked, where, figure(one.published, "+")]
        if result is None:
            rows.append([*head, *[NOTHING] * 3, NOT_RUN, NOTHING])
        else:
            intervals = [percent(result.tasks), text(result.seeds), str(result.seeds.seeds)]
            rows.append([*head, *intervals, f"**{words.get(one.verdict, one.verdict)}**", f"× {one.time:.2f}"])
    return table([kind, "setting", "published", "over tasks", "over seeds", "n", "answer", "time"], rows)


def _standing(plan: Plan, found: Found) -> Iterable[list[str]]:
    """The section's MAML beside every figure that is published for MAML."""
    section = found.section
    for rule in (rule for rule, config in section.rules.items() if config.inner == "maml"):
        ours = found.mean(rule, found.main)
        for label, value in section.published.items():
            if label == rule or label.startswith(f"{rule} ("):
                whose = f"{rule} (the paper's row)" if label == rule else label
                row = [f"{section.title} (`{plan.name}`)", whose, figure(value)]
                if ours is None:
                    yield [*row, NOT_RUN, "0", NOTHING]
                else:
                    yield [*row, text(ours), str(ours.seeds), figure(100 * ours.mean - value, "+")]


def _shares(found: Found) -> Iterable[list[str]]:
    """For each rule and way of adapting: what training with it changes, and what adapting with it does."""
    rules = found.section.rules
    baselines = [rule for rule, config in rules.items() if config.inner == "maml"]
    for rule in (rule for rule in rules if baselines and rule not in baselines):
        own, plain = _tests_with(found, rule, rules[rule].inner), _tests_with(found, rule, "maml")
        for way in sorted(own.keys() & plain.keys()):
            tasks = min(found.test(rule, name).tasks for name in (own[way], plain[way]))
            adapted = found.accuracies(rule, plain[way], tasks)
            trained = compare(adapted, found.accuracies(baselines[0], plain[way], tasks))
            used = compare(found.accuracies(rule, own[way], tasks), adapted)
            if trained is not None and used is not None:
                row = [rule, found.section.title, str(way[0]), f"{tasks:,}", *_told(trained), *_told(used)]
                yield [*row, str(used.seeds.seeds)]


def _tests_with(found: Found, rule: str, inner: str) -> dict[tuple[int, float], str]:
    """The tests in which a rule's weights adapt by `inner`, by steps and rate."""
    tests = {name: found.test(rule, name) for name in found.section.tests}
    return {(test.inner_steps, test.inner_lr): name for name, test in tests.items() if test.inner == inner}


def _told(result: Comparison) -> list[str]:
    return [text(result.seeds), result.verdict]


def _told_apart(rows: Iterable[Sequence[str]]) -> str:
    head = ["rule", "setting", "steps", "tasks", "from training", "", "from adapting", "", "n"]
    return (
        "## From training, or from adapting with the rule?\n\n"
        "From training: weights trained with the rule minus weights trained with MAML, both adapted by MAML. From "
        "adapting: the weights trained with the rule, adapted by it minus adapted by MAML. Over seeds.\n\n"
        f"{table(head, rows)}"
    )


def _congruences(plan: Plan, found: Found) -> Iterable[list[str]]:
    """Of the rules that claims are about."""
    for first, second in dict.fromkeys(plan.claims.values()):
        row: list[str] = []
        seeds = 0
        for name in ("congruence_before", "congruence_after"):
            one, other = found.congruence(first, name), found.congruence(second, name)
            if shared := sorted(one.keys() & other.keys()):
                difference = over_seeds([one[seed] - other[seed] for seed in shared])
                row += [cosine(difference), in_words(difference, ("higher", "lower"))]
                seeds = len(shared)
        if row:
            yield [f"{first} − {second}", f"{found.section.title} (`{plan.name}`)", *row, str(seeds)]


def _left(looked: Iterable[tuple[Plan, Sequence[Found]]]) -> Iterable[str]:
    """The plans that are not done, and the commands that do them."""
    lines = []
    for plan, sections in looked:
        if any(found.missing for found in sections):
            lines.append(f"reproduce_maml plans/{plan.path.name} --data-root DATA")
    if lines:
        yield (
            "## What was not run\n\nWhat the tables above call not run, and what each plan lists as missing below. "
            "These commands run it, on a GPU where there is one, and go on with what was stopped; `--max-minutes 9` "
            f"cuts them into short stays:\n\n{block(lines)}"
        )
