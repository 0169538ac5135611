"""Conv4, its block fused where there are kernels for the device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam.models import cpu_kernels, gpu_kernels
from fewshot_asam.models.adapted import hooked
from fewshot_asam.models.initialisation import HeadInit, Init, initialise, initialise_head
from fewshot_asam.models.norm import EPS, TaskNorm, conv_var_mean, per_channel, var_mean
from fewshot_asam.models.shape import Shape, checked


class ConvBlock(nn.Module):
    """3x3 convolution, norm, ReLU and 2x2 max-pooling, computed as convolution, pooling, affine, ReLU.

    ReLU commutes with max-pooling, and so does the norm's affine map once the sign of its weight is folded into the
    convolution; the pooled tensors have a quarter of the elements. A bias before the norm would be dead: there is none.
    Where a patch has no more entries than there are filters, the norm's statistics come from `conv_var_mean`.
    Where they apply the whole block is `conv_block` of `cpu_kernels` or of `gpu_kernels`. Where its layers have
    hooks, as in pruning, it calls them one by one.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = TaskNorm(hidden)
        self.few_channels = 9 * channels <= hidden

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        if hooked(self.conv) or hooked(self.norm):
            return F.max_pool2d(F.relu(self.norm(self.conv(x), support)), 2)
        parameters = (self.conv.weight, self.norm.weight, self.norm.bias)
        for kernels in (cpu_kernels, gpu_kernels):
            if support is None and kernels.applies(x, *parameters):
                return kernels.conv_block(x, *parameters, EPS)  # type: ignore[no-any-return]
        sign = 1 - 2 * (self.norm.weight < 0).to(x.dtype)
        filters = self.conv.weight * sign.view(-1, 1, 1, 1)
        y = gpu_kernels.conv2d(x, filters)
        statistics = (
            conv_var_mean(x[:support], filters) if self.few_channels and y.dtype == x.dtype else var_mean(y[:support])
        )
        scale, shift = self.norm.coefficients(statistics, self.norm.weight * sign)
        return F.relu(F.max_pool2d(y, 2) * per_channel(scale) + per_channel(shift))


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
        channels, height, width = checked(image_shape, hidden)
        self.blocks = nn.ModuleList([ConvBlock(channels if i == 0 else hidden, hidden) for i in range(4)])
        self.head = nn.Linear(hidden * (height // 16) * (width // 16), ways)
        initialise(self, init)
        initialise_head(self.head, head_init)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, support)
        with cpu_kernels.float32_after(x):
            return self.head(x.flatten(1))  # type: ignore[no-any-return]
