"""Episodes from the batches and task samples of torchmeta and learn2learn; neither package is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def episodes_from_torchmeta(batch: Mapping[str, Any]) -> Episodes:
    """Episodes from a batch of torchmeta's `BatchMetaDataLoader`.

    Images are grouped by label and otherwise in the order given; pixel values and the images' dtype stay as they are.

    **Arguments:**

    - `batch`: what the loader yields of a dataset with `ClassSplitter`: the support set under `train` (or `support`)
      and the query set under `test` (or `query`), each a pair of images, float `[T, n, C, H, W]`, and integer labels
      `[T, n]`. Labels other than `0..N-1` are mapped to them in rising order, task by task.

    Raises `FewShotError` where a set is missing or malformed, where the classes of a task differ between its two sets,
    or where the classes have unequal numbers of images.
    """
    support_x, support_classes = _by_class("support", *_pair("the support set", _entry(batch, "train", "support"), 5))
    query_x, query_classes = _by_class("query", *_pair("the query set", _entry(batch, "test", "query"), 5))
    for task, (given, asked) in enumerate(zip(support_classes.tolist(), query_classes.tolist(), strict=False)):
        if given != asked:
            raise FewShotError(
                f"task {task} has the labels {given} in its support set and {asked} in its query set; expected the "
                "same: give both one target_transform, such as Categorical(ways)"
            )
    return _episodes(support_x, query_x)


def episodes_from_learn2learn(tasks: Iterable[Any], *, shots: int) -> Episodes:
    """Episodes from task samples of learn2learn.

    Of each class, the first `shots` images of a sample become support images and the others query images. Images are
    grouped by label; pixel values and the images' dtype stay as they are.

    **Arguments:**

    - `tasks`: the `T` samples, each a pair of images, float `[N*(K+Q), C, H, W]`, and integer labels `[N*(K+Q)]`, such
      as `[taskset.sample() for _ in range(T)]`. Labels other than `0..N-1` are mapped to them in rising order, sample
      by sample.
    - `shots`: `K`; learn2learn's `KShots` draws `K + Q`.

    Raises `FewShotError` where a sample is malformed, where samples differ in shape, where the classes have unequal
    numbers of images, or where `shots` leaves none of them for the query set.
    """
    if getattr(tasks, "num_tasks", None) == -1:
        raise FewShotError("the taskset never ends; expected a finite number of samples: give it num_tasks, or a list")
    pairs = [_pair(f"task {index}", task, 4) for index, task in enumerate(tasks)]
    if not pairs:
        raise FewShotError("there are no task samples; expected at least 1")
    for index, (x, _) in enumerate(pairs):
        if x.shape != pairs[0][0].shape:
            raise FewShotError(
                f"task {index} has images {list(x.shape)} and task 0 {list(pairs[0][0].shape)}; expected one shape: "
                "draw all tasks with the same ways, shots and image size"
            )
    images, _ = _by_class("sample", torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]))
    per_class = images.shape[2]
    if not 1 <= shots < per_class:
        raise FewShotError(
            f"shots is {shots}, but the samples have {per_class} images a class; expected at least 1 for the support "
            "set and 1 for the query set: change shots, or draw KShots(k=shots + queries)"
        )
    return _episodes(images[:, :, :shots], images[:, :, shots:])


def _entry(batch: Mapping[str, Any], *names: str) -> Any:
    if not isinstance(batch, Mapping):
        raise FewShotError(f"the batch is {_describe(batch)}; expected a mapping with the keys train and test")
    for name in names:
        if name in batch:
            return batch[name]
    raise FewShotError(
        f"the batch has the keys {sorted(map(str, batch))}; expected {' or '.join(names)}: split the dataset with "
        "ClassSplitter(num_train_per_class=..., num_test_per_class=...)"
    )


def _pair(what: str, pair: Any, dims: int) -> tuple[Tensor, Tensor]:
    """Images of `dims` dimensions and their labels, checked one by one; the labels as int64."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise FewShotError(
            f"{what} is {_describe(pair)}; expected a pair of tensors, images and labels: transform images to tensors "
            "and labels to integers"
        )
    x, y = pair
    letters = "[tasks, images, C, H, W]" if dims == 5 else "[images, C, H, W]"
    if x.ndim != dims or not x.is_floating_point() or 0 in x.shape:
        raise FewShotError(
            f"{what} has images {_describe(x)}; expected float {letters}: transform them, for example with ToTensor()"
        )
    if y.shape != x.shape[:-3] or y.dtype not in INTEGERS:
        raise FewShotError(
            f"{what} has labels {_describe(y)}; expected integers {list(x.shape[:-3])}, one an image: transform them, "
            "for example with torchmeta's Categorical(ways) or learn2learn's RemapLabels(dataset)"
        )
    return x, y.long()


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def _by_class(role: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The images grouped by class, `[T, N, n, C, H, W]`, and the labels of the classes, rising, `[T, N]`."""
    counts = [torch.unique(labels, return_counts=True)[1].tolist() for labels in y]
    ways, per_class = len(counts[0]), counts[0][0]
    for task, given in enumerate(counts):
        if given != [per_class] * ways:
            raise FewShotError(
                f"{role} images of task {task}: {given} for its classes; expected the same number for each class and "
                "each task: draw equally many shots and queries of every class"
            )
    order = y.argsort(dim=1, stable=True)
    tasks = torch.arange(len(x), device=x.device).unsqueeze(1)
    images = x[tasks, order.to(x.device)].reshape(len(x), ways, per_class, *x.shape[2:])
    return images, y.gather(1, order)[:, ::per_class]


def _episodes(support: Tensor, query: Tensor) -> Episodes:
    """Episodes from images grouped by class, `[T, N, K, C, H, W]` and `[T, N, Q, C, H, W]`."""
    if support.shape[3:] != query.shape[3:]:
        raise FewShotError(
            f"support images are {list(support.shape[3:])} and query images {list(query.shape[3:])}; expected one "
            "shape: give both the same transform"
        )
    return Episodes(support.flatten(1, 2), _labels(support), query.flatten(1, 2), _labels(query))


def _labels(images: Tensor) -> Tensor:
    tasks, ways, per_class = images.shape[:3]
    return torch.arange(ways, device=images.device).repeat_interleave(per_class).expand(tasks, -1).contiguous()
