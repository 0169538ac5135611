"""Time and peak memory of a MAML meta-gradient against tasks, inner steps, filters and image size.

Every point is a fresh process of each contestant, as its users run it. Peak memory is the process's largest resident
set (on a GPU: its largest allocation) above that before the first meta-gradient, the libraries' own start not counted.
The slope is that of a least-squares line through the logarithms: 1 is proportional, 2 quadratic. Where the engine is
chosen by the image's side, a curve against the side joins two engines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import interleave, table
from benchmarks.baselines import Contestant
from benchmarks.peer_packages import require
from benchmarks.presets import PRESETS, Preset

AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 2, 4, 8),
    "steps": (1, 2, 4, 8),
    "hidden": (8, 16, 32, 64),
    "side": (28, 42, 56, 84),
}
"""The values that each field of the preset takes in turn, the others as they are."""
LABELS = {"tasks": "tasks", "steps": "inner steps", "hidden": "filters", "side": "image side, pixels"}
QUANTITIES = {"median_s": "seconds", "peak_bytes": "peak bytes"}

Curves = dict[str, dict[str, list[dict[str, float]]]]
"""Axis, then contestant, to its points: `value`, `median_s`, `min_s`, `max_s`, `peak_bytes`."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    parser = table.parser("cost_curves", __doc__, ["mini_5w1s"], rounds=3)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--picture", type=Path, help="file to draw the curves to, .png or .svg")
    options = parser.parse_args(argv)
    require("learn2learn")
    contestants = {"ours": Contestant("ours", engine=options.engine), "learn2learn": Contestant("learn2learn")}
    report = table.Report(options.device)
    report.data["results"] = [_measured(name, contestants, options, report) for name in options.presets]
    if options.picture is not None:
        draw(report.data["results"][0], options.picture)
        print(f"drawn to {options.picture}", file=sys.stderr)
    return report.finish(options.output)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through `log y` against `log x`; both have to be positive."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves of one preset, a column an axis, with the slopes in the legend."""
    curves: Curves = result["curves"]
    figure = Figure(figsize=(4 * len(curves), 7), layout="constrained")
    grid = figure.subplots(len(QUANTITIES), len(curves), squeeze=False)
    for column, (axis, of_axis) in enumerate(curves.items()):
        for row, (quantity, label) in enumerate(QUANTITIES.items()):
            plot = grid[row][column]
            for name, points in of_axis.items():
                x, y = [point["value"] for point in points], [point[quantity] for point in points]
                plot.loglog(x, y, marker="o", label=f"{name}: slope {slope(x, y):.2f}")
            plot.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            plot.xaxis.set_minor_locator(NullLocator())
            plot.set(xlabel=LABELS[axis], ylabel=label)
            plot.legend()
    figure.suptitle(f"MAML meta-gradient around {result['preset']}\n{PRESETS[result['preset']].text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _measured(name: str, contestants: dict[str, Contestant], options: Any, report: table.Report) -> dict[str, Any]:
    """The curves and slopes around one preset; a point that several axes share is measured for each."""
    curves: Curves = {}
    for axis in options.axes:
        for value in AXES[axis]:
            preset: Preset = replace(PRESETS[name], **{axis: value})
            print(f"{name}, {LABELS[axis]} {value}", file=sys.stderr)
            times = interleave.measure(
                contestants,
                preset,
                form="own processes",
                device=options.device,
                rounds=options.rounds,
                warmups=1,
                warm_up=True,
            )
            for who, one in times.items():
                point = {"value": value, **{key: one.summary()[key] for key in ("median_s", "min_s", "max_s")}}
                point["peak_bytes"] = max(1, one.peak_bytes or 0)
                curves.setdefault(axis, {}).setdefault(who, []).append(point)
                report.tables["times"].append(_row(name, axis, who, point))
    slopes = []
    for axis, of_axis in curves.items():
        for who, points in of_axis.items():
            x = [point["value"] for point in points]
            found = {quantity: slope(x, [point[quantity] for point in points]) for quantity in QUANTITIES}
            slopes.append({"axis": axis, "contestant": who, **found})
            row: dict[str, Any] = {"preset": name, "against": LABELS[axis], "contestant": who}
            row |= {f"slope of {label}": found[quantity] for quantity, label in QUANTITIES.items()}
            report.tables.setdefault("slopes", []).append(row)
    return {"preset": name, "base": asdict(PRESETS[name]), "curves": curves, "slopes": slopes}


def _row(preset: str, axis: str, who: str, point: dict[str, float]) -> table.Row:
    return {
        "preset": preset,
        "against": LABELS[axis],
        "value": point["value"],
        "contestant": who,
        "median s": point["median_s"],
        "min s": point["min_s"],
        "max s": point["max_s"],
        "peak MB": point["peak_bytes"] / 1e6,
    }


if __name__ == "__main__":
    table.command("cost_curves", main)
