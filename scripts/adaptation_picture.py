"""Draw the README's picture: one test episode of glyphs before and after adaptation, and accuracy step by step.

python scripts/adaptation_picture.py docs/adaptation.png

Meta-trains a Conv4 by Agnostic-SAM on the embedded dataset (some minutes on two CPU cores), then shows the first test
episode of seed 0, whatever comes of it, and the mean over 200 test episodes.
"""

from __future__ import annotations

import argparse

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from fewshot_asam import Conv4, Dataset, Episodes, EpisodeSampler, MetaAgnosticSAM, load_dataset

WAYS, SHOTS, QUERIES, STEPS, INNER_LR, TASKS, MOST_STEPS = 5, 1, 5, 3, 0.2, 200, 5
SHOWN = 2
"""Queries of each class in the picture."""
RIGHT, WRONG = "#2a7f3f", "#c0392b"


def trained(dataset: Dataset, iterations: int) -> MetaAgnosticSAM:
    """A learner that adapts in `STEPS` steps, meta-trained by Adam."""
    torch.manual_seed(0)
    learner = MetaAgnosticSAM(Conv4(WAYS, dataset.train.shape), lr=INNER_LR, rho=5e-4, zero_head=True)
    sampler = EpisodeSampler(dataset.train, WAYS, SHOTS, QUERIES, seed=0)
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        optimizer.zero_grad()
        out = learner.meta_loss(sampler.sample(4), steps=STEPS)
        out.loss.backward()
        optimizer.step()
        schedule.step()
        if (iteration + 1) % 50 == 0:
            print(f"{iteration + 1}/{iterations}: accuracy {float(out.accuracy.mean()):.2f}", flush=True)
    return learner.eval()


def picture(learner: MetaAgnosticSAM, dataset: Dataset, path: str) -> None:
    """Draws the episode on the left and the curve on the right."""
    with torch.no_grad():
        episodes = EpisodeSampler(dataset.test, WAYS, SHOTS, QUERIES, seed=0).sample(TASKS)
        accuracies = torch.stack([learner.meta_loss(episodes, steps=n).accuracy for n in range(MOST_STEPS + 1)])
        guesses = [learner.meta_loss(episodes[:1], steps=n).logits[0].argmax(-1) for n in (0, STEPS)]
    figure = plt.figure(figsize=(9.6, 3.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    axes = left.subplots(2 * SHOWN + 1, WAYS)
    _draw_episode(axes, episodes, guesses)
    _draw_curve(right.subplots(), 100 * accuracies)
    figure.savefig(path, dpi=150)
    print(", ".join(f"{n} steps: {100 * float(row.mean()):.1f} %" for n, row in enumerate(accuracies)))


def _draw_episode(axes: list[list[Axes]], episodes: Episodes, guesses: list[Tensor]) -> None:
    support, queries = episodes.support_x[0, :, 0], episodes.query_x[0, :, 0]
    for way in range(WAYS):
        _draw_image(axes[0][way], support[way], "black", f"class {way + 1}")
        for row in range(2 * SHOWN):
            query = way * QUERIES + row % SHOWN
            guess = int(guesses[row // SHOWN][query])
            _draw_image(axes[1 + row][way], queries[query], RIGHT if guess == way else WRONG, f"class {guess + 1}?")
    for row, text in ((0, "support"), (1, "queries,\nbefore"), (1 + SHOWN, f"queries,\nafter {STEPS} steps")):
        axes[row][0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def _draw_image(axis: Axes, image: Tensor, colour: str, title: str) -> None:
    axis.imshow(1 - image, cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8, color=colour, pad=2)
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=1.5)


def _draw_curve(axis: Axes, accuracies: Tensor) -> None:
    """`accuracies`: percent, `[steps, tasks]`."""
    steps, mean = range(len(accuracies)), accuracies.mean(1)
    half = 1.96 * accuracies.std(1) / accuracies.shape[1] ** 0.5
    axis.fill_between(steps, mean - half, mean + half, alpha=0.25, linewidth=0)
    axis.plot(steps, mean, marker="o", markersize=4)
    axis.axhline(100 / WAYS, color="grey", linestyle=":", linewidth=1)
    axis.text(MOST_STEPS, 100 / WAYS + 1, "chance", ha="right", va="bottom", fontsize=8, color="grey")
    axis.axvline(STEPS, color="grey", linestyle=":", linewidth=1)
    axis.text(STEPS + 0.1, 45, f"meta-trained\nfor {STEPS} steps", fontsize=8, color="grey")
    axis.set(xlabel="inner steps", ylabel="query accuracy, %", ylim=(0, 100), xticks=list(steps))
    axis.set_title(f"{accuracies.shape[1]} test tasks, {WAYS}-way {SHOTS}-shot, 95 % interval", fontsize=9)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the picture, a PNG file")
    parser.add_argument("--iterations", type=int, default=200, help="meta-batches of 4 tasks (default: 200)")
    given = parser.parse_args()
    matplotlib.use("Agg")
    dataset = load_dataset("glyphs")
    picture(trained(dataset, given.iterations), dataset, given.path)


if __name__ == "__main__":
    main()
