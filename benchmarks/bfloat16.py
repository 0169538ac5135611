"""What bfloat16 convolutions gain on a CPU and cost in exactness: processor time of one thread, and the meta-gradient.

*Cosine* is that of the meta-gradients in bfloat16 and in float32, at initial weights on random images. Four tasks each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import table
from benchmarks.learn2learn_reference import LR
from benchmarks.presets import PRESETS, Preset, episodes
from fewshot_asam import MAML
from fewshot_asam.engine.precision import Precision, precision
from fewshot_asam.models import build_model
from fewshot_asam.runtime.allocator import keep_freed_memory

TASKS = 4
NAMES: tuple[Precision, ...] = tuple(name for name in get_args(Precision) if name != "tf32")


def measure(preset: Preset, rounds: int) -> dict[str, float]:
    """Seconds of both precisions, medians of rounds in turn, their ratio, and the cosine of the meta-gradients."""
    model = build_model("conv4", preset.ways, preset.image_shape, preset.hidden, seed=0)
    learner, batch = MAML(model, LR, engine="loop"), episodes(preset)[slice(0, TASKS)]
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    gradients: dict[str, Tensor] = {}
    for _ in range(1 + rounds):
        for name in NAMES:
            learner.zero_grad()
            started = time.process_time()
            with precision(name, torch.device("cpu")):
                learner.meta_backward(batch, preset.steps)
            seconds[name].append(time.process_time() - started)
            found = [value.grad for value in learner.parameters() if value.grad is not None]
            gradients[name] = torch.cat([value.flatten() for value in found]).double()
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    cosine = torch.cosine_similarity(gradients["float32"], gradients["bfloat16"], dim=0).item()
    return {**medians, "times as fast": medians["float32"] / medians["bfloat16"], "cosine": cosine}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    options = table.parser("bfloat16", __doc__, rounds=5).parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    report = table.Report("cpu")
    rows = [{"preset": name, **measure(PRESETS[name], options.rounds)} for name in options.presets]
    report.data["bfloat16"] = report.tables["bfloat16, s"] = rows
    return report.finish(options.output)


if __name__ == "__main__":
    table.command("bfloat16", main)
