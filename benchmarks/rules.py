"""Sharp-MAML_low and Agnostic-SAM: ours against their eager transcription in learn2learn's style.

Also what a rule costs over MAML on our own engine, with and without a meta-gradient through the perturbation.
`--check` times nothing: it compares the meta-gradients of all rivals with ours, from the same weights, in float64 and
in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import interleave, table
from benchmarks.baselines import Contestant, deviation
from benchmarks.peer_packages import require
from benchmarks.presets import PRESETS

RULES = ("sharp_maml_low", "agnostic_sam")
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Of meta-gradients; in float32 the two sides round differently, and max-pooling and ReLU have kinks."""
RADII = (5e-4, 5e-2)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    parser = table.parser("rules", __doc__)
    parser.add_argument("--check", action="store_true", help="compare meta-gradients, on the smoke preset")
    options = parser.parse_args(argv)
    require("learn2learn")
    report = table.Report(options.device)
    if options.check:
        report.data["deviations"] = report.tables["deviations"] = check(options.engine)
        return report.finish(options.output)
    for name in options.presets:
        print(f"{name}: {PRESETS[name].text}", file=sys.stderr)
        for contestants, pairs, form in _comparisons(options.engine):
            times = interleave.measure(
                contestants, PRESETS[name], form=form, device=options.device, rounds=options.rounds
            )
            report.add(name, form, times, pairs)
    return report.finish(options.output)


Comparison = tuple[dict[str, Contestant], list[tuple[str, str]], str]


def _comparisons(engine: str) -> list[Comparison]:
    """Contestants, the pairs of them whose ratio is wanted, and the form."""
    found: list[Comparison] = []
    for rule in RULES:
        us, them = f"ours, {rule}", f"transcription, {rule}"
        pair = {us: Contestant("ours", rule, engine=engine), them: Contestant("transcription", rule)}
        found += [(pair, [(them, us)], form) for form in interleave.FORMS]
    own = {"ours, maml": Contestant("ours", engine=engine)}
    for rule in RULES:
        own[f"ours, {rule}"] = Contestant("ours", rule, engine=engine)
        own[f"ours, {rule}, constant"] = Contestant("ours", rule, through_perturbation=False, engine=engine)
    return [*found, (own, [(name, "ours, maml") for name in own if name != "ours, maml"], "one process")]


def check(engine: str) -> list[table.Row]:
    """The largest deviation of each rival's meta-gradient; raises `WorkerError` where it is not rounding."""
    rivals = [Contestant("learn2learn"), Contestant("transcription")]
    rivals += [Contestant("transcription", rule, rho) for rule in RULES for rho in RADII]
    rows: list[table.Row] = []
    for one in rivals:
        found = {str(dtype): deviation(one, PRESETS["smoke"], dtype, engine) for dtype in TOLERANCES}
        rows.append({"rival": one.author, "rule": one.rule, "rho": one.rho, **found})
    if wrong := [row for row in rows if not all(row[str(dtype)] < most for dtype, most in TOLERANCES.items())]:
        raise interleave.WorkerError(f"meta-gradients differ from ours: {wrong}")
    return rows


if __name__ == "__main__":
    table.command("rules", main)
