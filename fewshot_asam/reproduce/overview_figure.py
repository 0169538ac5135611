"""The first page's figure: differences to MAML, the band in which they do not matter, and the control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fewshot_asam.reproduce.comparisons import reach
from fewshot_asam.reproduce.overview import Panel

COLUMNS = 2


def differences(panels: Sequence[Panel]) -> Figure:
    """A panel for each section, all with one range of differences."""
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    rows = max(len(panel.differences) for panel in panels) + 1
    figure = Figure(figsize=(6.5 * columns, (0.34 * rows + 1.4) * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw(axis: Any, panel: Panel) -> None:
    band = 100 * panel.margin
    axis.axvspan(
        -band, band, color="tab:green", alpha=0.15, linewidth=0, label=f"within {band:g} points: does not matter"
    )
    axis.axvline(0, color="black", linewidth=0.8)
    rows = [
        (rule, one, "tab:blue", "minus MAML, simultaneous 95 % interval") for rule, one in panel.differences.items()
    ]
    if panel.control is not None:
        floor = 100 * reach(panel.control)
        rows.append(("control", panel.control, "tab:gray", "control: two rules equal but for rounding"))
        for edge in (-floor, floor):
            axis.axvline(edge, color="tab:gray", linestyle=":", label="as far as the control reaches")
    for number, (_, one, color, text) in enumerate(rows):
        axis.errorbar(100 * one.mean, number, xerr=100 * one.half_width, fmt="o", color=color, capsize=4, label=text)
    axis.set(yticks=range(len(rows)), yticklabels=[name for name, *_ in rows], ylim=(len(rows) - 0.5, -0.5))
    axis.set_xlabel("difference of accuracy, points")
    axis.set_title(panel.title, fontsize=10)
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.3)
