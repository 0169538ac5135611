"""Converters from the two peers' formats, on the peers' own datasets and loaders."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError
from fewshot_asam.interop import episodes_from_learn2learn, episodes_from_torchmeta
from peers import import_learn2learn, import_torchmeta

CLASSES, IMAGES, TASKS, WAYS, SHOTS, QUERIES = 6, 8, 3, 4, 2, 3
SHAPE = (1, 4, 5)


def image(number: int, label: int) -> Tensor:
    """A constant image that tells which one it is."""
    return torch.full(SHAPE, float(label * IMAGES + number))


def identities(x: Tensor) -> tuple[Tensor, Tensor]:
    """The class and the number of each image `[..., C, H, W]`, from its constant value."""
    flat = x.flatten(-3)
    assert torch.equal(flat, flat[..., :1].expand_as(flat))
    code = flat[..., 0].long()
    return code // IMAGES, code % IMAGES


def check_episodes(episodes: Episodes, shots: int, queries: int) -> None:
    """Full shapes, labels grouped in order, one class a label in both sets, and no image twice in a task."""
    expected = torch.arange(WAYS).expand(TASKS, -1)
    assert episodes.support_x.shape == (TASKS, WAYS * shots, *SHAPE)
    assert episodes.query_x.shape == (TASKS, WAYS * queries, *SHAPE)
    assert torch.equal(episodes.support_y, expected.repeat_interleave(shots, dim=1))
    assert torch.equal(episodes.query_y, expected.repeat_interleave(queries, dim=1))
    for task in range(TASKS):
        classes, numbers = identities(torch.cat([episodes.support_x[task], episodes.query_x[task]]))
        labels = torch.cat([episodes.support_y[task], episodes.query_y[task]])
        pairs = set(zip(labels.tolist(), classes.tolist(), strict=True))
        assert len(pairs) == len({label for label, _ in pairs}) == len({known for _, known in pairs}) == WAYS
        assert len(set(zip(classes.tolist(), numbers.tolist(), strict=True))) == WAYS * (shots + queries)


def rows(x: Tensor, y: Tensor) -> list[list[tuple[int, int, int]]]:
    """The class, number and label of each image, sorted within each task: what a conversion has to keep."""
    classes, numbers = identities(x)
    return [sorted(map(tuple, task)) for task in torch.stack([classes, numbers, y], dim=-1).tolist()]


@pytest.fixture
def torchmeta() -> ModuleType:
    return import_torchmeta()


@pytest.fixture
def learn2learn() -> ModuleType:
    return import_learn2learn()


def torchmeta_batch(torchmeta: ModuleType, **splits: int) -> dict[str, list[Tensor]]:
    """One batch of `BatchMetaDataLoader` over in-memory classes."""
    data, transforms = torchmeta.utils.data, torchmeta.transforms
    Dataset: Any = data.Dataset
    ClassDataset: Any = data.ClassDataset

    class OneClass(Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return image(number, self.index), self.target_transform(self.index)

    class Classes(ClassDataset):  # type: ignore[misc]
        num_classes = CLASSES

        def __getitem__(self, index: int) -> OneClass:
            return OneClass(index)

    dataset = data.CombinationMetaDataset(
        Classes(meta_train=True),
        num_classes_per_task=WAYS,
        target_transform=transforms.Categorical(WAYS),
        dataset_transform=transforms.ClassSplitter(**splits),
    )
    return next(iter(data.BatchMetaDataLoader(dataset, batch_size=TASKS)))


def learn2learn_tasks(l2l: ModuleType, *relabel: Callable[[Any], Any], per_class: int, **kwargs: Any) -> Any:
    """A taskset over in-memory images, with some transforms more."""
    pairs = [(image(number, label), label) for label in range(CLASSES) for number in range(IMAGES)]
    random.Random(0).shuffle(pairs)
    data = TensorDataset(torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs]))
    dataset = l2l.data.MetaDataset(data)
    transforms = l2l.data.transforms
    steps = [transforms.NWays(dataset, WAYS), transforms.KShots(dataset, per_class), transforms.LoadData(dataset)]
    return l2l.data.Taskset(dataset, [*steps, *(make(dataset) for make in relabel)], **kwargs)


@pytest.mark.parametrize("names", [("train", "test"), ("support", "query")])
def test_torchmeta_batch(torchmeta: ModuleType, names: tuple[str, str]) -> None:
    support, query = names
    batch = torchmeta_batch(torchmeta, **{f"num_{support}_per_class": SHOTS, f"num_{query}_per_class": QUERIES})
    episodes = episodes_from_torchmeta(batch)
    check_episodes(episodes, SHOTS, QUERIES)
    assert rows(episodes.support_x, episodes.support_y) == rows(*batch[support])
    assert rows(episodes.query_x, episodes.query_y) == rows(*batch[query])


def test_learn2learn_samples(learn2learn: ModuleType) -> None:
    transforms = learn2learn.data.transforms
    taskset = learn2learn_tasks(learn2learn, transforms.RemapLabels, transforms.ConsecutiveLabels, per_class=2 * SHOTS)
    samples = [taskset.sample() for _ in range(TASKS)]
    episodes = episodes_from_learn2learn(samples, shots=SHOTS)
    check_episodes(episodes, SHOTS, SHOTS)
    joined_x = torch.cat([episodes.support_x, episodes.query_x], dim=1)
    joined_y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
    assert rows(joined_x, joined_y) == rows(*map(torch.stack, zip(*samples, strict=True)))


def test_learn2learn_first_shots_are_support(learn2learn: ModuleType) -> None:
    taskset = learn2learn_tasks(learn2learn, per_class=SHOTS + QUERIES, num_tasks=TASKS)
    episodes = episodes_from_learn2learn(taskset, shots=SHOTS)
    check_episodes(episodes, SHOTS, QUERIES)
    for task, (x, y) in enumerate(taskset):
        for label, original in enumerate(y.unique()):
            of_class = x[y == original]
            assert torch.equal(episodes.support_x[task, episodes.support_y[task] == label], of_class[:SHOTS])
            assert torch.equal(episodes.query_x[task, episodes.query_y[task] == label], of_class[SHOTS:])


def test_endless_taskset_is_refused(learn2learn: ModuleType) -> None:
    with pytest.raises(FewShotError, match="never ends"):
        episodes_from_learn2learn(learn2learn_tasks(learn2learn, per_class=2), shots=1)


def test_learn2learn_maml_takes_the_episodes(learn2learn: ModuleType) -> None:
    taskset = learn2learn_tasks(learn2learn, per_class=2, num_tasks=TASKS)
    episodes = episodes_from_learn2learn(taskset, shots=1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, WAYS))
    learner = learn2learn.algorithms.MAML(model, lr=0.001, first_order=False).clone()
    before = torch.nn.functional.cross_entropy(learner(episodes.support_x[0]), episodes.support_y[0])
    learner.adapt(before)
    after = torch.nn.functional.cross_entropy(learner(episodes.support_x[0]), episodes.support_y[0])
    assert after < before


def pair(labels: list[list[int]], shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """Images and labels of tasks, as a loader gives them."""
    y = torch.tensor(labels)
    return [torch.zeros(*y.shape, *shape), y]


def test_interleaved_and_unusual_labels_are_mapped_in_order() -> None:
    support_x, query_x = torch.arange(4.0).view(1, 4, 1, 1, 1), torch.arange(2.0).view(1, 2, 1, 1, 1)
    support_y, query_y = torch.tensor([[9, -3, 9, -3]], dtype=torch.int32), torch.tensor([[9, -3]])
    episodes = episodes_from_torchmeta(OrderedDict(train=(support_x, support_y), test=(query_x, query_y)))
    assert episodes.support_x.flatten().tolist() == [1, 3, 0, 2]
    assert episodes.support_y.tolist() == [[0, 0, 1, 1]]
    assert episodes.query_x.flatten().tolist() == [1, 0]
    assert episodes.query_y.tolist() == [[0, 1]]
    assert episodes.support_y.dtype == torch.int64


GOOD = pair([[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (GOOD, "the batch is a list of Tensor, Tensor; expected a mapping"),
        ({"train": GOOD}, r"keys \['train'\]; expected test or query: split"),
        ({"train": GOOD[0], "test": GOOD}, r"the support set is float32 \[2, 2, 1, 4, 5\]; expected a pair"),
        ({"train": [GOOD[0], [("a", 0)]], "test": GOOD}, "the support set is a list of Tensor, list; expected a pair"),
        ({"train": GOOD, "test": [GOOD[0].byte(), GOOD[1]]}, r"query set has images uint8 \[.*expected float"),
        ({"train": GOOD, "test": [GOOD[0][0], GOOD[1]]}, r"images float32 \[2, 1, 4, 5\]; expected float \[tasks"),
        ({"train": [GOOD[0][:0], GOOD[1][:0]], "test": GOOD}, r"images float32 \[0, 2, 1, 4, 5\]"),
        ({"train": [GOOD[0], GOOD[1].float()], "test": GOOD}, r"labels float32 \[2, 2\]; expected integers \[2, 2\]"),
        ({"train": [GOOD[0], GOOD[1][0]], "test": GOOD}, r"labels int64 \[2\]; expected integers \[2, 2\]"),
        ({"train": GOOD, "test": pair([[0, 1], [0, 2]])}, r"task 1 has the labels \[0, 1\].*and \[0, 2\]"),
        ({"train": pair([[0, 0, 1]]), "test": pair([[0, 1]])}, r"support images of task 0: \[2, 1\] for its classes"),
        ({"train": GOOD, "test": pair([[0, 1], [1, 1]])}, r"query images of task 1: \[2\] for its classes"),
        ({"train": GOOD, "test": pair([[0, 1]] * 2, (1, 9, 9))}, r"\[1, 4, 5\] and query images \[1, 9, 9\]"),
        ({"train": GOOD, "test": pair([[0, 1]])}, "2 support sets and 1 query sets"),
    ],
)
def test_bad_torchmeta_batches(batch: Any, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        episodes_from_torchmeta(batch)


def sample(labels: list[int], shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """One task sample."""
    return torch.zeros(len(labels), *shape), torch.tensor(labels)


@pytest.mark.parametrize(
    ("tasks", "shots", "message"),
    [
        ([], 1, "no task samples; expected at least 1"),
        (sample([0, 0, 1, 1]), 1, r"task 0 is float32 \[4, 1, 4, 5\]; expected a pair"),
        (
            [sample([0, 0, 1, 1]), (torch.zeros(4, 20), torch.zeros(4).long())],
            1,
            r"task 1 has images float32 \[4, 20\]",
        ),
        ([sample([0, 0, 1, 1]), sample([0, 0, 1, 1], (3, 4, 5))], 1, r"task 1 has images \[4, 3, 4, 5\] and task 0"),
        ([sample([0, 0, 1, 1]), sample([0, 1, 1, 1])], 1, r"task 1: \[1, 3\] for its classes; expected the same"),
        ([sample([0, 0, 1, 1]), sample([0, 1, 2, 3])], 1, r"task 1: \[1, 1, 1, 1\] for its classes"),
        ([sample([0, 0, 1, 1])], 2, r"shots is 2, but the samples have 2 images a class"),
        ([sample([0, 0, 1, 1])], 0, r"shots is 0, but the samples have 2 images a class"),
    ],
)
def test_bad_learn2learn_samples(tasks: Any, shots: int, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        episodes_from_learn2learn(tasks, shots=shots)
