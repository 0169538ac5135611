"""Where the lower level's validation loss comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fewshot_asam import FewShotError, MetaLearner
from fewshot_asam.rules.agnostic_sam import AgnosticSAMRule
from fewshot_asam.rules.validation_sets import ROTATION, SHIFT, augmented, lower_level_sets
from problems import episodes as drawn
from problems import smooth_net


def numbered(tasks: int, ways: int, shots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that carry their own index, with labels in a scrambled order."""
    labels = torch.arange(ways).repeat(shots).expand(tasks, -1).contiguous()
    return torch.arange(tasks * ways * shots).float().view(tasks, -1, 1, 1, 1), labels


@pytest.mark.parametrize(("shots", "held_out"), [(2, 1), (5, 1), (8, 2)])
def test_split_holds_out_a_quarter_of_each_class(shots: int, held_out: int) -> None:
    x, y = numbered(3, 4, shots)
    (train_x, train_y), val = lower_level_sets(x, y, "split", None)
    assert val is not None
    val_x, val_y = val
    for task in range(3):
        assert torch.equal(torch.bincount(val_y[task]), torch.full((4,), held_out))
        assert torch.equal(torch.bincount(train_y[task]), torch.full((4,), shots - held_out))
        both = torch.cat([train_x[task], val_x[task]]).flatten()
        assert torch.equal(both.sort().values, x[task].flatten())
        labels = torch.cat([train_y[task], val_y[task]])
        assert torch.equal(y[task][(both - x[task].min()).long()], labels)


def test_duplicate_is_no_second_set() -> None:
    x, y = numbered(1, 3, 2)
    (train_x, train_y), val = lower_level_sets(x, y, "duplicate", None)
    assert train_x is x
    assert train_y is y
    assert val is None


def test_augment_moves_a_little_and_is_reproducible() -> None:
    """The centre of mass of a dot moves by no more than the largest shift and rotation allow, and it does move."""
    x = torch.zeros(200, 1, 28, 28)
    x[:, :, 12:16, 12:16] = 1
    first, again = (augmented(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    ink = first.clamp(min=0.5) - 0.5  # above the noise
    grid = torch.arange(28.0)
    centre = (ink.sum(dim=2).squeeze(1) * grid).sum(1) / ink.sum(dim=(1, 2, 3))
    moved = (centre - 13.5).abs()
    assert moved.max() < 28 * SHIFT * (1 + ROTATION) + 0.5
    assert moved.mean() > 0.25 * 28 * SHIFT
    assert 0.02 < (first - first.clamp(0, 1)).std() < 0.06


def test_augment_needs_a_generator() -> None:
    with pytest.raises(FewShotError, match="pass generator="):
        lower_level_sets(*numbered(1, 3, 2), "augment", None)


@pytest.mark.parametrize("shots", [1])
def test_split_needs_two_shots(shots: int) -> None:
    with pytest.raises(FewShotError, match="2 at least"):
        lower_level_sets(*numbered(1, 3, shots), "split", None)


def test_split_needs_even_classes() -> None:
    x, y = numbered(1, 3, 2)
    with pytest.raises(FewShotError, match="5 support images of 3 classes"):
        lower_level_sets(x[:, :5], y[:, :5], "split", None)
    with pytest.raises(FewShotError, match="same number of shots for each class"):
        lower_level_sets(x, torch.tensor([[0, 0, 0, 1, 1, 2]]), "split", None)


def test_other_task_is_the_query_set_of_the_task_before() -> None:
    x, y = numbered(3, 4, 1)
    queries = (torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 8, 1, 1, 1), torch.arange(24).view(3, 8))
    (train_x, train_y), val = lower_level_sets(x, y, "other_task", None, queries)
    assert train_x is x
    assert train_y is y
    assert val is not None
    assert val[0][:, 0].flatten().tolist() == [2, 0, 1]
    assert val[1][:, 0].tolist() == [16, 0, 8]


def test_other_task_is_never_the_task_itself() -> None:
    x, y = numbered(1, 4, 1)
    for queries in ((x, y), None):
        with pytest.raises(FewShotError, match="a batch of 2 or more"):
            lower_level_sets(x, y, "other_task", None, queries)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_other_task_is_adapted_to_alike_by_every_engine(engine: Any) -> None:
    """As by `clone` and `adapt`, task by task, with a closure of the other task's queries."""
    model, episodes = smooth_net(), drawn(tasks=3)
    learner = MetaLearner(model, 0.3, AgnosticSAMRule(rho=0.2), validation="other_task", engine=engine)
    found = learner.meta_loss(episodes, steps=2)
    gradient = torch.autograd.grad(found.loss, list(model.parameters()))
    losses = []
    for task, other in enumerate([episodes.num_tasks - 1, *range(episodes.num_tasks - 1)]):
        clone = learner.clone()
        clone.adapt(
            lambda net, i=task: F.cross_entropy(net(episodes.support_x[i]), episodes.support_y[i]),
            steps=2,
            validation=lambda net, i=other: F.cross_entropy(net(episodes.query_x[i]), episodes.query_y[i]),
        )
        losses.append(F.cross_entropy(clone(episodes.query_x[task]), episodes.query_y[task]))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, list(model.parameters())), rtol=1e-8, atol=1e-12)
    duplicate = MetaLearner(model, 0.3, AgnosticSAMRule(rho=0.2), engine=engine).meta_loss(episodes, steps=2)
    assert (duplicate.loss - expected).abs() > 1e-6, "another rule than with a duplicate"
