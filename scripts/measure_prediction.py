"""What a fitted run is worth on its own test tasks, by the images that give the norm layers' statistics.

python scripts/measure_prediction.py RUN --data-root DIR [--tasks 600] [--queries 5]
python scripts/measure_prediction.py RUN --data-root DIR --ways 10 --shots 5 --steps 3 --only support
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fewshot_asam.classifier import Classifier, load_run
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.training.build import load_data
from fewshot_asam.training.evaluation import interval, paired_difference


def alone(classifier: Classifier, images: Tensor) -> Tensor:
    """Each image by itself, with its own statistics."""
    return torch.cat([classifier.predict_proba(image[None], "together") for image in images])


def joint(classifier: Classifier, images: Tensor) -> Tensor:
    """All images and the support set in one batch."""
    support = classifier.support.float() / 255
    with torch.no_grad():
        return classifier.model(torch.cat([support, images]))[len(support) :]


MODES: dict[str, tuple[str, Callable[[Classifier, Tensor], Tensor]]] = {
    "together": ("all queries (`together`)", lambda own, images: own.predict_proba(images, "together")),
    "joint": ("all queries and the support set", joint),
    "support": ("the support set (`support`, the default)", lambda own, images: own.predict_proba(images, "support")),
    "each": ("the image and the support set (`each`)", lambda own, images: own.predict_proba(images, "each")),
    "alone": ("the image alone", alone),
}


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--ways", type=int)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", choices=MODES, help="one row")
    given = parser.parse_args()
    run = load_run(given.run, "cpu")
    trained = run.origin.config
    ways, shots, steps = (given.ways or trained.ways, given.shots or trained.shots, given.steps or trained.inner_steps)
    data = load_data(replace(trained, data_root=given.data_root, queries=given.queries), torch.device("cpu"))
    sampler = EpisodeSampler(data.test, ways, shots, given.queries)
    chosen = [given.only] if given.only else list(MODES)
    right: dict[str, list[Tensor]] = {name: [] for name in chosen}
    warnings.simplefilter("ignore")  # of heads that are widened
    for _ in range(given.tasks):
        task = sampler.sample(1)
        classifier = run.fit(task.support_x[0], task.support_y[0], steps)
        for name in chosen:
            found = MODES[name][1](classifier, task.query_x[0]).argmax(1)
            right[name].append((found == task.query_y[0]).double().mean())
    said = f"{ways}-way {shots}-shot, {steps} steps, {given.queries} queries a class, {given.tasks} tasks"
    print(f"{run.origin.title}; measured on {said}")
    print("| statistics of | accuracy | minus the first row, paired |\n|---|---|---|")
    first = torch.stack(right[chosen[0]])
    for name in chosen:
        accuracies = torch.stack(right[name])
        print(f"| {MODES[name][0]} | {interval(accuracies)} | {paired_difference(accuracies, first)} |")


if __name__ == "__main__":
    main()
