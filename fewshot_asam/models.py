"""Conv4 and ResNet12, with a norm on the statistics of the batch at hand that `vmap` differentiates twice correctly.

Both models take `forward(x, support=None)`: with `support=n` the first `n` images alone give the norm's statistics,
which is how an inductive prediction is made without knowledge of the other queries; without it all images of `x` do
(transductive).
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import fused
from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.initial import HeadInit, Init, initialise, initialise_head

EPS = 1e-5
"""Added to the variance, as in `torch.nn.BatchNorm2d`."""
Shape = tuple[int, int, int]
"""Of an image: `(C, H, W)`."""


class TaskNorm(nn.Module):
    """Batch norm on batch statistics, without running ones, written in primitives.

    `F.batch_norm` under `vmap` gives wrong second-order gradients (https://github.com/pytorch/functorch/issues/534).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def coefficients(self, var_mean: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift `[C]`, so that the normalised `x` is `x * scale + shift`."""
        var, mean = var_mean
        scale = weight * torch.rsqrt(var + EPS)
        return scale, self.bias - mean * scale

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        scale, shift = self.coefficients(var_mean(x[:support]), self.weight)
        return x * _per_channel(scale) + _per_channel(shift)


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel of `x [n, C, H, W]`, both `[C]`, in single precision at least."""
    return torch.var_mean(x.float() if x.dtype == torch.bfloat16 else x, dim=(0, 2, 3), correction=0)


def conv_var_mean(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`var_mean(F.conv2d(x, weight, padding=1))` from the mean and covariance of the 3x3 patches of `x`.

    With `M` the mean patch and `C` the covariance of patches, a filter's output has the mean `w.M` and the variance
    `w.C.w`. For images with few channels this spares the forward and the (double) backward a pass over the output.
    """
    patches = F.unfold(x, 3, padding=1)  # [n, 9*C, H*W]
    count = patches.shape[0] * patches.shape[2]
    mean = patches.sum(2).sum(0) / count
    centred = patches - mean.unsqueeze(1)
    covariance = torch.bmm(centred, centred.transpose(1, 2)).sum(0) / count
    filters = weight.flatten(1)
    return ((filters @ covariance) * filters).sum(1), filters @ mean


def _per_channel(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)


class ConvBlock(nn.Module):
    """3x3 convolution, norm, ReLU and 2x2 max-pooling, computed as convolution, pooling, affine, ReLU.

    ReLU commutes with max-pooling, and so does the norm's affine map once the sign of its weight is folded into the
    convolution; the pooled tensors have a quarter of the elements. A bias before the norm would be dead: there is none.
    Where a patch has no more entries than there are filters, the norm's statistics come from `conv_var_mean`.
    On a CPU the whole block is `fused.conv_block` where that applies.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = TaskNorm(hidden)
        self.few_channels = 9 * channels <= hidden

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        parameters = (self.conv.weight, self.norm.weight, self.norm.bias)
        if support is None and fused.applies(x, *parameters):
            return fused.conv_block(x, *parameters, EPS)
        sign = 1 - 2 * (self.norm.weight < 0).to(x.dtype)
        filters = self.conv.weight * sign.view(-1, 1, 1, 1)
        y = F.conv2d(x, filters, padding=1)
        statistics = (
            conv_var_mean(x[:support], filters) if self.few_channels and y.dtype == x.dtype else var_mean(y[:support])
        )
        scale, shift = self.norm.coefficients(statistics, self.norm.weight * sign)
        return F.relu(F.max_pool2d(y, 2) * _per_channel(scale) + _per_channel(shift))


class Conv4(nn.Module):
    """The four-block convolutional network of Vinyals et al. (2016) and Finn et al. (2017), with a linear head.

    **Arguments:**

    - `ways`: `N`, the number of logits.
    - `image_shape`: `(C, H, W)`; sides of at least 16.
    - `hidden`: filters of each block; 64 in Sharp-MAML's protocol, 32 in Finn's for Mini-ImageNet.
    - `init`, `head_init`: the initial weights, of the linear layer too; see `initialise` and `initialise_head`.

    `forward` maps `[n, C, H, W]` to logits `[n, N]`.
    """

    def __init__(
        self, ways: int, image_shape: Shape, hidden: int = 64, init: Init = "pytorch", head_init: HeadInit = "default"
    ) -> None:
        super().__init__()
        channels, height, width = _checked(image_shape, hidden)
        self.blocks = nn.ModuleList([ConvBlock(channels if i == 0 else hidden, hidden) for i in range(4)])
        self.head = nn.Linear(hidden * (height // 16) * (width // 16), ways)
        initialise(self, init)
        initialise_head(self.head, head_init)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, support)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with norm, a 1x1 shortcut, leaky ReLU (0.1) and 2x2 max-pooling."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        widths = [channels, hidden, hidden, hidden]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)])
        self.norms = nn.ModuleList([TaskNorm(hidden) for _ in range(3)])
        self.shortcut = nn.Conv2d(channels, hidden, 1, bias=False)
        self.shortcut_norm = TaskNorm(hidden)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        y = x
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y), support)
            y = F.leaky_relu(y, 0.1) if depth < 2 else y
        y = y + self.shortcut_norm(self.shortcut(x), support)
        return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


class ResNet12(nn.Module):
    """ResNet-12 as in Oreshkin et al. (2018) and Lee et al. (2019), without dropout: 12 convolutions in four blocks.

    **Arguments:** as `Conv4`'s; `hidden` is the width of the first block, the others have 2.5, 5 and 10 times as many.
    """

    def __init__(
        self, ways: int, image_shape: Shape, hidden: int = 64, init: Init = "pytorch", head_init: HeadInit = "default"
    ) -> None:
        super().__init__()
        channels, _, _ = _checked(image_shape, hidden)
        widths = [channels, hidden, hidden * 5 // 2, hidden * 5, hidden * 10]
        self.blocks = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(widths[-1], ways)
        initialise(self, init)
        initialise_head(self.head, head_init)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, support)
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


Adapt = Literal["all", "head", "body", "no_norm"]
"""Which parameters the inner loop changes."""
OURS = (Conv4, ResNet12)
"""Models whose derivatives the tests compare with finite differences, so that nobody else needs to."""
ModelName = Literal["conv4", "resnet12"]


def build_model(
    name: ModelName,
    ways: int,
    image_shape: Shape,
    hidden: int,
    seed: int,
    init: Init = "pytorch",
    head_init: HeadInit = "default",
) -> nn.Module:
    """A `Conv4` or `ResNet12` whose initial weights depend on `seed` alone."""
    kinds = {"conv4": Conv4, "resnet12": ResNet12}
    require_one_of("model", name, tuple(kinds))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[name](ways, image_shape, hidden, init, head_init)


def takes_support(model: nn.Module) -> bool:
    """Whether the model's `forward` can be told which images give the norm's statistics."""
    return "support" in inspect.signature(model.forward).parameters


def norm_layers(model: nn.Module) -> list[str]:
    """Names of the layers that normalise, by their class's name: BatchNorm2d, GroupNorm, TaskNorm ..."""
    return [name for name, layer in model.named_modules() if re.search(r"Norm(\dd)?$", type(layer).__name__)]


def adapted_names(model: nn.Module, adapt: Adapt | Sequence[str]) -> tuple[str, ...]:
    """Names of the trainable parameters that the inner loop changes; see `meta.MetaLearner`."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    if not names:
        raise FewShotError(f"{type(model).__name__} has no trainable parameter; there is nothing to adapt")
    if not isinstance(adapt, str):
        return _matching(names, adapt, model)
    require_one_of("adapt", adapt, get_args(Adapt))
    owners = {name: name.rpartition(".")[0] for name in names}
    head, norms = owners[names[-1]], set(norm_layers(model))
    chosen = {
        "all": names,
        "head": [name for name in names if owners[name] == head],
        "body": [name for name in names if owners[name] != head],
        "no_norm": [name for name in names if owners[name] not in norms],
    }[adapt]
    if not chosen:
        raise FewShotError(f"adapt {adapt!r} leaves {type(model).__name__} no parameter to adapt; choose another")
    return tuple(chosen)


def _matching(names: Sequence[str], patterns: Sequence[str], model: nn.Module) -> tuple[str, ...]:
    """The names that one of the patterns fits, each of which must fit one."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise FewShotError(
                f"adapt has {pattern!r}, which fits no trainable parameter of {type(model).__name__}; expected names "
                f"or patterns such as {names[-1]!r} or '{names[-1].rpartition('.')[0] or names[-1]}*'"
            )
    chosen = tuple(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    if not chosen:
        raise FewShotError("adapt is empty; expected at least one name or pattern of parameters")
    return chosen


def fuses(model: nn.Module) -> bool:
    """Whether the model has blocks that run as `fused.conv_block` on a CPU of this machine."""
    return any(isinstance(layer, ConvBlock) for layer in model.modules()) and fused.available()


def require_replaceable(model: nn.Module) -> None:
    """Raises `FewShotError` for a model whose parameters cannot be put in by the inner loop."""
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise FewShotError(f"{kind} keeps its layers for itself; use the module in it: model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise FewShotError(f"{kind} is a TorchScript program, whose parameters stay; use the module as it is in Python")
    for name, value in model.named_parameters():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise FewShotError(f"parameter {name!r} has no shape yet; call the model on some images once, then pass it")
        if value.requires_grad and value.is_complex():
            raise FewShotError(
                f"parameter {name!r} is complex, for which the rules' norms are not made; use a real one with a last "
                "dimension of two, and torch.view_as_complex in forward"
            )


def require_stateless(model: nn.Module) -> None:
    """Raises `FewShotError` naming a layer that moves its running statistics, which every inner step would do.

    A layer in `eval()` mode uses them and leaves them alone.
    """
    for name, layer in model.named_modules():
        if layer.training and getattr(layer, "running_mean", None) is not None:
            raise FewShotError(
                f"layer {name!r} ({type(layer).__name__}) keeps running statistics, which adaptation would leak from "
                "task to task; expected norm layers on batch statistics: pass track_running_stats=False to them, or "
                "the model to fewshot_asam.models.drop_running_statistics; to use them as they are, call .eval() on it"
            )


def drop_running_statistics(model: nn.Module) -> nn.Module:
    """Makes every norm layer of `model` use the statistics of its batch alone, in place; returns the model."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return model


def _checked(image_shape: Shape, hidden: int) -> Shape:
    if min(image_shape[1:]) < 16:
        raise FewShotError(f"images are {image_shape[1]}x{image_shape[2]}; four poolings need sides of at least 16")
    if hidden < 1:
        raise FewShotError(f"hidden is {hidden}; expected at least 1 filter")
    return image_shape
