"""Networks for images of about 32 pixels: residual ones, wide ones, and one small enough for a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.imports import imported, said_by


def build_network(
    name: str, depth: int, width: int, image_shape: tuple[int, int, int], classes: int, seed: int
) -> nn.Module:
    """The network of that name; its initial weights depend on `seed` alone.

    **Arguments:**

    - `name`: `small`, `resnet`, `wide_resnet`, or `package.module:factory`.
    - `depth`: layers: 6n + 2 of `resnet` (20, 32, 56), 6n + 4 of `wide_resnet` (16, 28, 40); `small` has 4 always.
    - `width`: factor of the number of filters, 1 for 16, 32, 64.
    - `image_shape`: `(C, H, W)`.

    Raises `FewShotError` for a depth that the network cannot have, and where a factory fails or makes no network.
    """
    channels = image_shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in name:
            return _made(name, classes, image_shape)
        if name == "small":
            return Small(width, channels, classes)
        if name == "resnet":
            return ResNet(_blocks(name, depth, 2), width, channels, classes)
        return WideResNet(_blocks(name, depth, 4), width, channels, classes)


def _made(reference: str, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """What somebody's factory makes."""
    factory = imported(reference, "model")
    wanted = "expected a function of the number of classes and the image shape that returns an nn.Module"
    try:
        network: object = factory(classes, image_shape)
    except Exception as error:  # of anyone's code
        raise FewShotError(f"model {reference!r} failed ({said_by(error)}); {wanted}") from error
    if not isinstance(network, nn.Module):
        raise FewShotError(f"model {reference!r} returned a {type(network).__name__}; {wanted}")
    return network


def _blocks(name: str, depth: int, others: int) -> int:
    if depth < 6 + others or (depth - others) % 6:
        raise FewShotError(f"depth is {depth}; expected 6n + {others} of {name}, such as {18 + others}")
    return (depth - others) // 6


class Small(nn.Sequential):
    """Three 3x3 convolutions, each with norm and ReLU, at 16, 8 and 4 pixels, a mean over places and a linear layer."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        filters = [width * count for count in (16, 32, 64)]
        layers: list[nn.Module] = []
        for before, after in zip([channels, *filters], filters, strict=False):
            stride = 2 if not layers else 1
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if len(layers) > 3 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters[-1], classes))


class ResNet(nn.Module):
    """He et al. 2016, section 4.2: three stages of `blocks` blocks, with 1x1 convolutions where the shape changes."""

    def __init__(self, blocks: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        filters = 16 * width
        self.first = nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()
        )
        self.stages = nn.Sequential(*_stages(BasicBlock, blocks, filters, filters))
        self.head = nn.Linear(4 * filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of images `[n, C, H, W]`."""
        logits: Tensor = self.head(self.stages(self.first(x)).mean((2, 3)))
        return logits


class WideResNet(nn.Module):
    """Zagoruyko & Komodakis 2016: norm and ReLU before each convolution, `width` times as many filters."""

    def __init__(self, blocks: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stages = nn.Sequential(*_stages(PreActivationBlock, blocks, 16, 16 * width))
        self.norm = nn.BatchNorm2d(64 * width)
        self.head = nn.Linear(64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of images `[n, C, H, W]`."""
        logits: Tensor = self.head(F.relu(self.norm(self.stages(self.first(x)))).mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(before, after, stride), _conv(after, after, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.around = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolution, norm, ReLU, convolution, norm, sum, ReLU."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.around(x))


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1, self.conv2 = _conv(before, after, stride), _conv(after, after, 1)
        self.around = None if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norm, ReLU, convolution, twice, and the sum."""
        active = F.relu(self.norm1(x))
        y: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (x if self.around is None else self.around(active))


def _conv(before: int, after: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _stages(block: type[nn.Module], blocks: int, first: int, filters: int) -> list[nn.Module]:
    widths = [first] + [filters * factor for factor in (1, 2, 4) for _ in range(blocks)]
    strides = [2 if index in (blocks, 2 * blocks) else 1 for index in range(3 * blocks)]
    return [block(*each) for each in zip(widths, widths[1:], strides, strict=False)]
