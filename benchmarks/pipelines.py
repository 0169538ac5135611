"""Whole meta-updates on Omniglot from its files, for a worker process to build: libraries, data, network, optimiser.

Each factory imports what its users import and no more; each update draws its tasks, computes the second-order
meta-gradient and takes a step of Adam, and returns `{"loss": ..., "sample_s": ...}`, where `sample_s` are the seconds
that the tasks took, on the device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from benchmarks.presets import Preset

_shared = ExitStack()
"""Of processes that end with this one."""
Update = Callable[[], dict[str, float]]
META_LR = 1e-3
CHARACTERS, TRAINING = 1623, 1100
"""Of Omniglot, and of those that learn2learn trains on."""


def ours(preset: dict[str, Any], root: str, device: str, engine: str) -> Update:
    """As in the README: `load_dataset`, `EpisodeSampler`, `meta_backward`; on a CPU within `side_by_side`."""
    import torch

    from benchmarks.learn2learn_reference import LR
    from fewshot_asam import MAML
    from fewshot_asam.data import load_dataset
    from fewshot_asam.episodes import EpisodeSampler
    from fewshot_asam.models import build_model

    wanted = Preset(**preset)
    images = load_dataset("omniglot", root, device=device).train
    sampler = EpisodeSampler(images, wanted.ways, wanted.shots, wanted.queries, seed=0)
    model = build_model("conv4", wanted.ways, images.shape, wanted.hidden, seed=0).to(device)
    options: Any = {"engine": engine}
    learner = MAML(model, LR, **options)
    optimizer = torch.optim.Adam(learner.parameters(), lr=META_LR)
    if device == "cpu":
        _shared.enter_context(learner.side_by_side())

    def update() -> dict[str, float]:
        episodes, seconds = _timed(lambda: sampler.sample(wanted.tasks), device)
        optimizer.zero_grad()
        loss = learner.meta_backward(episodes, wanted.steps).loss
        optimizer.step()
        return {"loss": loss.item(), "sample_s": seconds}

    return update


def learn2learn(preset: dict[str, Any], root: str, device: str, in_memory: bool) -> Update:
    """learn2learn's tasksets, its `MAML`, its `CNN4`, and the loop of its examples.

    **Arguments:**

    - `root`: a folder as torchvision's `Omniglot` fills it, with `omniglot-py/`.
    - `in_memory`: images decoded once, by learn2learn's `OnDeviceDataset`, and not at each use.
    """
    import torch

    from benchmarks.learn2learn_reference import LR, build_model, meta_gradient
    from benchmarks.peer_packages import import_learn2learn

    l2l: Any = import_learn2learn()
    _accept_any_archive()
    wanted = Preset(**preset)
    random.seed(0)
    tasks = _in_memory(l2l, wanted, root, device) if in_memory else _from_files(l2l, wanted, root)
    maml = l2l.algorithms.MAML(build_model(l2l, wanted).to(device), lr=LR)
    optimizer = torch.optim.Adam(maml.parameters(), lr=META_LR)

    def update() -> dict[str, float]:
        batch, seconds = _timed(lambda: _batch(l2l, tasks, wanted, device), device)
        optimizer.zero_grad()
        loss = meta_gradient(l2l, maml, batch, wanted.steps)
        optimizer.step()
        return {"loss": loss.item(), "sample_s": seconds}

    return update


def _accept_any_archive() -> None:
    """Let torchvision not hash the archives beside the unpacked trees, which may have been repacked."""
    from torchvision.datasets import Omniglot

    Omniglot.zips_md5 = dict.fromkeys(Omniglot.zips_md5)


def _timed(draw: Callable[[], Any], device: str) -> tuple[Any, float]:
    import torch

    started = time.perf_counter()
    drawn = draw()
    if device != "cpu":
        torch.cuda.synchronize()
    return drawn, time.perf_counter() - started


class _Batch(NamedTuple):
    """Tasks as `Episodes` names them, one by one."""

    support_x: tuple[Any, ...]
    support_y: tuple[Any, ...]
    query_x: tuple[Any, ...]
    query_y: tuple[Any, ...]


def _batch(l2l: Any, tasks: Any, preset: Preset, device: str) -> _Batch:
    """Drawn, moved and split by learn2learn's `partition_task` one after the other."""
    drawn = []
    for _ in range(preset.tasks):
        x, y = tasks.sample()
        (support_x, support_y), (query_x, query_y) = l2l.data.partition_task(
            x.to(device), y.to(device), shots=preset.shots
        )
        drawn.append((support_x, support_y, query_x, query_y))
    return _Batch(*zip(*drawn, strict=True))


def _from_files(l2l: Any, preset: Preset, root: str) -> Any:
    """The taskset of learn2learn's own benchmark definition, which decodes each image when it is drawn."""
    images = preset.shots + preset.queries
    return l2l.vision.benchmarks.get_tasksets(
        "omniglot", preset.ways, images, preset.ways, images, num_tasks=-1, root=root
    ).train


def _in_memory(l2l: Any, preset: Preset, root: str, device: str) -> Any:
    """The same pieces over `OnDeviceDataset`, as `get_tasksets(device=...)` means to build them, and does not."""
    from PIL.Image import Resampling
    from torchvision import transforms

    prepare = transforms.Compose(
        [transforms.Resize(28, interpolation=Resampling.LANCZOS), transforms.ToTensor(), lambda x: 1.0 - x]
    )
    files = l2l.vision.datasets.FullOmniglot(root=root, transform=prepare)
    dataset = l2l.data.MetaDataset(l2l.data.OnDeviceDataset(files, device=device))
    characters = list(range(CHARACTERS))
    random.shuffle(characters)
    steps = l2l.data.transforms
    return l2l.data.Taskset(
        dataset,
        [
            steps.FusedNWaysKShots(
                dataset, n=preset.ways, k=preset.shots + preset.queries, filter_labels=characters[:TRAINING]
            ),
            steps.LoadData(dataset),
            steps.RemapLabels(dataset),
            steps.ConsecutiveLabels(dataset),
            l2l.vision.transforms.RandomClassRotation(dataset, [0.0, 90.0, 180.0, 270.0]),
        ],
        num_tasks=-1,
    )
