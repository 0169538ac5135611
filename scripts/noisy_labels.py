"""Runs a plan of supervised trainings, one cell after another, and writes its page.

python scripts/noisy_labels.py run experiments/supervised/noisy_labels.yaml --data-root DATA [--core-minutes 75]
python scripts/noisy_labels.py page experiments/supervised/noisy_labels.yaml

A cell is one arm with one seed. What is done stands in `results/supervised/<plan>.jsonl`; a cell that was stopped goes
on from its checkpoint in `runs/<plan>/`. Both commands can be repeated at any time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats

from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.inference import holm
from fewshot_asam.reproduce.runner import commit
from fewshot_asam.reproduce.statistics import over_seeds
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
    names: tuple[str, ...] = (
        "test_accuracy",
        "test_ci95",
        "last_test_accuracy",
        "last_test_ci95",
        "best_epoch",
        "val_accuracy",
    )
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


ABOUT = """\
# Noisy labels: SAM and Agnostic-SAM as optimizers, at a size for a CPU

The paper's largest gap is in its Table 5: CIFAR-10 with 80 % of the labels replaced, SAM 61.69, Agnostic-SAM 70.02. It
trains a ResNet32 on 50,000 images for 200 epochs. This page asks whether the order shows in much smaller trainings:
a network of 24,346 parameters, 22,500 images, about 10 epochs, one CPU core. So few epochs cannot learn wrong labels by
heart, which is what the paper's methods are to prevent. **A small difference here says little about the paper's
setting.** All settings were fixed in the plan before the first run.

- Accuracy: on CIFAR-10's 10,000 test images with their true labels, in percent, as mean ± half width of the 95 %
  t-interval over the seeds. A seed draws the weights, the noise, the order and the held-out images.
- *last*: after the last epoch; this is what is compared. *best*: of the epoch with the best accuracy on 2,500 held-out
  training images, whose labels are as noisy as the others.
- *gradients*: of a training batch, for each image. Agnostic-SAM's validation batch counts by its size.
- Differences are paired by seed. *p* is of a two-sided t-test over the seeds; *Holm* is that p corrected for all
  differences on this page that have all their seeds. With three seeds even a clear difference may stay undecided.
"""


class Difference(NamedTuple):
    """One arm minus another, in points, by seed."""

    section: str
    kind: str
    first: str
    second: str
    values: tuple[float, ...]

    @property
    def p(self) -> float:
        """Of a two-sided t-test over the seeds; not a number for one seed."""
        if len(self.values) < 2:
            return math.nan
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)


def page(plan_file: Path, results: Path) -> str:
    """The page of a plan: what was run, with what outcome, and what was not."""
    plan: dict[str, Any] = read_yaml(plan_file, 6)
    file = results / f"{plan_file.stem}.jsonl"
    records = {record["cell"]: record for record in ledger.read(file)}
    planned = list(cells(plan, str(plan_file)))
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for section, arm, seed, cell in planned:
        if cell.name in records:
            found.setdefault((section, arm), {})[seed] = records[cell.name]
    differences = list(_differences(plan, found))
    whole = [one for one in differences if len(one.values) == len(plan["seeds"])]
    corrected = dict(zip(whole, holm([one.p for one in whole]), strict=True))
    lines = [ABOUT, _answer(corrected), "", *_done(planned, records, plan_file)]
    for section in plan["sections"]:
        arms = {arm: found[section["title"], arm] for arm in section["arms"] if (section["title"], arm) in found}
        if arms:
            lines += [f"## {section['title']}", "", *_table(arms), ""]
            lines += _compared([one for one in differences if one.section == section["title"]], corrected)
    return "\n".join(lines).rstrip() + "\n"


def _answer(corrected: Mapping[Difference, float]) -> str:
    """What the differences that have all their seeds say, in a sentence."""
    if not corrected:
        return "**Answer: none yet.** No comparison has all its seeds, and a single seed decides nothing."
    clear = [(one, sum(one.values) / len(one.values)) for one, p in corrected.items() if p < 0.05]
    if not clear:
        return f"**Answer: undecided.** None of {len(corrected)} comparisons is clear after the correction."
    which = "" if any(mean > 0 for _, mean in clear) else " In each the one named first is behind."
    said = [f"{one.first} − {one.second} ({one.section}, {one.kind}): {mean:.2f} points" for one, mean in clear]
    return f"**Answer: {len(clear)} of {len(corrected)} comparisons are clear.**{which} {'; '.join(said)}."


def _differences(plan: Mapping[str, Any], found: Mapping[tuple[str, str], Mapping[int, Any]]) -> Iterator[Difference]:
    for section in plan["sections"]:
        title = section["title"]
        for kind, pairs in section["differences"].items():
            for first, second in pairs:
                a, b = found.get((title, first), {}), found.get((title, second), {})
                seeds = sorted(a.keys() & b.keys())
                values = tuple(100 * (a[s]["last_test_accuracy"] - b[s]["last_test_accuracy"]) for s in seeds)
                if values:
                    yield Difference(title, kind, first, second, values)


def _done(planned: Sequence[Any], records: Mapping[str, Any], plan_file: Path) -> Iterator[str]:
    """How much of the plan was run, where, and by which commands."""
    names = {cell.name for _, _, _, cell in planned}
    done = [records[name] for name in sorted(names & records.keys())]
    missing: dict[str, int] = {}
    for section, _, _, cell in planned:
        missing[section] = missing.get(section, 0) + (cell.name not in records)
    left = [f"{section} ({count})" for section, count in missing.items() if count]
    yield f"{len(done)} of {len(names)} trainings of the plan `{plan_file.parent.name}/{plan_file.name}` were run."
    if done:
        minutes = sum(record["core_seconds"] for record in done) / 60
        devices, threads = ({record[name] for record in done} for name in ("device", "threads"))
        commits = ", ".join(sorted({record["commit"] for record in done}))
        yield (
            f"They took {minutes:.0f} core minutes on {', '.join(sorted(devices))}, {max(threads)} thread, at "
            f"{commits}, torch {done[0]['versions']['torch']}."
        )
    if left:
        yield f"**Not run** (how many trainings, those that sections share in each): {'; '.join(left)}."
    yield ""
    yield "```"
    yield f"python scripts/noisy_labels.py run experiments/supervised/{plan_file.name} --data-root cifar-10-half.zip"
    yield f"python scripts/noisy_labels.py page experiments/supervised/{plan_file.name}"
    yield "```"
    yield ""


def _table(arms: Mapping[str, Mapping[int, Any]]) -> Iterator[str]:
    yield "| arm | epochs | gradients | seeds | last | best |"
    yield "|---|---|---|---|---|---|"
    for arm, by_seed in arms.items():
        records = list(by_seed.values())
        settings, one = records[0]["settings"], records[0]
        gradients = one["gradients"] / one["steps"] * settings["epochs"]
        shown = [over_seeds([record[name] for record in records]) for name in ("last_test_accuracy", "test_accuracy")]
        yield f"| {arm} | {settings['epochs']} | {gradients:g} | {len(records)} | {shown[0]} | {shown[1]} |"


def _compared(differences: Sequence[Difference], corrected: Mapping[Difference, float]) -> Iterator[str]:
    if not differences:
        return
    yield "| last, in points | | seeds | difference | p | Holm |"
    yield "|---|---|---|---|---|---|"
    for one in differences:
        spread = over_seeds([value / 100 for value in one.values])
        p = "" if math.isnan(one.p) else f"{one.p:.3f}"
        holm_p = f"{corrected[one]:.3f}" if one in corrected else "not all seeds"
        yield f"| {one.first} − {one.second} | {one.kind} | {len(one.values)} | {spread} | {p} | {holm_p} |"
    yield ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("cifar-10-half.zip"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results/supervised"))
    parser.add_argument("--core-minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    if given.what == "page":
        target = given.results / f"{given.plan.stem}.md"
        target.write_text(page(given.plan, given.results), encoding="utf-8")
        print(target)
        return
    keep_freed_memory()
    run(given.plan, given.data_root, given.runs, given.results, given.core_minutes)


if __name__ == "__main__":
    main()
