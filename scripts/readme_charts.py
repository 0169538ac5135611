"""Draw the README's two charts, accuracy and speed, from the tables of docs/results.md and docs/speed.md.

python scripts/readme_charts.py docs/charts.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
OURS, THEIRS = "#1f618d", "#b0b7bf"


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the table of a page that begins with `header`."""
    text = (DOCS / page).read_text("utf-8")
    found = re.search(rf"^\| {re.escape(header)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    if found is None:
        sys.exit(f"readme_charts: docs/{page} has no table that begins with | {header} |")
    return [[cell.strip() for cell in row.strip("| \n").split("|")] for row in found[1].splitlines()]


def accuracy(axis: Any) -> None:
    """Ours beside the published figures, with the iterations of both."""
    names = []
    for place, (dataset, ours, iterations, published, further) in enumerate(rows("results.md", "dataset")):
        mean, half_width = map(float, ours.split(" ± "))
        theirs, source = re.fullmatch(r"([\d.]+) \((.*)\)", published).groups()  # type: ignore[union-attr]
        for offset, value, error, colour, label in (
            (-0.2, mean, half_width, OURS, f"{ours} %\n{_spelt(iterations)}"),
            (0.2, float(theirs), None, THEIRS, f"{theirs} %\n{_spelt(further)}"),
        ):
            axis.barh(place + offset, value, 0.36, xerr=error, color=colour, capsize=3)
            axis.text(1.5, place + offset, label, va="center", fontsize=7, color="white" if error else "black")
        names.append(dataset)
    axis.barh(0, 0, color=OURS, label="here, 32 filters, one seed")
    axis.barh(0, 0, color=THEIRS, label=f"published ({source})")
    axis.set(xlim=(0, 100), xlabel="test accuracy, %", title="MAML, 5-way 1-shot")
    _finish(axis, names)


def _spelt(iterations: str) -> str:
    return iterations.replace(" of ", " iterations of ")


def speed(axis: Any) -> None:
    """Seconds of one meta-gradient."""
    names = []
    for place, (problem, theirs, ours, ratio) in enumerate(rows("speed.md", "problem")):
        axis.barh(place - 0.2, float(ours), 0.36, color=OURS)
        axis.barh(place + 0.2, float(theirs), 0.36, color=THEIRS)
        axis.text(float(theirs) + 0.15, place, f"× {ratio.split()[0]}", va="center", fontsize=8)
        names.append(problem.partition(":")[0].replace(" 5-way", "\n5-way").replace(" 20-way", "\n20-way"))
    axis.barh(0, 0, color=OURS, label="here")
    axis.barh(0, 0, color=THEIRS, label="learn2learn")
    axis.set(xlabel="seconds, less is better", title="One meta-gradient, 2 CPU cores")
    axis.margins(x=0.12)
    _finish(axis, names)


def _finish(axis: Any, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """The command."""
    if len(sys.argv) != 2:
        sys.exit("readme_charts: expected the PNG file to write, such as docs/charts.png")
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracy(left)
    speed(right)
    figure.savefig(sys.argv[1], dpi=130)


if __name__ == "__main__":
    main()
