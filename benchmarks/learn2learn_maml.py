"""One second-order MAML meta-gradient: ours against learn2learn's `MAML` on its own `CNN4`, on the same tensors.

Both start from the same weights (learn2learn's `CNN4` has a dead bias in each convolution more, and its norm layers
move running statistics), and their losses are compared as they are timed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import interleave, table
from benchmarks.baselines import Contestant
from benchmarks.peer_packages import require
from benchmarks.presets import PRESETS

META_BATCHES = 60_000
"""Of the published protocol."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    options = table.parser("learn2learn_maml", __doc__).parse_args(argv)
    require("learn2learn")
    contestants = {"ours": Contestant("ours", engine=options.engine), "learn2learn": Contestant("learn2learn")}
    report = table.Report(options.device)
    for name in options.presets:
        print(f"{name}: {PRESETS[name].text}", file=sys.stderr)
        for form in interleave.FORMS:
            times = interleave.measure(
                contestants, PRESETS[name], form=form, device=options.device, rounds=options.rounds
            )
            result = report.add(name, form, times, [("learn2learn", "ours")])
            if options.device == "cuda":
                hours = {who: META_BATCHES * median(one.seconds) / 3600 for who, one in times.items()}
                result[f"hours_of_{META_BATCHES}"] = hours
                row = {"preset": name, "form": form, **hours}
                report.tables.setdefault("hours", []).append(row)
    if options.device == "cuda":
        print(f"the last table: hours that {META_BATCHES:,} meta-gradients take", file=sys.stderr)
    return report.finish(options.output)


if __name__ == "__main__":
    table.command("learn2learn_maml", main)
