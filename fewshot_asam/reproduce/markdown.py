"""Markdown, and numbers as the pages write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fewshot_asam.reproduce.inference import Estimate
from fewshot_asam.reproduce.statistics import Comparison, Spread, over_seeds
from fewshot_asam.training.evaluation import Interval

NOTHING = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without columns that hold nothing in any row."""
    lines = [list(row) for row in rows]
    kept = [i for i in range(len(head)) if i == 0 or any(line[i] != NOTHING for line in lines)]
    shown = [[line[i].replace("|", r"\|") for i in kept] for line in ([*head], *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (shown[0], ["---"] * len(kept), *shown[1:])) + "\n"


def percent(value: Interval) -> str:
    """An accuracy or a difference in % with its interval over tasks."""
    return f"{100 * value.mean:.2f} ± {100 * value.half_width:.2f}"


def spread(value: Spread | None) -> str:
    """The same with its interval over seeds; nothing for one seed."""
    return NOTHING if value is None or value.half_width is None else str(value)


def accuracy(by_seed: Sequence[Interval]) -> str:
    """A mean over seeds with its interval over them, or one seed's with its interval over tasks."""
    if len(by_seed) == 1:
        return percent(by_seed[0])
    return spread(over_seeds([one.mean for one in by_seed])) if by_seed else NOTHING


def difference(value: Comparison) -> str:
    """A difference and its two intervals, each for itself."""
    width = value.seeds.half_width
    over = "" if width is None else f", seeds ± {100 * width:.2f}"
    return f"{100 * value.tasks.mean:+.2f} (tasks ± {100 * value.tasks.half_width:.2f}{over})"


def simultaneous(value: Estimate | None) -> str:
    """A difference with its simultaneous interval."""
    return NOTHING if value is None else f"{100 * value.mean:+.2f} ± {100 * value.half_width:.2f}"


def probability(value: float | None) -> str:
    """A p-value; of small ones it is enough that they are small."""
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cosine(value: Spread) -> str:
    """A cosine, or a difference of two, with its interval over seeds."""
    return f"{value.mean:.3f}" + ("" if value.half_width is None else f" ± {value.half_width:.3f}")


def ratio(value: Spread | None) -> str:
    """A ratio with its interval over seeds."""
    if value is None:
        return NOTHING
    return f"× {value.mean:.2f}" + ("" if value.half_width is None else f" ± {value.half_width:.2f}")


def figure(value: float | None, sign: str = "") -> str:
    """A published accuracy in %, or a difference of two with the format `+`."""
    return NOTHING if value is None else f"{value:{sign}.2f}"


def picture(name: str, what: str) -> str:
    """A figure beside the page."""
    return f"![{what}]({name})"


def block(lines: Iterable[str]) -> str:
    """Command lines."""
    return "```\n" + "\n".join(lines) + "\n```\n"
