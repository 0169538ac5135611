"""Episodes and the sampler that draws them, for many tasks at once, on the device.

Letters for shapes, here and in the whole package: `T` tasks, `N` ways, `K` shots, `Q` queries a class, `S = N*K`
support images a task, `C H W` channels, height and width of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fewshot_asam.data.images import ImageSet
from fewshot_asam.errors import FewShotError


@dataclass(frozen=True)
class Episodes:
    """A batch of `T` few-shot tasks.

    **Arguments:**

    - `support_x`: float `[T, S, C, H, W]`, images in `[0, 1]`; or inputs of any other shape, `[T, S, ...]`.
    - `support_y`: int64 `[T, S]`, labels `0..N-1`; or for regression float `[T, S, ...]`, targets.
    - `query_x`: float `[T, N*Q, C, H, W]`, or `[T, any number, ...]`.
    - `query_y`: int64 `[T, N*Q]`, or float `[T, the same number, ...]`.

    Raises `FewShotError` where the shapes do not fit together, a set is empty, one has labels and the other targets, or
    a label on the CPU is negative.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        for role, x, y in (
            ("support", self.support_x, self.support_y),
            ("query", self.query_x, self.query_y),
        ):
            labels = y.dtype == torch.int64 and y.ndim == 2
            targets = y.is_floating_point() and y.ndim >= 2
            if not (labels or targets) or x.shape[:2] != y.shape[:2]:
                raise FewShotError(
                    f"{role} images are {list(x.shape)} and labels {y.dtype} {list(y.shape)}; expected images "
                    "[tasks, images, ...] and int64 labels [tasks, images], or inputs [tasks, inputs, ...] and float "
                    "targets [tasks, inputs, ...]"
                )
            if y.numel() == 0:
                raise FewShotError(f"the {role} sets are empty: {list(y.shape)}; expected tasks with an image at least")
            if labels and y.device.type == "cpu" and int(y.min()) < 0:  # elsewhere that would wait for the device
                raise FewShotError(f"{role} labels begin at {int(y.min())}; expected 0 or more, as they count the ways")
        if self.support_y.dtype != self.query_y.dtype or self.support_y.shape[2:] != self.query_y.shape[2:]:
            raise FewShotError(
                f"support labels are {self.support_y.dtype} {list(self.support_y.shape)} and query labels "
                f"{self.query_y.dtype} {list(self.query_y.shape)}; expected one type, and one shape of a target"
            )
        if len(self.support_x) != len(self.query_x):
            raise FewShotError(
                f"{len(self.support_x)} support sets and {len(self.query_x)} query sets; expected one of each a task"
            )

    @property
    def num_tasks(self) -> int:
        """How many tasks these are, `T`."""
        return len(self.support_x)

    def __getitem__(self, index: slice) -> Episodes:
        """Some of the tasks."""
        return Episodes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Episodes:
        """The same episodes on another device."""
        return Episodes(*(getattr(self, field.name).to(device) for field in fields(self)))


class EpisodeSampler:
    """Draws episodes from an `ImageSet`: `N` classes without replacement, of each `K + Q` different images.

    The labels `0..N-1` are given to the drawn classes in random order. One generator on the images' device makes every
    draw, so the same seed gives the same stream there, and `state_dict` is all that is needed to go on with it. Random
    numbers for the tasks' augmentation come from a second one, `augmentation`, so that using them changes no task.

    **Arguments:**

    - `images`: the split to draw from, on the device where the episodes are wanted.
    - `ways`, `shots`, `queries`: `N >= 2`, `K >= 1`, `Q >= 1`; `shots` and `queries` count images of one class.
    - `seed`: of the sampler's own generator.
    - `label_noise`: the part of each task's support labels that are wrong, as `with_label_noise` says; query labels are
      right. A third generator makes them wrong, so that the same seed gives the same images with and without.

    Raises `FewShotError` where the split has too few classes, or one of its classes too few images, and where
    `label_noise` is no part.
    """

    def __init__(
        self, images: ImageSet, ways: int, shots: int, queries: int, *, seed: int = 0, label_noise: float = 0.0
    ) -> None:
        _check(images, ways, shots, queries)
        require_part(label_noise)
        self.images, self.ways, self.shots, self.queries = images, ways, shots, queries
        self.label_noise = label_noise
        self._starts = images.starts
        self._longest = int(images.counts.max())
        self._even = bool((images.counts == self._longest).all())
        device = images.images.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.augmentation = torch.Generator(device).manual_seed(seed + 1)
        self.noise = torch.Generator(device).manual_seed(seed + 2)

    def draw(self, num_tasks: int) -> tuple[Tensor, Tensor]:
        """The classes drawn, int64 `[T, N]`, and the indices of their images, int64 `[T, N, K+Q]`."""
        device, counts = self.images.images.device, self.images.counts
        keys = torch.rand(num_tasks, len(counts), generator=self.generator, device=device)
        classes = keys.topk(self.ways).indices
        keys = torch.rand(num_tasks, self.ways, self._longest, generator=self.generator, device=device)
        if not self._even:
            absent = torch.arange(self._longest, device=device) >= counts[classes].unsqueeze(-1)
            keys = keys.masked_fill(absent, -1.0)
        within = keys.topk(self.shots + self.queries).indices
        return classes, self._starts[classes].unsqueeze(-1) + within

    def sample(self, num_tasks: int) -> Episodes:
        """`num_tasks` new episodes; support and query images are grouped by label."""
        if num_tasks < 1:
            raise FewShotError(f"{num_tasks} tasks were asked for; expected at least 1")
        index = self.draw(num_tasks)[1]
        support, query = torch.split(index, [self.shots, self.queries], dim=2)
        support_x, support_y = self._gather(support)
        if self.label_noise:
            support_y = with_label_noise(support_y, self.ways, self.label_noise, self.noise)
        return Episodes(support_x, support_y, *self._gather(query))

    def _gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.images.images[index.flatten(1)]  # [T, N*n, C, H, W]
        labels = torch.arange(self.ways, device=index.device).repeat_interleave(index.shape[2])
        return pixels.to(torch.get_default_dtype()) / 255, labels.expand(len(index), -1).contiguous()

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states: the stream goes on from here. That of the noise is left out where there is none."""
        states = {"generator": self.generator.get_state(), "augmentation": self.augmentation.get_state()}
        return states | ({"noise": self.noise.get_state()} if self.label_noise else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that `state_dict` gave."""
        for name in self.state_dict():
            getattr(self, name).set_state(state[name].cpu())


def with_label_noise(labels: Tensor, ways: int, part: float, generator: torch.Generator) -> Tensor:
    """Support labels of which a part are wrong: symmetric noise within each task.

    **Arguments:**

    - `labels`: int64 `[T, S]`, `0..ways-1`.
    - `part`: of each task's `S = N*K` labels, exactly `floor(part * S + 1/2)` are replaced: the nearest whole number,
      the larger one where two are equally near. Which ones is drawn uniformly, without regard to their classes.
    - `generator`: on the labels' device.

    **Returns:** new labels `[T, S]`. A replaced label becomes one of the other `ways - 1` classes of the task, each
    equally likely and independently of the others; never the one that it was.
    """
    number = math.floor(part * labels.shape[1] + 0.5)
    if number == 0:
        return labels
    keys = torch.rand(labels.shape, generator=generator, device=labels.device)
    wrong = keys.topk(number, dim=1).indices
    shift = torch.randint(1, ways, wrong.shape, generator=generator, device=labels.device)
    return labels.scatter(1, wrong, (labels.gather(1, wrong) + shift) % ways)


def require_part(label_noise: float) -> None:
    """Raises `FewShotError` for what is no part of the labels."""
    if not 0 <= label_noise <= 1:
        raise FewShotError(f"label_noise is {label_noise}; expected a part of the support labels from 0 to 1")


def _check(images: ImageSet, ways: int, shots: int, queries: int) -> None:
    for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        if value < least:
            raise FewShotError(f"{name} is {value}; expected at least {least}")
    if ways > len(images.names):
        raise FewShotError(f"ways is {ways}, but the split has {len(images.names)} classes; choose at most that many")
    fewest = int(images.counts.argmin())
    if int(images.counts[fewest]) < shots + queries:
        raise FewShotError(
            f"class {images.names[fewest]} has {int(images.counts[fewest])} images; {shots} shots and {queries} "
            f"queries need {shots + queries}: ask for fewer, or leave the class out"
        )
