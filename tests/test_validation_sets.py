"""Where the lower level's validation loss comes from."""

from __future__ import annotations

import pytest
import torch

from fewshot_asam import FewShotError
from fewshot_asam.rules.validation_sets import ROTATION, SHIFT, augmented, lower_level_sets


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
