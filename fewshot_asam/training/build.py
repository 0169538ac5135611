"""What a run's settings stand for: its device, its data, its untrained meta-learner."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from fewshot_asam.data import Dataset, ImageSet, load_dataset
from fewshot_asam.data.images import joined
from fewshot_asam.data.preparation import prepared
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import MODELS, Shape, build_model, cpu_kernels
from fewshot_asam.models.initialisation import HeadInit
from fewshot_asam.rates import LearnedRates
from fewshot_asam.runtime import distributed
from fewshot_asam.training import foreign_model
from fewshot_asam.training.config import Part, TrainConfig
from fewshot_asam.training.given import Factory, require_given


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


def load_data(config: TrainConfig, device: torch.device, given: Dataset | None = None) -> Dataset:
    """The run's dataset, resident on `device`; raises `FewShotError` where a split cannot give the run's tasks.

    Fused blocks that are needed are compiled meanwhile.
    """
    if given is None:
        require_given(config, "model", "learner")
        fused = device.type == "cpu" and config.model == "conv4"
        with cpu_kernels.begun() if fused else nullcontext():
            dataset = load_dataset(config.dataset, config.data_root, device=device, **_options(config))
    else:
        dataset = given.to(device)
    training_images(config, dataset)
    for split, images in (("training", dataset.train), ("validation", dataset.val), ("test", dataset.test)):
        _require_tasks(config, images, f"{config.dataset}, {split}")
        if images.shape != dataset.train.shape:
            raise FewShotError(
                f"{config.dataset}, {split}: images are {images.shape}, but {dataset.train.shape} in training; "
                "expected one shape (C, H, W)"
            )
    return dataset


def training_images(config: TrainConfig, dataset: Dataset) -> ImageSet:
    """The images of the training classes, or of the `train_classes` that the run's seed chooses.

    The first so many of one random order, so that with one seed the fewer are among the more. Raises `FewShotError`
    where there are not so many.
    """
    images, wanted = dataset.train, config.train_classes
    if wanted is None:
        return images
    if wanted > len(images.names):
        raise FewShotError(f"train_classes is {wanted}, but {config.dataset} has {len(images.names)} training classes")
    order = torch.randperm(len(images.names), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    return images.of_classes({images.names[index] for index in order[:wanted].tolist()})


def test_images(config: TrainConfig, dataset: Dataset) -> ImageSet:
    """The images that the run is tested on, on the dataset's device and of its shape.

    Those of the dataset's test classes, or of the test classes of `test_dataset`, squashed and converted as the dataset
    `folder` does it. None of a folder's classes were trained on, so all of them are taken. Raises `FewShotError` where
    they cannot give the run's tasks.
    """
    name, shape = config.test_dataset, dataset.train.shape
    if name is None:
        return dataset.test
    root = config.test_data_root or config.data_root
    options: dict[str, Any] = {"image_size": shape[1], "channels": shape[0]} if name == "folder" else {}
    found = load_dataset(name, root, **options)
    images = joined([found.train, found.val, found.test]) if name == "folder" else found.test
    _require_tasks(config, images, f"{name}, test")
    resample = Image.Resampling.LANCZOS if shape[0] == 1 else Image.Resampling.BILINEAR
    fitted = images if images.shape == shape else replace(images, images=prepared(images.images, shape, resample))
    return fitted.to(dataset.test.images.device)


def _require_tasks(config: TrainConfig, images: ImageSet, what: str) -> None:
    try:
        EpisodeSampler(images, config.ways, config.shots, config.queries)
    except FewShotError as error:
        raise FewShotError(f"{what}: {error}") from error


def _options(config: TrainConfig) -> dict[str, Any]:
    if config.dataset != "folder":
        return {}
    names = {"image_size": "image_size", "split_csv": "split_csv", "channels": "channels"}
    names |= {"seed": "split_seed", "fractions": "split_fractions"}
    return {option: getattr(config, setting) for option, setting in names.items()}


def build_learner(config: TrainConfig, image_shape: Shape, factory: Factory | None = None) -> MetaLearner:
    """The run's untrained meta-learner, on the CPU, whatever PyTorch's default device.

    - `factory`: makes the model, if not the one that the settings name.

    Raises `FewShotError` where the learner or, without a factory, the model was given in Python, and for a model of
    somebody's own that cannot be made or has other logits than one a class.
    """
    others: tuple[Part, ...] = ("dataset",) if factory is None else ("dataset", "model")
    require_given(config, *others)
    own = factory is None and config.model in MODELS
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        model = _own_model(config, image_shape) if own else foreign_model.make(config, image_shape, factory)
        learner = MetaLearner(
            model,
            _rates(config, model),
            config.rule,
            adapt=config.adapt,
            validation=config.validation,
            norm=config.norm,
            zero_head=own and config.head_init == "zeros_every_task",
            first_order=config.first_order,
            engine=config.engine,
            torch_compile=config.torch_compile,
            recompute=config.recompute,
        )
        if not own:
            foreign_model.begin(learner, config, image_shape)
    return learner


def _rates(config: TrainConfig, model: nn.Module) -> float | LearnedRates:
    if config.learned_rates == "none":
        return config.inner_lr
    steps = config.inner_steps if config.learned_rates == "layer_and_step" else None
    return LearnedRates(model, config.learned_rates, lr=config.inner_lr, steps=steps)


def _own_model(config: TrainConfig, image_shape: Shape) -> nn.Module:
    head_init: HeadInit = "default" if config.head_init == "default" else "zeros"
    return build_model(config.model, config.ways, image_shape, config.hidden, config.seed, config.init, head_init)
