"""ResNet-12."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam.models.initialisation import HeadInit, Init, initialise, initialise_head
from fewshot_asam.models.norm import TaskNorm
from fewshot_asam.models.shape import Shape, checked


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
        channels, _, _ = checked(image_shape, hidden)
        widths = [channels, hidden, hidden * 5 // 2, hidden * 5, hidden * 10]
        self.blocks = nn.ModuleList([ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.head = nn.Linear(widths[-1], ways)
        initialise(self, init)
        initialise_head(self.head, head_init)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, support)
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]
