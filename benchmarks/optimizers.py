"""What a step of each optimizer costs over one of SGD: processor time of one thread, medians of rounds in turn.

A batch of 128 random images of 32 pixels in 10 classes, and a quarter of it as Agnostic-SAM's validation batch.
*Gradients* counts those of a training batch; what a step takes beyond them is the arithmetic on the parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import table
from fewshot_asam.runtime.allocator import keep_freed_memory
from fewshot_asam.supervised.config import ClassifierConfig
from fewshot_asam.supervised.networks import build_network
from fewshot_asam.supervised.optimizers import build_optimizer, step

NAMES = ("sgd", "sam", "friendly_sam", "agnostic_sam")
NETWORKS = {"small": 4, "resnet": 20}
"""By name, with their depth."""
SHAPE, CLASSES, BATCH = (3, 32, 32), 10, 128


def stepper(network: str, name: str) -> Callable[[], None]:
    """A function that takes one step of that optimizer."""
    config = ClassifierConfig(optimizer=name, model=network, depth=NETWORKS[network], batch_size=BATCH)  # type: ignore[arg-type]
    model = build_network(network, config.depth, config.width, SHAPE, CLASSES, seed=0)
    optimizer = build_optimizer(config, model.parameters())
    images, labels = torch.rand(BATCH, *SHAPE), torch.arange(BATCH) % CLASSES

    def closure(count: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[:count]), labels[:count])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return evaluate

    return lambda: step(optimizer, closure(BATCH), closure(config.val_batch_size))


def measure(network: str, rounds: int) -> list[table.Row]:
    """Seconds of a step of each optimizer, and times SGD's."""
    steppers = {name: stepper(network, name) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(1 + rounds):
        for name, take in steppers.items():
            started = time.process_time()
            take()
            seconds[name].append(time.process_time() - started)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    return [
        {
            "network": network,
            "optimizer": name,
            "gradients": ClassifierConfig(optimizer=name).gradients_a_step,  # type: ignore[arg-type]
            "step, s": medians[name],
            "times SGD's": medians[name] / medians["sgd"],
        }
        for name in NAMES
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--rounds", type=table.count, default=20, help="timed steps of each optimizer (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(1)
    report = table.Report("cpu")
    rows = [row for network in options.networks for row in measure(network, options.rounds)]
    report.data["optimizers"] = report.tables["a step, s"] = rows
    return report.finish(options.output)


if __name__ == "__main__":
    table.command("optimizers", main)
