"""The embedded dataset: a real few-shot problem with honest splits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool2d

from fewshot_asam.data import Dataset, glyphs, load_dataset
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.evaluate import interval


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSHOT_ASAM_CACHE", str(cache))


@pytest.fixture(scope="module")
def dataset(cache: Path) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_ASAM_CACHE", str(cache))
        start = time.monotonic()
        loaded = load_dataset("glyphs")
        print(f"\nglyphs built in {time.monotonic() - start:.1f} s")
        return loaded


def scripts(names: tuple[str, ...]) -> set[str]:
    return {name.split("/")[0] for name in names}


def character(name: str) -> str:
    return chr(int(name.split("/")[1], 16))


def test_there_are_enough_characters_and_drawings(dataset: Dataset) -> None:
    sizes = [len(split.names) for split in (dataset.train, dataset.val, dataset.test)]
    assert sum(sizes) >= 1000
    assert sizes[1] >= 100
    assert sizes[2] >= 200
    for split in (dataset.train, dataset.val, dataset.test):
        assert (split.counts == 20).all()
        assert split.shape == (1, 28, 28)


def test_whole_scripts_stand_on_one_side(dataset: Dataset) -> None:
    train, val, test = (scripts(split.names) for split in (dataset.train, dataset.val, dataset.test))
    assert not train & val
    assert not train & test
    assert not val & test
    assert {"LATIN", "CYRILLIC", "GREEK"} <= train
    assert len(test) >= 5


def test_characters_that_look_the_same_are_one_class(dataset: Dataset) -> None:
    """Latin A, Greek Alpha and Cyrillic A; Latin O, Greek Omicron, Cyrillic O, Armenian Oh and the digit-like rest."""
    present = {character(name) for split in (dataset.train, dataset.val, dataset.test) for name in split.names}
    for alike in ("AΑА", "BΒВ", "HΗН", "OΟОՕoοоօ", "PΡР", "TΤТ", "XΧХ", "SЅՏ", "cсϲ", "hһհ"):
        assert len(present & set(alike)) <= 1, alike


def test_no_test_character_is_drawn_like_a_training_character(dataset: Dataset) -> None:
    """By another measure than the one that chose them: the intersection over union of the upright glyphs' ink."""
    upright = {
        name: torch.stack([glyphs._render(character(x), "DejaVuSans", 0) for x in split.names]) > 127
        for name, split in (("train", dataset.train), ("test", dataset.test))
    }
    train, test = (ink.flatten(1).float() for ink in upright.values())
    both = test @ train.T
    overlap = both / (test.sum(1, keepdim=True) + train.sum(1) - both)
    worst = overlap.max()
    print(f"\nlargest overlap of a test with a training character: {worst:.2f}")
    assert worst < 0.9
    assert (overlap.max(1).values > 0.75).float().mean() < 0.05


def test_drawings_follow_from_the_seed() -> None:
    some = glyphs.candidates()[::200]
    first, again, other = (glyphs.draw(some, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawings = first.view(len(some), glyphs.DRAWINGS, -1).float()
    assert (torch.cdist(drawings, drawings) + 1e9 * torch.eye(glyphs.DRAWINGS)).min() > 0


def test_the_cache_gives_the_same(dataset: Dataset) -> None:
    start = time.monotonic()
    again = load_dataset("glyphs")
    assert time.monotonic() - start < 2
    assert torch.equal(again.test.images, dataset.test.images)
    assert again.test.names == dataset.test.names


def test_every_drawing_shows_something_and_is_not_cut_off(dataset: Dataset) -> None:
    for split in (dataset.train, dataset.val, dataset.test):
        ink = split.images.float() / 255
        assert 0.05 < ink.mean() < 0.25
        assert (avg_pool2d(ink, 2).amax(dim=(1, 2, 3)) > 0.4).float().mean() > 0.99
        edges = torch.cat([ink[..., 0, :], ink[..., -1, :], ink[..., :, 0], ink[..., :, -1]], dim=-1)
        assert (edges.sum(-1) > 4).float().mean() < 0.01


def test_nearest_neighbours_on_pixels_do_not_solve_it(dataset: Dataset) -> None:
    sampler = EpisodeSampler(dataset.test, 5, 1, 15, seed=0)
    accuracies = []
    for _ in range(30):
        batch = sampler.sample(20)
        distances = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))
        nearest = batch.support_y.gather(1, distances.argmin(2))
        accuracies.append((nearest == batch.query_y).float().mean(1))
    found = interval(torch.cat(accuracies))
    print(f"\nnearest neighbour on pixels, 5-way 1-shot: {found} (600 tasks)")
    assert 0.2 < found.mean < 0.6
