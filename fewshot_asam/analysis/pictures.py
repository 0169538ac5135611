"""Figures of an analysis: curves of several runs with their intervals, and loss surfaces beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

LEVELS = 16
"""Of a surface's contours."""


class Curve(NamedTuple):
    """Means `[n]` and the half widths of their intervals `[n]`."""

    mean: Tensor
    half_width: Tensor


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    x: Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: Sequence[str] = (),
    joined: bool = True,
    sharey: bool = False,
) -> Figure:
    """One panel beside another, in each a curve of every run with its interval.

    **Arguments:**

    - `panels`: by title, the curves by run.
    - `x`: of every curve, `[n]`.
    - `log`: the axes that are logarithmic, of `x` and `y`.
    - `joined`: lines with a band; otherwise points with bars, those of different runs side by side.
    - `sharey`: one scale for all panels.
    """
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.2), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=sharey)
    for panel, (name, runs) in zip(axes[0], panels.items(), strict=True):
        for number, (run, curve) in enumerate(runs.items()):
            style = {"color": f"C{number}", "label": run}
            mean, half = curve.mean, curve.half_width
            if joined:
                panel.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
                panel.plot(x, mean, **style)
            else:
                offset = 0.12 * (number - (len(runs) - 1) / 2)
                panel.errorbar([value + offset for value in x], mean, half, fmt="o", markersize=4, capsize=2, **style)
        for axis in log:
            panel.set(**{f"{axis}scale": "log"})
        panel.set(title=name, xlabel=xlabel, ylabel=ylabel)
        panel.grid(alpha=0.3)
    first = next(iter(panels.values()))
    if len(first) > 1:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(first), 3), frameon=False)
    figure.suptitle(title)
    return figure


def contours(planes: Mapping[str, Mapping[str, Tensor]], side: Sequence[float], title: str = "") -> Figure:
    """Loss surfaces, a column for each run and a row for each loss, all on one logarithmic colour scale.

    **Arguments:**

    - `planes`: by run, the losses on a plane by name, `[n, n]`; the first dimension is drawn upwards.
    - `side`: positions along both directions, `[n]`.
    """
    rows, columns = list(next(iter(planes.values()))), list(planes)
    logs = {run: {name: _log(plane) for name, plane in losses.items()} for run, losses in planes.items()}
    every = torch.stack([plane for losses in logs.values() for plane in losses.values()])
    levels = torch.linspace(every.min().item() - 1e-6, every.max().item() + 1e-6, LEVELS)
    figure = Figure(figsize=(1.2 + 3.2 * len(columns), 0.8 + 3.0 * len(rows)), layout="constrained")
    panels: Any = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, name in enumerate(rows):
        for column, run in enumerate(columns):
            panel = panels[row][column]
            drawn = panel.contourf(side, side, logs[run][name], levels=levels, cmap="RdYlBu_r")
            panel.contour(side, side, logs[run][name], levels=levels, colors="black", linewidths=0.3)
            panel.plot(0, 0, "+", color="black")
            panel.set_title(f"{run}: {name}" if len(columns) > 1 else name, fontsize=10)
    bar = figure.colorbar(drawn, ax=panels, label="loss", ticks=levels[:: LEVELS // 5])
    bar.ax.set_yticklabels([f"{10**level:.2g}" for level in levels[:: LEVELS // 5].tolist()])
    figure.supxlabel("second direction, in filter lengths")
    figure.supylabel("first direction")
    figure.suptitle(title)
    return figure


def _log(plane: Tensor) -> Tensor:
    return plane.clamp_min(1e-6).log10()
