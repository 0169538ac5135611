"""Markdown tables, and numbers as the page writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fewshot_asam.reproduce.statistics import Spread
from fewshot_asam.training.evaluation import Interval

NOTHING = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], last: bool = True) -> str:
    """A table, without its last column unless `last`."""
    width = len(head) if last else len(head) - 1
    lines = [head[:width], ["---"] * width, *(row[:width] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def percent(value: Interval) -> str:
    """An accuracy or a difference in % with its interval over tasks."""
    return f"{100 * value.mean:.2f} ± {100 * value.half_width:.2f}"


def text(value: Spread | None) -> str:
    """The same with its interval over seeds."""
    return NOTHING if value is None else str(value)


def cosine(value: Spread) -> str:
    """A cosine, or a difference of two, with its interval over seeds."""
    return f"{value.mean:.3f}" + ("" if value.half_width is None else f" ± {value.half_width:.3f}")


def figure(value: float | None, sign: str = "") -> str:
    """A published accuracy in %, or a difference of two with the format `+`."""
    return NOTHING if value is None else f"{value:{sign}.2f}"


def picture(name: str, what: str) -> str:
    """A figure beside the page."""
    return f"![{what}]({name})"


def block(lines: Iterable[str]) -> str:
    """Command lines."""
    return "```\n" + "\n".join(lines) + "\n```\n"
