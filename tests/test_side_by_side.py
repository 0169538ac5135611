"""Tasks side by side in forks of this process: the numbers of one process, whatever happens to the forks."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import own_parts
from conftest import make_images
from fewshot_asam import FewShotError
from fewshot_asam.engine.side_by_side import SideBySide
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.training.evaluation import evaluate
from problems import RULES, SHAPE, deviation, episodes, made_learner

TASKS = 5


def learner(rule: str = "maml", **options: Any) -> MetaLearner:
    return made_learner(build_model("conv4", 3, SHAPE, 4, seed=0).double(), 0.1, rule, **{"engine": "loop", **options})


def results(one: MetaLearner, seed: int = 0, **options: Any) -> list[Tensor]:
    """All that `meta_backward` gives, on top of gradients that are there already."""
    for value in one.parameters():
        value.grad = torch.full_like(value, 1e-3)
    generator = torch.Generator().manual_seed(seed)
    out = one.meta_backward(episodes(tasks=TASKS, seed=seed), 2, generator, **options)
    grads = [value.grad for value in one.parameters() if value.grad is not None]
    return [*out, *grads]


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("rule", ["maml", "agnostic_sam", "agnostic_sam first order"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_numbers_are_those_of_one_process_bit_for_bit(rule: str, count: int) -> None:
    one = learner(rule, validation="augment")
    expected = [results(one, seed) for seed in range(2)]
    with one.side_by_side(count):
        assert len(children()) == count - 1
        assert all(same(results(one, seed), expected[seed]) for seed in range(2))
    assert children() == []


print(
    RULES.keys()
    and [
        os,
        signal,
        warnings,
        Iterator,
        nn,
        own_parts,
        make_images,
        FewShotError,
        SideBySide,
        EpisodeSampler,
        evaluate,
        deviation,
    ]
)
