"""Conv4 and ResNet12, with a norm on the statistics of the batch at hand that `vmap` differentiates twice correctly.

Both models take `forward(x, support=None)`: with `support=n` the first `n` images alone give the norm's statistics,
which is how an inductive prediction is made without knowledge of the other queries; without it all images of `x` do
(transductive).
"""

from __future__ import annotations

import torch
from torch import nn

from fewshot_asam.errors import require_one_of
from fewshot_asam.models import cpu_kernels, gpu_kernels
from fewshot_asam.models.adapted import (
    Adapt,
    Adapted,
    adapted_names,
    drop_running_statistics,
    hooked,
    norm_layers,
    require_replaceable,
    require_stateless,
    running_norms,
    takes_support,
)
from fewshot_asam.models.conv4 import Conv4, ConvBlock
from fewshot_asam.models.initialisation import HeadInit, Init
from fewshot_asam.models.norm import TaskNorm, conv_var_mean, var_mean
from fewshot_asam.models.resnet12 import ResidualBlock, ResNet12
from fewshot_asam.models.shape import Shape

__all__ = [
    "MODELS",
    "OURS",
    "Adapt",
    "Adapted",
    "Conv4",
    "ConvBlock",
    "ResNet12",
    "ResidualBlock",
    "Shape",
    "TaskNorm",
    "adapted_names",
    "build_model",
    "conv_var_mean",
    "drop_running_statistics",
    "fuses",
    "gpu_kernels",
    "hooked",
    "norm_layers",
    "require_replaceable",
    "require_stateless",
    "running_norms",
    "takes_support",
    "var_mean",
]

MODELS = {"conv4": Conv4, "resnet12": ResNet12}
"""The models of this package, by name."""
OURS = {*MODELS.values(), ConvBlock, ResidualBlock, TaskNorm, nn.ModuleList, nn.Conv2d, nn.Linear}
"""The layers of which these are made. Tests compare them with finite differences, so that nobody else needs to."""


def build_model(
    name: str,
    ways: int,
    image_shape: Shape,
    hidden: int,
    seed: int,
    init: Init = "pytorch",
    head_init: HeadInit = "default",
) -> nn.Module:
    """One of `MODELS`, whose initial weights depend on `seed` alone."""
    require_one_of("model", name, tuple(MODELS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](ways, image_shape, hidden, init, head_init)


def fuses(model: nn.Module) -> bool:
    """Whether the model has blocks that run as `cpu_kernels.conv_block` on a CPU of this machine."""
    return any(isinstance(layer, ConvBlock) for layer in model.modules()) and cpu_kernels.available()
