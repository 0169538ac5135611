"""Accuracies, their intervals and paired comparison."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from conftest import make_images
from fewshot_asam import MAML, Episodes, EpisodeSampler, FewShotError, MetaAgnosticSAM, MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.training.evaluation import TASKS_AT_ONCE, evaluate, interval, paired_difference


def test_the_interval_holds_the_truth_in_95_of_100_samples() -> None:
    draws = torch.rand(4000, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hits = sum(abs(mean - 0.5) <= half for mean, half in map(interval, draws)) / len(draws)
    assert abs(hits - 0.95) < 0.015
    assert interval(draws[0]).half_width == pytest.approx(norm.ppf(0.975) * draws[0].std().item() / 200**0.5, rel=1e-4)


def test_an_interval_reads_as_percent() -> None:
    assert str(interval(torch.tensor([0.5, 0.7, 0.9, 0.7]))) == "70.0 % ± 16.0"


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    tasks = torch.rand(500, generator=torch.Generator().manual_seed(0))
    noise = 0.01 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    mean, half = paired_difference(tasks + 0.02 + noise, tasks)
    assert mean == pytest.approx(0.02, abs=2e-3)
    assert half < 0.002 < interval(tasks).half_width


def test_too_few_or_other_tasks_are_refused() -> None:
    with pytest.raises(FewShotError, match="at least 2"):
        interval(torch.tensor([0.5]))
    with pytest.raises(FewShotError, match="3 and 2 tasks"):
        paired_difference(torch.zeros(3), torch.zeros(2))


def test_augmented_learners_are_tested_on_the_same_tasks() -> None:
    """Augmentation draws from a generator of its own: with a radius of 0 it changes nothing, task by task."""
    model, images = build_model("conv4", 3, (1, 16, 16), 4, seed=0), make_images(12, 8, (1, 16, 16), 0)
    learners = [MetaAgnosticSAM(model, 0.4, rho=0.0, validation=v) for v in ("duplicate", "augment")]
    tasks = 3 * TASKS_AT_ONCE
    found = [evaluate(learner, EpisodeSampler(images, 3, 1, 2, seed=5), tasks, 1) for learner in learners]
    assert torch.allclose(*found)


def test_evaluation_is_the_meta_loss_on_the_samplers_tasks() -> None:
    images = make_images(12, 8, (1, 16, 16), 0)
    learner = MAML(build_model("conv4", 3, (1, 16, 16), 4, seed=0), 0.4)
    found = evaluate(learner, EpisodeSampler(images, 3, 1, 2, seed=5), TASKS_AT_ONCE + 3, 2)
    sampler = EpisodeSampler(images, 3, 1, 2, seed=5)
    expected = [learner.meta_loss(sampler.sample(tasks), 2).accuracy for tasks in (TASKS_AT_ONCE, 3)]
    assert torch.equal(found, torch.cat(expected))
    assert not torch.equal(found, evaluate(learner, EpisodeSampler(images, 3, 1, 2, seed=6), TASKS_AT_ONCE + 3, 2))


def sampler() -> EpisodeSampler:
    return EpisodeSampler(make_images(12, 8, (1, 16, 16), 0), 3, 1, 4, seed=5)


def probabilities(learner: MetaLearner, episodes: Episodes, task: int, order: tuple[int, ...]) -> Tensor:
    """Adapts with the classes numbered anew, one by one; the probabilities of the classes as they were."""
    new = {old: order[old] for old in range(3)}
    labels = torch.tensor([new[int(label)] for label in episodes.support_y[task]])
    adapted = learner.clone().adapt(lambda net: F.cross_entropy(net(episodes.support_x[task]), labels), 2)
    logits = adapted(episodes.query_x[task]).detach().double()
    return torch.stack([logits.softmax(-1)[:, new[old]] for old in range(3)], 1)


@pytest.mark.parametrize("permutations", [1, 6])
@pytest.mark.parametrize("members", [1, 2])
def test_ensembles_and_permutations_by_hand(members: int, permutations: int) -> None:
    learners = [MAML(build_model("conv4", 3, (1, 16, 16), 4, seed=seed), 0.4) for seed in range(members)]
    found = evaluate(learners, sampler(), 6, 2, permutations=permutations)
    orders = list(itertools.permutations(range(3)))[:permutations]
    episodes = sampler().sample(6)
    for task in range(6):
        parts = [probabilities(learner, episodes, task, order) for learner in learners for order in orders]
        right = torch.stack(parts).mean(0).argmax(-1) == episodes.query_y[task]
        assert found[task].item() == pytest.approx(right.float().mean().item())


def test_with_a_head_of_zeros_the_numbering_of_the_classes_changes_nothing() -> None:
    """UNICORN-MAML's variance over permutations is that of the head's first values."""
    for zero_head in (True, False):
        learner = MAML(build_model("conv4", 3, (1, 16, 16), 4, seed=0), 0.4, zero_head=zero_head)
        one, all_six = (evaluate(learner, sampler(), 40, 2, permutations=number) for number in (1, 6))
        assert torch.equal(one, all_six) == zero_head


@pytest.mark.parametrize("number", [0, 7])
def test_as_many_permutations_as_there_are(number: int) -> None:
    learner = MAML(build_model("conv4", 3, (1, 16, 16), 4, seed=0), 0.4)
    with pytest.raises(FewShotError, match=f"permutations is {number}; expected 1 to 6"):
        evaluate(learner, sampler(), 4, 1, permutations=number)
