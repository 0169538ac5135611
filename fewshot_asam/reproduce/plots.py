"""The pages' figures: accuracy beside the published one, while training, and against the radius."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fewshot_asam.reproduce.comparisons import noise_floor
from fewshot_asam.reproduce.plan import Plan, Section
from fewshot_asam.reproduce.radius_sweeps import Curve, Sweep, radius_sweeps
from fewshot_asam.reproduce.section_results import PlanResults, Runs, SectionResults
from fewshot_asam.reproduce.statistics import Spread
from fewshot_asam.training.checkpoint import write_atomically


def draw(plan: PlanResults, folder: Path) -> None:
    """Writes all figures of a plan that the ledger has numbers for."""
    for results in plan.sections:
        if results.runs:
            save(_curves(results), folder / curves_name(plan.plan, results.section))
    for name, sweep in sweep_names(plan.plan, radius_sweeps(plan.sections)).items():
        save(_radii(sweep, noise_floor(plan)), folder / name)


def curves_name(plan: Plan, section: Section) -> str:
    """The file of a section's curves."""
    words = re.findall(r"[a-z0-9.]+", section.title.lower())
    return f"{plan.name}-{1 + plan.sections.index(section)}-{'-'.join(words)}.png"


def sweep_names(plan: Plan, sweeps: Sequence[Sweep]) -> dict[str, Sweep]:
    """The files of a plan's radius sweeps, and what each shows."""
    return {f"{plan.name}-radii-{number}.png": sweep for number, sweep in enumerate(sweeps, 1)}


def _curves(results: SectionResults) -> Figure:
    """Validation accuracy against iterations and minutes, the seeds' mean and range; then congruence, if recorded."""
    congruence = any("congruence_before" in r["validation"] for runs in results.runs.values() for r in runs.values())
    figure = Figure(figsize=(10, 8 if congruence else 4), layout="constrained")
    panels = figure.subplots(2 if congruence else 1, 2, squeeze=False)
    for number, (rule, runs) in enumerate(results.runs.items()):
        style = {"color": f"C{number}", "label": f"{rule} ({len(runs)} seed{'s' * (len(runs) > 1)})"}
        minutes = _column(_mean(_courses(runs, "seconds")), 1 / 60)
        iterations = next(iter(runs.values()))["validation"]["iteration"]
        for panel, x in zip(panels[0], (iterations, minutes), strict=True):
            _band(panel, x, _courses(runs, "accuracy", 100), style)
        for panel, name in zip(panels[-1], ("congruence_before", "congruence_after"), strict=True):
            _band(panel, iterations, _courses(runs, name), style)
    panels[0][0].set(xlabel="meta-iteration", ylabel="validation accuracy, %")
    panels[0][1].set(xlabel="minutes of training, validations included", ylabel="validation accuracy, %")
    if congruence:
        panels[1][0].set(xlabel="meta-iteration", ylabel="cosine before the inner step")
        panels[1][1].set(xlabel="meta-iteration", ylabel="cosine after it")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    seeds = {seed for runs in results.runs.values() for seed in runs}
    figure.suptitle(f"{results.section.title}: {'mean and range over seeds' if len(seeds) > 1 else 'one seed'}")
    return figure


def _radii(sweep: Sweep, floor: float | None) -> Figure:
    """Accuracy, and the paired difference to MAML; points of equal radius side by side."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    accuracy, over_maml = figure.subplots(1, 2)
    for number, (name, curve) in enumerate(sorted(sweep.items())):
        style = {"color": f"C{number}", "label": f"{name} ({_seeds(curve)})"}
        if 0.0 in curve:
            _level(accuracy, curve[0.0].accuracy, style)
        points = {radius * 1.06**number: point for radius, point in sorted(curve.items()) if radius > 0}
        _points(accuracy, {x: point.accuracy for x, point in points.items()}, style)
        _points(over_maml, {x: point.over_maml for x, point in points.items() if point.over_maml}, style)
    over_maml.axhline(0, color="black", linewidth=0.8)
    if floor is not None:
        over_maml.axhspan(-100 * floor, 100 * floor, color="black", alpha=0.08, linewidth=0)
        over_maml.set_title("grey: what the control's two equal rules may differ by", fontsize=10)
    accuracy.set(xscale="log", xlabel="rho", ylabel="test accuracy, %")
    over_maml.set(xscale="log", xlabel="rho", ylabel="minus MAML of the same seeds, points")
    for panel in (accuracy, over_maml):
        panel.grid(alpha=0.3)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=len(sweep), frameon=False)
    figure.suptitle("Mean over seeds, 95 % t-interval")
    return figure


def _level(panel: Any, mean: Spread, style: dict[str, str]) -> None:
    value, width = 100 * mean.mean, 100 * (mean.half_width or 0.0)
    panel.axhline(value, linestyle="--", **style)
    panel.axhspan(value - width, value + width, color=style["color"], alpha=0.12)


def _points(panel: Any, points: dict[float, Spread], style: dict[str, str]) -> None:
    """Hollow and without an interval where there is one seed."""
    color = style["color"]
    panel.plot(list(points), [100 * point.mean for point in points.values()], color=color, alpha=0.4)
    for x, point in points.items():
        fill = "none" if point.half_width is None else color
        panel.plot(x, 100 * point.mean, "o", color=color, markerfacecolor=fill)
        panel.errorbar(x, 100 * point.mean, 100 * (point.half_width or 0.0), color=color, capsize=3)
    if points:
        panel.plot([], [], "o-", **style)


def _seeds(curve: Curve) -> str:
    counts = sorted({point.accuracy.seeds for point in curve.values()})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " seeds"


def _courses(runs: Runs, name: str, scale: float = 1) -> list[list[float]]:
    """One list a seed, those that have it."""
    return [_column(r["validation"][name], scale) for r in runs.values() if name in r["validation"]]


def _band(panel: Any, x: Sequence[float], courses: list[list[float]], style: dict[str, str]) -> None:
    if courses:
        columns = list(zip(*courses, strict=True))
        panel.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=style["color"], alpha=0.15)
        panel.plot(x, _mean(courses), **style)


def _mean(courses: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*courses, strict=True)]


def _column(values: Sequence[float], scale: float) -> list[float]:
    return [scale * value for value in values]


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, the same bytes for the same numbers."""
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=120, format="png", metadata={"Software": None}))
