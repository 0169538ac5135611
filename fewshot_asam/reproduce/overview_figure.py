"""The first page's figure: the accuracy of each rule beside the published one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fewshot_asam.reproduce.overview import NAMES, Row
from fewshot_asam.reproduce.statistics import over_seeds

COLUMNS = 3


def accuracies(rows: Sequence[Row]) -> Figure:
    """A panel for each row, each with its own range of accuracies."""
    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(4 * columns + 1, 2.1 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, row in zip(panels, rows, strict=False):
        _panel(panel, row)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    ours = Line2D([], [], color="black", marker="o", label="ours, 95 % interval")
    published = Line2D([], [], color="black", marker="D", fillstyle="none", linestyle="none", label="published")
    figure.legend(handles=[ours, published], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _panel(panel: Any, row: Row) -> None:
    rules = list(NAMES.values())
    for number, rule in enumerate(rules):
        if means := row.ours.get(rule):
            only = next(iter(means.values()))
            over = over_seeds([one.mean for one in means.values()])
            width = only.half_width if over.half_width is None else over.half_width
            panel.errorbar(100 * over.mean, number, xerr=100 * width, fmt="o", color=f"C{number}", capsize=4)
        if rule in row.published:
            panel.plot(row.published[rule], number, "D", color=f"C{number}", markerfacecolor="none", markersize=7)
    panel.set(yticks=range(len(rules)), yticklabels=rules, ylim=(len(rules) - 0.5, -0.5), xlabel="test accuracy, %")
    seeds = max(len(means) for means in row.ours.values())
    panel.set_title(f"{row.title} ({seeds} seed{'s' if seeds > 1 else ''})", fontsize=10)
    panel.margins(x=0.15)
    panel.grid(alpha=0.3)
