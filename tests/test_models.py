"""Conv4 and ResNet12 against the same networks in plain `torch.nn`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import FewShotError
from fewshot_asam.models import (
    Conv4,
    ResNet12,
    TaskNorm,
    build_model,
    conv_var_mean,
    norm_layers,
    require_stateless,
    var_mean,
)

SHAPES = [(1, 28, 28), (3, 20, 17), (1, 16, 16)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randomised(model: nn.Module) -> nn.Module:
    """Norm weights of both signs, so that the folded sign is put to work."""
    draws = generator()
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=draws, dtype=torch.float64)
    return model.double()


def batch_norm(norm: TaskNorm, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=1e-5)


def plain_conv4(model: Conv4, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = F.max_pool2d(F.relu(batch_norm(block.norm, F.conv2d(x, block.conv.weight, padding=1))), 2)
    return model.head(x.flatten(1))


def plain_resnet12(model: ResNet12, x: Tensor) -> Tensor:
    for block in model.blocks:
        y = x
        for conv, norm in zip(block.convs[:2], block.norms[:2], strict=True):
            y = F.leaky_relu(batch_norm(norm, conv(y)), 0.1)
        y = batch_norm(block.norms[2], block.convs[2](y)) + batch_norm(block.shortcut_norm, block.shortcut(x))
        x = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
    return model.head(x.mean((2, 3)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", [4, 12])
@pytest.mark.parametrize(("kind", "plain"), [(Conv4, plain_conv4), (ResNet12, plain_resnet12)])
def test_equals_the_network_as_it_is_written_in_the_papers(kind, plain, hidden, shape) -> None:
    model = randomised(kind(5, shape, hidden))
    x = torch.rand(6, *shape, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(model, x), rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(f.square().sum(), list(model.parameters())) for f in (model(x), plain(model, x))]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-6)


def test_statistics_from_patches_equal_those_of_the_output() -> None:
    x = torch.rand(4, 3, 9, 7, generator=generator(), dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(
        conv_var_mean(x, weight), var_mean(F.conv2d(x, weight, padding=1)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", [Conv4, ResNet12])
def test_inductive_prediction_depends_on_the_support_set_alone(kind) -> None:
    model = randomised(kind(5, (1, 16, 16), 12))
    support, queries, others = torch.rand(3, 6, 1, 16, 16, generator=generator(), dtype=torch.float64)

    def logits(rest: Tensor) -> Tensor:
        return model(torch.cat([support, queries[:1], rest]), support=6)[6]

    torch.testing.assert_close(logits(queries[1:]), logits(others))
    transductive = [model(torch.cat([queries[:1], rest]))[0] for rest in (queries[1:], others)]
    assert (transductive[0] - transductive[1]).abs().max() > 1e-3


def test_numbers_of_parameters() -> None:
    """Of convolutions without their dead biases, norms and head."""
    convolutions = 64 * 9 + 3 * 64 * 64 * 9 + 4 * 2 * 64
    assert sum(p.numel() for p in Conv4(20, (1, 28, 28), 64).parameters()) == convolutions + 64 * 20 + 20
    assert Conv4(5, (3, 84, 84), 32).head.in_features == 32 * 5 * 5
    assert ResNet12(5, (3, 84, 84), 64).head.in_features == 640


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model("conv4", 5, (1, 28, 28), 8, seed=3)
    state = torch.random.get_rng_state()
    second = build_model("conv4", 5, (1, 28, 28), 8, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    other = build_model("conv4", 5, (1, 28, 28), 8, seed=4)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_layer_with_running_statistics_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(FewShotError, match=r"layer '1' \(BatchNorm2d\) keeps running statistics"):
        require_stateless(model)
    require_stateless(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)))


def test_norm_layers_are_found() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), TaskNorm(2), nn.GroupNorm(1, 2), nn.ReLU())
    assert norm_layers(model) == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "message"),
    [
        ("conv5", (1, 28, 28), 8, "model is 'conv5'; expected one of conv4, resnet12"),
        ("conv4", (1, 15, 28), 8, "images are 15x28"),
        ("resnet12", (1, 28, 28), 0, "hidden is 0"),
    ],
)
def test_bad_input(name, shape, hidden, message) -> None:
    with pytest.raises(FewShotError, match=message):
        build_model(name, 5, shape, hidden, seed=0)
