"""The embedded dataset: a real few-shot problem with honest splits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fewshot_asam.data import Dataset, glyphs, load_dataset
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.training.evaluation import interval


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
    for alike in ("AΑА", "BΒВ", "HΗН", "OΟОՕoοоօ", "PΡР", "TΤТ", "XΧХ", "SЅՏ", "cсϲ", "hһհ", "⋮ⵗ", "⋯ⵈ", "✚ᐩ", "Xⵅᕁ"):
        assert len(present & set(alike)) <= 1, alike


def outlines(names: list[str]) -> Tensor:
    """bool `[len(names), 36, 36]`: DejaVu Sans as matplotlib rasterises it, the ink's longer side scaled to 32."""
    font = FT2Font(str(glyphs._font_file("DejaVuSans")))
    font.set_size(72, 96)
    pages = torch.zeros(len(names), 36, 36)
    for page, name in zip(pages, names, strict=True):
        font.set_text(character(name))
        font.draw_glyphs_to_bitmap(antialiased=True)
        ink = torch.from_numpy(np.array(font.get_image(), dtype=np.float32))
        rows, columns = (ink.amax(dim).nonzero().flatten() for dim in (1, 0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = (max(1, round(side * 32 / max(ink.shape))) for side in ink.shape)
        top, left = (36 - height) // 2, (36 - width) // 2
        scaled = interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
        page[top : top + height, left : left + width] = scaled
    return pages > 127


def test_no_two_classes_are_drawn_alike(dataset: Dataset) -> None:
    """By other means than those that chose them: another rasteriser, and the ink's intersection over union."""
    covered = FT2Font(str(glyphs._font_file("DejaVuSans"))).get_charmap()
    splits = (dataset.train, dataset.val, dataset.test)
    placed = [(i, n) for i, split in enumerate(splits) for n in split.names if ord(character(n)) in covered]
    assert len(placed) > 900
    ink = outlines([name for _, name in placed]).flatten(1).float()
    area, both = ink.sum(1), ink @ ink.T
    overlap = (both / (area.unsqueeze(1) + area - both)).triu(1)
    side = torch.tensor([i for i, _ in placed])
    across = overlap.masked_fill(side.unsqueeze(1) == side, 0)
    for name, share in (("any two classes", overlap), ("two in different splits", across)):
        first, second = divmod(int(share.argmax()), len(placed))
        print(f"\nlargest overlap of {name}: {share.max():.2f}, {placed[first][1]} and {placed[second][1]}")
    assert overlap.max() < 0.9
    assert across.max() < 0.8


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
