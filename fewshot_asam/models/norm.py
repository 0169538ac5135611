"""A norm on the statistics of the batch at hand that `vmap` differentiates twice correctly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
"""Added to the variance, as in `torch.nn.BatchNorm2d`."""


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
        return x * per_channel(scale) + per_channel(shift)


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


def per_channel(value: Tensor) -> Tensor:
    """`[C]` as `[1, C, 1, 1]`."""
    return value.view(1, -1, 1, 1)
