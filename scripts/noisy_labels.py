"""Runs a plan of supervised trainings, one cell after another, and writes its page.

python scripts/noisy_labels.py run experiments/supervised/noisy_labels.yaml --data-root DATA [--core-minutes 75]
python scripts/noisy_labels.py page experiments/supervised/noisy_labels.yaml

A cell is one arm with one seed. What is done stands in `results/<plan>.jsonl`; a cell that was stopped goes on from its
checkpoint in `runs/<plan>/`. Both commands can be repeated at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.runner import commit
from fewshot_asam.runtime.allocator import keep_freed_memory
from fewshot_asam.runtime.signals import Stop
from fewshot_asam.runtime.yaml_settings import read_yaml
from fewshot_asam.supervised.config import ClassifierConfig, from_plain, plain
from fewshot_asam.supervised.loop import train_classifier
from fewshot_asam.training.metrics import read_metrics
from fewshot_asam.version import __version__

OF_A_PLACE = ("data_root", "output_dir", "device")
"""Settings that a cell's name does not depend on."""


@dataclass(frozen=True)
class Cell:
    """One training of a plan: the settings of an arm with a seed."""

    config: ClassifierConfig

    @property
    def name(self) -> str:
        """The title and a digest of the settings, so that arms of the same settings are one cell."""
        settings = {name: value for name, value in plain(self.config).items() if name not in OF_A_PLACE}
        return f"{self.config.title}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def cells(plan: Mapping[str, Any], origin: str) -> Iterator[tuple[str, str, int, Cell]]:
    """Section, arm, seed and cell, in the order in which they are run: all arms of a seed, then the next seed."""
    for section in plan["sections"]:
        for seed in plan["seeds"]:
            for arm, own in section["arms"].items():
                settings = {**plan["base"], **section["settings"], **own, "seed": seed, "noise_seed": seed}
                yield section["title"], arm, seed, Cell(from_plain(settings, f"{origin}: {arm}"))


def run(plan_file: Path, data_root: Path, runs: Path, results: Path, core_minutes: float) -> None:
    """Trains what is not in the ledger yet, until this process has computed for so many minutes."""
    file, folder = results / f"{plan_file.stem}.jsonl", runs / plan_file.stem
    commit()
    with Stop() as stop:
        for section, arm, seed, cell in cells(read_yaml(plan_file, 6), str(plan_file)):
            if cell.name in {record["cell"] for record in ledger.read(file)}:
                continue
            if time.process_time() > 60 * core_minutes:
                print(f"{core_minutes:g} core minutes are spent; the same command goes on", flush=True)
                return
            print(f"{section}, {arm}, seed {seed}", flush=True)
            output = folder / cell.name
            config = replace(cell.config, data_root=data_root, output_dir=output)
            started = time.process_time()
            summary = train_classifier(config, resume=(output / "config.yaml").exists(), stop=stop)
            ledger.append(file, record_of(cell, summary, output, time.process_time() - started))


def record_of(cell: Cell, summary: Mapping[str, Any], folder: Path, core_seconds: float) -> dict[str, Any]:
    """What the ledger keeps of a cell."""
    settings = {name: value for name, value in plain(cell.config).items() if name not in OF_A_PLACE}
    names = ("test_accuracy", "test_ci95", "last_test_accuracy", "last_test_ci95", "best_epoch", "val_accuracy")
    names += ("test_images", "train_images", "steps", "gradients", "device", "wall_seconds")
    rows = read_metrics(folder)
    course = {name: [round(row[name], 5) for row in rows] for name in ("train_loss", "train_accuracy", "val_accuracy")}
    return {
        "cell": cell.name,
        "commit": commit(),
        "versions": {"package": __version__, "torch": torch.__version__},
        "settings": settings,
        **{name: summary[name] for name in names},
        "core_seconds": round(core_seconds, 1),
        "threads": torch.get_num_threads(),
        "course": course,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run",))
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("cifar-10-half.zip"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--core-minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    keep_freed_memory()
    run(given.plan, given.data_root, given.runs, given.results, given.core_minutes)


if __name__ == "__main__":
    main()
