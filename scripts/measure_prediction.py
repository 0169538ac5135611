"""Which images should give the norm layers' statistics when few are predicted? Accuracies on a run's own test tasks.

python scripts/measure_prediction.py RUN [--data-root DIR] [--tasks 600] [--queries 5]
"""

from __future__ import annotations

import argparse
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


def with_support(classifier: Classifier, images: Tensor) -> Tensor:
    """All images and the support set in one batch."""
    support = classifier.support.float() / 255
    with torch.no_grad():
        return classifier.model(torch.cat([support, images]))[len(support) :]


MODES: dict[str, Callable[[Classifier, Tensor], Tensor]] = {
    "the image alone": alone,
    "the image and the support set (`each`)": lambda own, images: own.predict_proba(images, "each"),
    "the support set alone (`support`)": lambda own, images: own.predict_proba(images, "support"),
    "all queries (`together`)": lambda own, images: own.predict_proba(images, "together"),
    "all queries and the support set": with_support,
}


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--tasks", type=int, default=600)
    parser.add_argument("--queries", type=int, default=5)
    given = parser.parse_args()
    run = load_run(given.run, "cpu")
    config = replace(run.origin.config, data_root=given.data_root, queries=given.queries)
    images = load_data(config, torch.device("cpu")).test
    sampler = EpisodeSampler(images, config.ways, config.shots, config.queries)
    right: dict[str, list[Tensor]] = {name: [] for name in MODES}
    for _ in range(given.tasks):
        task = sampler.sample(1)
        classifier = run.fit(task.support_x[0], task.support_y[0])
        for name, mode in MODES.items():
            found = mode(classifier, task.query_x[0]).argmax(1)
            right[name].append((found == task.query_y[0]).double().mean())
    print(
        f"{config.dataset}, {config.ways}-way {config.shots}-shot, {given.queries} queries a class, {given.tasks} tasks"
    )
    print("| statistics of | accuracy | minus `together`, paired |\n|---|---|---|")
    reference = torch.stack(right["all queries (`together`)"])
    for name, values in right.items():
        accuracies = torch.stack(values)
        print(f"| {name} | {interval(accuracies)} | {paired_difference(accuracies, reference)} |")


if __name__ == "__main__":
    main()
