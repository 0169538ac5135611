"""The sampler: what every episode must be, and that classes and images are uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from conftest import make_images
from fewshot_asam import FewShotError
from fewshot_asam.data.images import Dataset, ImageSet
from fewshot_asam.episodes import Episodes, EpisodeSampler


def numbered(counts: list[int]) -> ImageSet:
    """Each image carries its class and its number in its two pixels."""
    pixels = [[c, i] for c, count in enumerate(counts) for i in range(count)]
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 2)
    return ImageSet(images, torch.tensor(counts), tuple(map(str, range(len(counts)))))


def identities(x: torch.Tensor) -> list[tuple[int, int]]:
    """(class, number) of each image of one task."""
    return [tuple(pair) for pair in (x.flatten(1) * 255).round().long().tolist()]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int, int, int, int]:
    shots, queries = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(shots + queries, 12), min_size=2, max_size=10))
    ways = draw(st.integers(2, len(counts)))
    return counts, ways, shots, queries, draw(st.integers(1, 5)), draw(st.integers(0, 2**63 - 1))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_episode_is_a_few_shot_task(problem: tuple[list[int], int, int, int, int, int]) -> None:
    counts, ways, shots, queries, tasks, seed = problem
    batch = EpisodeSampler(numbered(counts), ways, shots, queries, seed=seed).sample(tasks)
    assert batch.support_x.shape == (tasks, ways * shots, 1, 1, 2)
    assert batch.query_x.shape == (tasks, ways * queries, 1, 1, 2)
    for task in range(tasks):
        support, query = identities(batch.support_x[task]), identities(batch.query_x[task])
        assert len(set(support + query)) == ways * (shots + queries)
        assert all(number < counts[kind] for kind, number in support + query)
        label_of = dict(zip((kind for kind, _ in support), batch.support_y[task].tolist(), strict=True))
        assert sorted(label_of.values()) == list(range(ways))
        assert [label_of[kind] for kind, _ in support] == batch.support_y[task].tolist()
        assert [label_of[kind] for kind, _ in query] == batch.query_y[task].tolist()


def test_classes_labels_and_images_are_uniform() -> None:
    """Chi-squared at 1e-4 over 20,000 tasks from classes of unequal size; a biased draw of 5 % would fail."""
    counts = [8, 5, 12, 6, 9, 7]
    sampler = EpisodeSampler(numbered(counts), 3, 1, 2, seed=1)
    classes, images = sampler.draw(20_000)
    assert chisquare(torch.bincount(classes.flatten()).numpy()).pvalue > 1e-4
    for label in range(3):
        assert chisquare(torch.bincount(classes[:, label]).numpy()).pvalue > 1e-4
    pairs = torch.bincount(classes[:, 0] * 6 + classes[:, 1], minlength=36).view(6, 6)
    assert chisquare(pairs[~torch.eye(6, dtype=torch.bool)].numpy()).pvalue > 1e-4
    start = 0
    for kind, count in enumerate(counts):
        for position in range(3):
            drawn = images[..., position][classes == kind] - start
            assert chisquare(torch.bincount(drawn, minlength=count).numpy()).pvalue > 1e-4
        start += count


def test_the_same_seed_gives_the_same_stream_and_another_does_not() -> None:
    images = make_images(12, 8, (1, 4, 4), 0)
    first, second, other = (EpisodeSampler(images, 5, 1, 2, seed=seed) for seed in (7, 7, 8))
    for _ in range(3):
        batches = first.sample(4), second.sample(4), other.sample(4)
        assert torch.equal(batches[0].query_x, batches[1].query_x)
        assert not torch.equal(batches[0].query_x, batches[2].query_x)


def test_the_stream_goes_on_from_a_saved_state_and_reads_no_global_generator() -> None:
    sampler = EpisodeSampler(make_images(12, 8, (1, 4, 4), 0), 5, 1, 2, seed=7)
    sampler.sample(4)
    state = sampler.state_dict()
    expected = sampler.sample(4)
    torch.manual_seed(99)
    sampler.load_state_dict(state)
    assert torch.equal(sampler.sample(4).support_x, expected.support_x)


def test_pixels_are_scaled_to_one() -> None:
    images = ImageSet(torch.full((8, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([4, 4]), ("a", "b"))
    batch = EpisodeSampler(images, 2, 1, 1).sample(1)
    assert batch.support_x.dtype == torch.float32
    assert (batch.support_x == 1).all()


def test_a_slice_of_episodes_is_episodes() -> None:
    batch = EpisodeSampler(make_images(12, 8, (1, 4, 4), 0), 5, 1, 2).sample(4)
    assert batch[1:3].num_tasks == 2
    assert torch.equal(batch[1:3].query_x, batch.query_x[1:3])


@pytest.mark.parametrize(
    ("ways", "shots", "queries", "message"),
    [
        (7, 1, 1, "ways is 7, but the split has 6 classes"),
        (1, 1, 1, "ways is 1; expected at least 2"),
        (2, 0, 1, "shots is 0; expected at least 1"),
        (2, 1, 0, "queries is 0; expected at least 1"),
        (2, 3, 3, "class 1 has 5 images; 3 shots and 3 queries need 6"),
    ],
)
def test_impossible_episodes_are_refused(ways: int, shots: int, queries: int, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        EpisodeSampler(numbered([8, 5, 12, 6, 9, 7]), ways, shots, queries)


def test_no_tasks_are_refused() -> None:
    with pytest.raises(FewShotError, match="0 tasks"):
        EpisodeSampler(numbered([8, 5]), 2, 1, 1).sample(0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, y = torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 3, dtype=torch.int64)
    Episodes(x, y, x, y)
    with pytest.raises(FewShotError, match="support images"):
        Episodes(x[:, :2], y, x, y)
    with pytest.raises(FewShotError, match="query images"):
        Episodes(x, y, x, y.int())
    with pytest.raises(FewShotError, match="support images"):
        Episodes(x, y.unsqueeze(2), x, y.unsqueeze(2))
    with pytest.raises(FewShotError, match="query labels begin at -1"):
        Episodes(x, y, x, y - 1)
    with pytest.raises(FewShotError, match="the query sets are empty"):
        Episodes(x, y, x[:, :0], y[:, :0])
    with pytest.raises(FewShotError, match="1 support sets and 2 query sets"):
        Episodes(x[:1], y[:1], x, y)


@pytest.mark.parametrize("inputs", [(), (1,), (7, 3)])
@pytest.mark.parametrize("targets", [(), (1,), (2, 5)])
def test_episodes_of_regression(inputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """Targets below 0 and sets of any size will do, and a slice keeps them."""
    support, query = ((torch.randn(4, n, *inputs), torch.randn(4, n, *targets)) for n in (3, 8))
    batch = Episodes(*support, *query).to("cpu")
    assert batch.num_tasks == 4
    assert torch.equal(batch[1:].query_y, query[1][1:])
    with pytest.raises(FewShotError, match="query images"):
        Episodes(*support, query[0], query[1][:, 1:])
    with pytest.raises(FewShotError, match="expected one type"):
        Episodes(*support, query[0], torch.zeros(4, 8, dtype=torch.int64))
    with pytest.raises(FewShotError, match="one shape of a target"):
        Episodes(*support, query[0], query[1].unsqueeze(-1))


@pytest.mark.parametrize(
    ("images", "counts", "names", "message"),
    [
        (torch.zeros(4, 1, 2, 2), [4], ("a",), "expected uint8"),
        (torch.zeros(4, 2, 2, dtype=torch.uint8), [4], ("a",), "expected uint8"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [4], ("a", "b"), "one a class name"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [2, 2], ("a", "a"), "unique names"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [2, 3], ("a", "b"), "add up to 5, but there are 4"),
    ],
)
def test_image_sets_check_themselves(images, counts, names, message) -> None:
    with pytest.raises(FewShotError, match=message):
        ImageSet(images, torch.tensor(counts), names)


PIXELS = np.arange(6 * 3 * 4 * 5, dtype=np.uint8).reshape(6, 3, 4, 5)


@pytest.mark.parametrize(
    ("labels", "names", "counts", "order"),
    [
        ([7, -2, 7, 0, -2, 7], ("-2", "0", "7"), [2, 1, 3], [1, 4, 3, 0, 2, 5]),
        (np.array([7, -2, 7, 0, -2, 7]), ("-2", "0", "7"), [2, 1, 3], [1, 4, 3, 0, 2, 5]),
        (torch.tensor([1, 0, 1, 0, 1, 0]), ("0", "1"), [3, 3], [1, 3, 5, 0, 2, 4]),
        (["owl", "ant", "owl", "ant", "owl", "bee"], ("ant", "bee", "owl"), [2, 1, 3], [1, 3, 5, 0, 2, 4]),
        (np.array(["b", "a"] * 3), ("a", "b"), [3, 3], [1, 3, 5, 0, 2, 4]),
        ([("x", 1), ("a", 2)] * 3, ("('a', 2)", "('x', 1)"), [3, 3], [1, 3, 5, 0, 2, 4]),
        (["b", 3, "b", 3, "b", 3], ("b", "3"), [3, 3], [0, 2, 4, 1, 3, 5]),
    ],
)
@pytest.mark.parametrize("form", ["first", "last", "tensor", "read-only", "reversed"])
def test_an_image_set_of_arrays(labels, names, counts, order, form: str) -> None:
    forms = {
        "first": lambda: PIXELS,
        "last": lambda: PIXELS.transpose(0, 2, 3, 1),
        "tensor": lambda: torch.from_numpy(PIXELS),
        "read-only": lambda: np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape),
        "reversed": lambda: np.ascontiguousarray(PIXELS[::-1])[::-1],
    }
    images = ImageSet.from_arrays(forms[form](), labels)
    assert images.names == names
    assert images.counts.tolist() == counts
    assert np.array_equal(images.images, PIXELS[order])


def test_an_image_set_has_the_names_that_it_is_given() -> None:
    images = ImageSet.from_arrays(PIXELS[:, 0], [2, 1, 2, 1, 2, 1], ["cat", "dog"])
    assert images.names == ("cat", "dog")
    assert images.shape == (1, 4, 5)
    images.images.zero_()
    assert PIXELS.any(), "the caller's array is left alone"


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (PIXELS / 255, [0] * 6, None, r"float64 \[6, 3, 4, 5\]; expected uint8 .*multiply images in \[0, 1\] by 255"),
        (PIXELS.astype(int), [0] * 6, None, r"int64 \[6, 3, 4, 5\]; expected uint8"),
        (PIXELS[:, :2], [0] * 6, None, r"uint8 \[6, 2, 4, 5\]; expected .* 1 or 3 channels"),
        (PIXELS[0, 0], [0] * 6, None, r"uint8 \[4, 5\]"),
        (PIXELS[:0], [], None, r"uint8 \[0, 3, 4, 5\]"),
        ([PIXELS[0], PIXELS[0, :, :2]], [0, 1], None, "all of one size"),
        (PIXELS, [0] * 5, None, "5 labels for 6 images; expected one each"),
        (PIXELS, "abcdef", None, "labels are a str; expected one label an image"),
        (PIXELS, 3, None, "labels are a int"),
        (PIXELS, [0, 1, float("nan"), 0, 1, 0], None, "a label is nan"),
        (PIXELS, [0, 1, None, 0, 1, 0], None, "a label is None"),
        (PIXELS, np.eye(6), None, "cannot be told from another"),
        (PIXELS, [0, 1] * 3, ["a"], "1 names for 2 different labels"),
        (PIXELS, [0, 1] * 3, ["a", "a"], "unique names"),
        (PIXELS, [0, "0"] * 3, None, "unique names"),
    ],
)
def test_arrays_that_are_no_image_set(images, labels, names, message: str) -> None:
    with pytest.raises(FewShotError, match=rf"\A.*{message}.*\Z"):
        ImageSet.from_arrays(images, labels, names)


def test_a_dataset_of_arrays_divides_its_classes() -> None:
    """Image k of class c has the value 10 c + k."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 3))
    values = [10 * label + (labels[:index] == label).sum() for index, label in enumerate(labels)]
    pixels = np.array(values, np.uint8)[:, None, None]
    dataset, again, other = (Dataset.from_arrays("mine", pixels, labels, seed=seed) for seed in (3, 3, 4))
    splits = (dataset.train, dataset.val, dataset.test)
    assert [len(images.names) for images in splits] == [13, 3, 4]
    assert sorted(name for images in splits for name in images.names) == sorted(map(str, range(20)))
    for images in splits:
        expected = [10 * int(name) + index for name in images.names for index in range(3)]
        assert images.images.flatten().tolist() == expected
    assert dataset.train.names == again.train.names != other.train.names
    assert EpisodeSampler(dataset.test, 3, 1, 2).sample(2).num_tasks == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": (0.9, 0.05, 0.05)}, r"fractions \(0.9, 0.05, 0.05\) of 4 classes are 4, 0, 0; expected"),
        ({"fractions": (0.5, 0.5)}, "three positive shares"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_dataset_of_arrays_that_cannot_be_divided(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        Dataset.from_arrays("mine", PIXELS[:4], range(4), **settings)
