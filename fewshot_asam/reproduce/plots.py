"""The page's figures: accuracy while training, and against the radius."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fewshot_asam.checkpoint import write_atomically
from fewshot_asam.reproduce.found import Family, Found, Runs, look_up, sweeps
from fewshot_asam.reproduce.ledger import Record
from fewshot_asam.reproduce.plan import Plan, Section


def draw(plans: Sequence[Plan], records: Mapping[str, Record], folder: Path) -> None:
    """Writes all figures that the ledger has numbers for."""
    for plan in plans:
        for found in (look_up(section, records) for section in plan.sections):
            if has_curves(found):
                _save(_curves(found), folder / curves_name(plan, found.section))
        for name, group in sweep_names(plan, sweeps(plan, records)).items():
            _save(_radii(group), folder / name)


def has_curves(found: Found) -> bool:
    """Whether there is a course of validation to draw."""
    return bool(found.runs)


def curves_name(plan: Plan, section: Section) -> str:
    """The file of a section's curves."""
    words = re.findall(r"[a-z0-9.]+", section.title.lower())
    return f"{plan.name}-{'-'.join(words)}.png"


def sweep_names(plan: Plan, groups: Sequence[dict[str, Family]]) -> dict[str, dict[str, Family]]:
    """The files of a plan's radius sweeps, and what each shows."""
    return {f"{plan.name}-radii-{number}.png": group for number, group in enumerate(groups, 1)}


def _curves(found: Found) -> Figure:
    """Validation accuracy against iterations and minutes, the seeds' mean and range; then congruence, if recorded."""
    congruence = any("congruence_before" in r["validation"] for runs in found.runs.values() for r in runs.values())
    figure = Figure(figsize=(10, 8 if congruence else 4), layout="constrained")
    panels = figure.subplots(2 if congruence else 1, 2, squeeze=False)
    for number, (rule, runs) in enumerate(found.runs.items()):
        style = {"color": f"C{number}", "label": f"{rule} (n = {len(runs)})"}
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
    figure.suptitle(f"{found.section.title}: mean and range over seeds")
    return figure


def _radii(group: dict[str, Family]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for number, (name, family) in enumerate(sorted(group.items())):
        if set(family) == {0.0}:
            panel.axhline(100 * family[0.0].mean, color="black", linestyle="--", label=name)
            continue
        radii = sorted(family)
        widths = [100 * (family[radius].half_width or 0) for radius in radii]
        means = [100 * family[radius].mean for radius in radii]
        panel.errorbar(radii, means, widths, color=f"C{number}", marker="o", capsize=3, label=name)
    panel.set(xscale="log", xlabel="rho", ylabel="test accuracy, %", title="mean over seeds, 95 % t-interval")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


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


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda scratch: figure.savefig(scratch, dpi=120, format="png", metadata={"Software": None}))
