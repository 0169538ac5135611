"""What a run's settings stand for: its device, its data, its untrained meta-learner."""

from __future__ import annotations

from typing import Any

import torch

from fewshot_asam.data import Dataset, load_dataset
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.runtime import distributed
from fewshot_asam.training.config import TrainConfig


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for; raises `FewShotError` where there is no such."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise FewShotError("device is 'cuda', but this machine has no usable CUDA device; use --device cpu or auto")
    if not available or name == "cpu":
        return torch.device("cpu")
    if distributed.size() == 1:
        return torch.device("cuda")
    own, gpus = distributed.local_rank(), torch.cuda.device_count()
    if own >= gpus:
        raise FewShotError(
            f"process {own} of this machine has no GPU of its own, as {gpus} are visible; start at most {gpus} "
            "processes a machine, or use --device cpu"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def load_data(config: TrainConfig, device: torch.device) -> Dataset:
    """The run's dataset, resident on `device`; raises `FewShotError` where a split cannot give the run's tasks."""
    options: dict[str, Any] = {}
    if config.dataset == "folder":
        options = {"image_size": config.image_size, "split_csv": config.split_csv, "seed": config.split_seed}
        options |= {"fractions": config.split_fractions, "channels": config.channels}
    dataset = load_dataset(config.dataset, config.data_root, device=device, **options)
    for split, images in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test)):
        try:
            EpisodeSampler(images, config.ways, config.shots, config.queries)
        except FewShotError as error:
            raise FewShotError(f"{config.dataset}, {split}: {error}") from error
    return dataset


def build_learner(config: TrainConfig, image_shape: tuple[int, int, int]) -> MetaLearner:
    """The run's untrained meta-learner, on the CPU, whatever PyTorch's default device."""
    with torch.device("cpu"):
        model = build_model(
            config.model,
            config.ways,
            image_shape,
            config.hidden,
            config.seed,
            config.init,
            "default" if config.head_init == "default" else "zeros",
        )
    return MetaLearner(
        model,
        config.inner_lr,
        config.rule,
        adapt=config.adapt,
        validation=config.validation,
        norm=config.norm,
        zero_head=config.head_init == "zeros_every_task",
        first_order=config.first_order,
        engine=config.engine,
        torch_compile=config.torch_compile,
        recompute=config.recompute,
    )
