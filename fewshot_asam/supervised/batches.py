"""Which images a step sees, with which labels and changed how: pure functions of seeds and counts.

So a resumed training needs no state of generators.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4
"""Pixels around an image before a part of it is cut."""


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU whose seed is a digest of the key; near keys have nothing in common."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


def with_noise(labels: Tensor, classes: int, fraction: float, seed: int) -> Tensor:
    """The labels `[n]`, a fraction of them, chosen at random, replaced by one of the other classes (symmetric noise).

    With a smaller fraction and the same seed, a part of the same labels is replaced by the same others.
    """
    draws = generator("noise", seed)
    chosen = torch.randperm(len(labels), generator=draws)
    shifts = torch.randint(1, classes, (len(labels),), generator=draws)
    chosen = chosen[: round(fraction * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shifts[chosen]) % classes
    return noisy


def divided(count: int, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of the images that are trained on, and of those held out."""
    order = torch.randperm(count, generator=generator("holdout", seed))
    kept = count - round(holdout * count)
    return order[:kept].sort().values, order[kept:].sort().values


def train_batch(count: int, size: int, step: int, seed: int) -> Tensor:
    """The indices `[size]` of a step's training batch: each epoch goes through the images in an order of its own."""
    epoch, number = divmod(step, count // size)
    return torch.randperm(count, generator=generator("order", seed, epoch))[number * size : (number + 1) * size]


def val_batch(count: int, size: int, step: int, seed: int) -> Tensor:
    """The indices `[size]` of Agnostic-SAM's validation batch, drawn anew for each step."""
    return torch.randperm(count, generator=generator("validation batch", seed, step))[:size]


def augmented(images: Tensor, moved: bool, cutout: int, draws: torch.Generator) -> Tensor:
    """Float images `[n, C, H, W]`: `moved` and flipped, and a square of `cutout` pixels replaced by zeros."""
    n, _, height, width = images.shape
    found = _moved(images, draws) if moved else images
    return found * _outside_a_square(n, height, width, cutout, draws).to(images.device) if cutout else found


def _moved(images: Tensor, draws: torch.Generator) -> Tensor:
    """Padded by zeros, a part of the old size cut at random, flipped in half of the cases; in channels-last memory."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * PADDING + 1, (2, n, 1), generator=draws).to(device)
    flipped = torch.randint(2, (n, 1), generator=draws).to(device).bool()
    rows = top + torch.arange(height, device=device)
    across = torch.arange(width, device=device)
    columns = left + torch.where(flipped, across.flip(0), across)
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    which = torch.arange(n, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _outside_a_square(n: int, height: int, width: int, side: int, draws: torch.Generator) -> Tensor:
    """1 outside a square of that side around a random pixel, 0 within it; `[n, 1, H, W]` (DeVries & Taylor 2017)."""
    y = torch.randint(height, (n, 1), generator=draws)
    x = torch.randint(width, (n, 1), generator=draws)
    rows, columns = torch.arange(height) - y, torch.arange(width) - x
    low, high = -(side // 2), side - side // 2
    inside = ((low <= rows) & (rows < high))[:, :, None] & ((low <= columns) & (columns < high))[:, None, :]
    return (~inside).float()[:, None]
