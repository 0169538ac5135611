"""Models as other people write them, in float64 and small: for the table of what can be trained and what is refused."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from peers import import_learn2learn

WAYS = 3
SIDE = 16


def head(features: int) -> nn.Linear:
    return nn.Linear(features, WAYS)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)


class Net(nn.Module):
    """Features, softplus, the mean over places, a head."""

    def __init__(self, *features: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(*features), head(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.features(x)).mean((2, 3)))


def conv(inputs: int = 1, outputs: int = 4, stride: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def normed(norm: Callable[[int], nn.Module]) -> nn.Module:
    return Net(conv(), norm(4), nn.Softplus(), conv(4), norm(4))


class Calls(nn.Module):
    """A norm that is called, not registered as a layer."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.function = function
        self.scale, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale, self.shift)


def functional_batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, scale, shift, training=True)


def native_batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.native_batch_norm(x, scale, shift, None, None, True, 0.1, 1e-5)[0]


def functional_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, scale.shape, scale, shift)


def native_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.native_layer_norm(x, scale.shape, scale, shift, 1e-5)[0]


def frozen(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(norm.num_features))
        norm.running_var.copy_(torch.rand(norm.num_features) + 0.5)
    return norm.eval()


class BasicBlock(nn.Module):
    """As in torchvision's ResNet18, with a shortcut that halves the side."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = batch_norm(outputs), batch_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), batch_norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))


class InvertedResidual(nn.Module):
    """As in MobileNetV2: expand, depthwise, project."""

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        wide = channels * expansion
        self.conv = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), batch_norm(wide), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), batch_norm(wide), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(wide, channels, 1, bias=False), batch_norm(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, two linear layers with GELU, a scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.project = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).movedim(1, -1))
        return x + (self.scale * self.project(F.gelu(self.expand(y)))).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class ViT(nn.Module):
    """Patches, a class token, positions, PyTorch's own transformer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Attends(nn.Module):
    """Calls `scaled_dot_product_attention` itself, without a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(SIDE, 3 * 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x.squeeze(1)).view(len(x), SIDE, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(SIDE, 5, batch_first=True), head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.squeeze(1))[0][:, -1])


class TwoNames(nn.Module):
    """As in learn2learn's OmniglotCNN: the same layers under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(), nn.Softplus(), conv(4))
        self.net = nn.Sequential(self.encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class TiedWeights(nn.Module):
    """One parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(1, 4), nn.ModuleList([conv(4, 4, 1) for _ in range(2)])
        self.second[1].weight = self.second[0].weight
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.first(x))
        return self.head(self.second[1](F.softplus(self.second[0](x))).mean((2, 3)))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


class Square(torch.autograd.Function):
    """A function with a backward that can be differentiated, for autograd alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class SquareForFunc(torch.autograd.Function):
    """The same as `torch.func` wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class DetachedSquare(torch.autograd.Function):
    """Its gradient is right and is taken for a constant in the second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.factor * grad


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class StraightThrough(nn.Module):
    """Signs, with the gradient of the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.sign() - x).detach()


class Counts(nn.Module):
    """A running mean kept by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


class SinglePrecision(nn.Module):
    """Computes in single precision, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.float(), self.weight.float(), stride=2).to(x.dtype)


class Cosine(nn.Module):
    """A classifier by cosine similarity, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = conv(), nn.Parameter(torch.randn(WAYS, 4))
        self.temperature = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        features = F.softplus(self.conv(x)).mean((2, 3))
        return self.temperature * F.normalize(features) @ F.normalize(self.weight).T


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum().item() > -1e9 else -self.net(x)


class Checkpointed(nn.Module):
    """Runs a part again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(conv(1, 4), nn.Tanh(), conv(4))
        self.head = head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.part, x, use_reentrant=False).mean((2, 3)))


class Linear(nn.Module):
    """Two layers, of which the first is called by `call`, as a function of itself and the images."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.layer, self.head = call, nn.Linear(SIDE * SIDE, 4), head(4)
        self.kept: Any = None
        self.listed = [self.layer.weight, self.layer.bias]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(self, x.flatten(1))))


def keeps_its_features(net: Any, x: Tensor) -> Tensor:
    net.kept = net.layer(x)
    return net.kept


def keeps_its_weight(net: Any, x: Tensor) -> Tensor:
    net.kept = torch.tanh(net.layer.weight) if net.kept is None else net.kept
    return x @ net.kept.T


def keeps_a_running_mean(net: Any, x: Tensor) -> Tensor:
    features = net.layer(x)
    net.kept = 0.9 * (0 if net.kept is None else net.kept) + 0.1 * features.detach().mean()
    return features - net.kept


def draws_elsewhere(net: Any, x: Tensor) -> Tensor:
    return net.layer(x) + random.random()


class Localised(nn.Module):
    """A spatial transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.net = nn.Linear(SIDE * SIDE, 6), Net(conv())

    def forward(self, x: Tensor) -> Tensor:
        places = torch.eye(2, 3, dtype=x.dtype) + 0.1 * self.where(x.flatten(1)).view(-1, 2, 3)
        return self.net(F.grid_sample(x, F.affine_grid(places, x.shape, align_corners=False), align_corners=False))


class Tokens(nn.Module):
    """Pixels as numbers of an embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4, **options), head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding((7 * x.flatten(1)).long()).mean(1)))


def scripted(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(layer)


def of_learn2learn(make: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        from fewshot_asam.models import drop_running_statistics

        return drop_running_statistics(make(import_learn2learn().vision.models))

    return made


def learn2learn_residual_blocks() -> nn.Module:
    """The first two of ResNet12's four blocks, with 4 and 8 channels in place of 64 and 160."""
    resnet12 = importlib.import_module("learn2learn.vision.models.resnet12")
    widths = ((1, 4), (4, 8))
    shortcuts = (nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b)) for a, b in widths)
    blocks = (resnet12.BasicBlock(a, b, 2, cut) for (a, b), cut in zip(widths, shortcuts, strict=True))
    return Net(*blocks, width=8)


def learn2learn_wide_block() -> nn.Module:
    wrn28 = importlib.import_module("learn2learn.vision.models.wrn28")
    return Net(conv(), wrn28.wide_basic(4, 4, 0.0, 1))


class Padded(nn.Module):
    """Its images, enlarged to what a network of learn2learn's is made for."""

    def __init__(self, net: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.interpolate(x, self.shape[1:], mode="bilinear").expand(-1, self.shape[0], -1, -1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "learn2learn OmniglotFC": of_learn2learn(lambda m: nn.Sequential(nn.Flatten(), m.OmniglotFC(256, WAYS, [16, 8]))),
    "learn2learn OmniglotCNN": of_learn2learn(lambda m: Padded(m.OmniglotCNN(WAYS, 4, 4), (1, 28, 28))),
    "learn2learn MiniImagenetCNN": of_learn2learn(lambda m: Padded(m.MiniImagenetCNN(WAYS, 2, 4), (3, 84, 84))),
    "learn2learn CNN4": of_learn2learn(lambda m: m.CNN4(WAYS, 4, 4, channels=1, embedding_size=4)),
    "learn2learn ResNet12's blocks": of_learn2learn(lambda _: learn2learn_residual_blocks()),
    "learn2learn WRN28's block": of_learn2learn(lambda _: learn2learn_wide_block()),
    "ResNet18 block": lambda: Net(BasicBlock(1, 4, 2), BasicBlock(4, 4, 1)),
    "MobileNetV2 block": lambda: Net(conv(), InvertedResidual(4)),
    "ConvNeXt block": lambda: Net(conv(), ConvNeXtBlock(4)),
    "squeeze and excitation": lambda: Net(conv(), SqueezeExcite(4)),
    "ViT": ViT,
    "ViT with dropout": lambda: ViT(0.1),
    "scaled_dot_product_attention": Attends,
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "BatchNorm2d": lambda: normed(batch_norm),
    "BatchNorm2d in eval()": lambda: normed(lambda channels: frozen(nn.BatchNorm2d(channels))),
    "BatchNorm2d with running statistics": lambda: normed(nn.BatchNorm2d),
    "F.batch_norm": lambda: normed(lambda _: Calls(functional_batch_norm)),
    "torch.native_batch_norm": lambda: normed(lambda _: Calls(native_batch_norm)),
    "F.layer_norm": lambda: Net(conv(), Calls(functional_layer_norm, 8)),
    "torch.native_layer_norm": lambda: Net(conv(), Calls(native_layer_norm, 8)),
    "GroupNorm": lambda: normed(lambda channels: nn.GroupNorm(2, channels)),
    "InstanceNorm2d": lambda: normed(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    "RMSNorm": lambda: Net(conv(), nn.RMSNorm(8)),
    "weight norm": lambda: Net(parametrizations.weight_norm(conv())),
    "spectral norm": lambda: Net(parametrizations.spectral_norm(conv())),
    "spectral norm in eval()": lambda: Net(parametrizations.spectral_norm(conv()).eval()),
    "orthogonal": lambda: nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(SIDE * SIDE, 4)), head(4)),
    "parametrization of one's own": lambda: Net(parametrize.register_parametrization(conv(), "weight", Symmetric())),
    "dropout": lambda: Net(conv(), nn.Dropout2d(0.3), conv(4), nn.Dropout(0.3)),
    "module of two names": TwoNames,
    "tied weights": TiedWeights,
    "cosine classifier": Cosine,
    "PReLU": lambda: Net(conv(), nn.PReLU(4), conv(4)),
    "autograd function": lambda: Net(conv(), Applies(Square.apply)),
    "autograd function for torch.func": lambda: Net(conv(), Applies(SquareForFunc.apply)),
    "autograd function with a detached gradient": lambda: Net(conv(), Applies(DetachedSquare.apply)),
    "autograd function differentiable once": lambda: Net(conv(), Applies(OnceOnly.apply)),
    "straight-through estimator": lambda: Net(conv(), StraightThrough(), conv(4)),
    "buffer of one's own": lambda: Net(conv(), Counts()),
    "single precision inside": lambda: Net(SinglePrecision()),
    "branches by value": DataDependent,
    "checkpoint": Checkpointed,
    "features kept in an attribute": lambda: Linear(keeps_its_features),
    "weights kept in an attribute": lambda: Linear(keeps_its_weight),
    "running mean in an attribute": lambda: Linear(keeps_a_running_mean),
    "parameters in a list": lambda: Linear(lambda net, x: F.linear(x, *net.listed)),
    "input changed in place": lambda: Linear(lambda net, x: net.layer(x.sub_(0.5))),
    "noise of Python's own": lambda: Linear(draws_elsewhere),
    "Gumbel-softmax": lambda: Linear(lambda net, x: F.gumbel_softmax(net.layer(x))),
    "Gumbel-softmax, hard": lambda: Linear(lambda net, x: F.gumbel_softmax(net.layer(x), hard=True)),
    "no_grad inside": lambda: Linear(lambda net, x: net.layer(x) * net.layer(x).detach()),
    "spatial transformer": Localised,
    "embedding": Tokens,
    "embedding with max_norm": lambda: Tokens(max_norm=0.1),
    "sparse embedding": lambda: Tokens(sparse=True),
    "TorchScript layer": lambda: Net(conv(), scripted(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh()))),
    "DataParallel": lambda: nn.DataParallel(Net(conv())),
}
