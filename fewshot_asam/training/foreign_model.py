"""A model of somebody's own in a run: made by its factory, tried on images, its head found and set to zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import Shape, adapted_names
from fewshot_asam.runtime.imports import imported, said_by
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import in_eval_mode
from fewshot_asam.training.given import Factory, require_factory
from fewshot_asam.verification.diagnosis import logits_from


def make(config: TrainConfig, image_shape: Shape, factory: Factory | None) -> nn.Module:
    """What the factory makes, or the one that the settings name, with PyTorch's generator seeded by the run's seed.

    Raises `FewShotError` where there is none, or where it makes no model.
    """
    if factory is None:
        factory = imported(config.model, "model")
        require_factory(factory, f"model {config.model!r}")
    torch.manual_seed(config.seed)
    try:
        model: object = factory(config.ways, image_shape)
    except FewShotError:
        raise
    except Exception as error:  # of anyone's code
        raise FewShotError(
            f"model {config.model!r} called with ({config.ways}, {image_shape}) failed ({said_by(error)}); expected a "
            "function of ways and image shape that returns an nn.Module"
        ) from error
    if not isinstance(model, nn.Module):
        raise FewShotError(f"model {config.model!r} returned a {type(model).__name__}; expected an nn.Module")
    return model


def begin(learner: MetaLearner, config: TrainConfig, image_shape: Shape) -> None:
    """Tries the model on images and does to its head what the settings say.

    Raises `FewShotError` where it cannot take them, or has other logits than one a class.
    """
    images = require_logits(learner, config, image_shape)
    if config.head_init == "default":
        return
    makers = logits_from(learner.inner_loop.model, ((images,), {}))
    head = sorted(makers) or list(adapted_names(learner.model, "head"))
    if config.head_init == "zeros":
        for name in head:
            nn.init.zeros_(learner.model.get_parameter(name))
    else:
        learner.zero_head = head
        learner.inner_loop  # noqa: B018  its own checks


def require_logits(learner: MetaLearner, config: TrainConfig, image_shape: Shape) -> Tensor:
    """Raises `FewShotError` where the model takes no images, or has no logit for each class; returns what was tried.

    A model that was made for the run has no others; one that came with a learner may.
    """
    device = next(learner.parameters()).device
    images = torch.rand(2 * config.ways, *image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
    images = images.to(device)
    try:
        with torch.no_grad(), in_eval_mode(learner.model):
            logits: object = learner(images)
    except FewShotError:
        raise
    except Exception as error:  # of anyone's code
        raise FewShotError(
            f"model {config.model!r} failed on images {list(images.shape)} ({said_by(error)})"
        ) from error
    if not _are_logits(logits, len(images), config.ways, exactly="learner" not in config.from_python):
        found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise FewShotError(
            f"model {config.model!r} returned {found} for {len(images)} images; expected logits "
            f"{[len(images), config.ways]}, one a class"
        )
    return images


def _are_logits(found: object, images: int, ways: int, exactly: bool) -> bool:
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != images:
        return False
    return found.shape[1] == ways or (found.shape[1] > ways and not exactly)
