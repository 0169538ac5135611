"""Odd images and values, and tensors that do not fit: the fused block does what the plain one does, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_asam import FewShotError
from fewshot_asam.models import ConvBlock, cpu_kernels
from fewshot_asam.models.cpu_kernels import build, ctypes_call
from fewshot_asam.models.norm import EPS
from kernel_cases import FILTERS, agree, make_block, make_images

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


FORMATS: dict[str, Callable[[int], Tensor]] = {
    "channels last": lambda c: make_images(3, c, 7, 6).to(memory_format=torch.channels_last),
    "transposed": lambda c: make_images(3, c, 6, 7).transpose(2, 3),
    "one image for all": lambda c: make_images(1, c, 7, 6).expand(3, -1, -1, -1),
    "one channel for all": lambda c: make_images(3, 1, 7, 6).expand(-1, c, -1, -1),
    "with an offset": lambda c: make_images(3 * c * 42 + 5)[5:].view(3, c, 7, 6),
    "every other": lambda c: make_images(6, c, 14, 12)[::2, :, ::2, ::2],
    "middle channels": lambda c: make_images(3, c + 2, 7, 6)[:, 1:-1],
    "an imaginary part": lambda c: torch.complex(make_images(3, c, 7, 6), make_images(3, c, 7, 6)).conj().imag,
    "negated lazily": lambda c: torch._neg_view(make_images(3, c, 7, 6)),
}


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, filters: int, with_gradient: bool) -> None:
    for channels in (1, 3):
        x = FORMATS[name](channels)
        agree(make_block(channels, filters), x.detach().requires_grad_() if with_gradient else x)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (3, 2), (3, 3), (5, 8)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_sizes(channels: int, size: tuple[int, int]) -> None:
    for filters in (1, 17, 32):
        agree(make_block(channels, filters), make_images(1, channels, *size))
        agree(make_block(channels, filters), make_images(2, channels, *size).requires_grad_())


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 1, 1), (2, 3, 1, 8), (3, 8, 8)])
def test_images_without_a_window_are_left_to_pytorch(shape: tuple[int, ...]) -> None:
    assert not cpu_kernels.applies(torch.zeros(shape))


def poison(place: str, value: float) -> Callable[[ConvBlock, Tensor], None]:
    def change(block: ConvBlock, x: Tensor) -> None:
        tensors = {"image": x, "filter": block.conv.weight, "gamma": block.norm.weight, "beta": block.norm.bias}
        tensors[place].data.view(-1)[-1] = value

    return change


VALUES: dict[str, Callable[[ConvBlock, Tensor], object]] = {
    **{f"{place} {v}": poison(place, v) for place in ("image", "filter", "gamma", "beta") for v in (torch.nan, 1e9)},
    **{f"{place} {v}": poison(place, v) for place in ("image", "filter") for v in (torch.inf, -torch.inf)},
    "constant images": lambda block, x: (x.data.fill_(1), block.conv.weight.data.mul_(8).round_().div_(8)),
    "images of zero": lambda block, x: x.data.zero_(),
    "huge": lambda block, x: x.data.mul_(1e100),
    "far from zero": lambda block, x: x.data.add_(1e4),
    "gamma of zero": lambda block, x: block.norm.weight.data.zero_(),
    "gamma of minus zero": poison("gamma", -0.0),
    "gamma and beta of zero": lambda block, x: (block.norm.weight.data.zero_(), block.norm.bias.data.zero_()),
    "filters of zero": lambda block, x: block.conv.weight.data.zero_(),
}


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", VALUES)
def test_values(name: str, filters: int, with_gradient: bool) -> None:
    """With and without a third derivative in view, which takes another way to the second."""
    for last_graph in (False, True):
        block, x = make_block(3, filters), make_images(3, 3, 7, 6).requires_grad_(with_gradient)
        VALUES[name](block, x)
        agree(block, x, last_graph)


@pytest.mark.parametrize("filters", FILTERS)
def test_the_gradient_of_a_sum_has_no_strides(filters: int) -> None:
    def found() -> list[Tensor]:
        block, x = make_block(3, filters), make_images(2, 3, 7, 6)
        block(x).sum().backward(create_graph=False)
        return [value.grad for value in block.parameters() if value.grad is not None]

    ours = found()
    with cpu_kernels.disabled():
        torch.testing.assert_close(ours, found())


@pytest.mark.parametrize(("channels", "at"), [(3, (0, slice(None), 10, 10)), (4, (0, slice(None), 0, 0))])
def test_single_precision_survives_an_outlier_where_the_sums_begin(channels: int, at: tuple[Any, ...]) -> None:
    block, x = make_block(channels, 32).float(), make_images(25, channels, 20, 20).float()
    x[at] = 1e5
    exact = make_block(channels, 32)

    def found(block: ConvBlock, x: Tensor) -> list[Tensor]:
        out = block(x)
        return [out, *torch.autograd.grad(out.square().sum(), [block.norm.weight, block.norm.bias])]

    with cpu_kernels.disabled():
        expected = found(exact, x.double())
    for mine, true in zip(found(block, x), expected, strict=True):
        assert (mine - true).abs().max() < 1e-5 * true.abs().max()


def tail_arguments() -> dict[str, Tensor | float]:
    """Of `tail_forward` for 2 images of 3 channels and 4x4 pixels."""
    y = make_images(2, 3, 4, 4).to(memory_format=torch.channels_last)
    best, out, place = ctypes_call.pooled(y), ctypes_call.pooled(y), ctypes_call.pooled(y, torch.uint8)
    ones = torch.ones(3, dtype=torch.float64)
    return {
        "eps": EPS, "y": y, "gamma": ones, "beta": ones, "best": best, "out": out, "place": place,
        "mean": ones.clone(), "rstd": ones.clone(),
    }  # fmt: skip


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "another type": ("gamma", Tensor.float),
    "whole numbers": ("place", lambda value: value.to(torch.int64)),
    "no storage": ("out", lambda value: value.to("meta")),
    "freed storage": ("mean", lambda value: (value.untyped_storage().resize_(0), value)[1]),
    "too short": ("beta", lambda value: value[:2]),
    "too long": ("beta", lambda value: value.repeat(2)),
    "gaps": ("rstd", lambda value: value.repeat(2)[::2]),
    "expanded": ("gamma", lambda value: value[:1].expand(3)),
    "channels first": ("y", lambda value: value.contiguous()),
    "sparse": ("gamma", Tensor.to_sparse),
    "negated lazily": ("gamma", torch._neg_view),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_address_is_taken_of_what_is_expected_alone(case: str) -> None:
    arguments = tail_arguments()
    y = arguments["y"]
    assert isinstance(y, Tensor)
    ctypes_call.call("tail_forward", y, *arguments.values())
    name, change = WRONG[case]
    value = arguments[name]
    assert isinstance(value, Tensor)
    arguments[name] = change(value)
    with pytest.raises(FewShotError, match=f"was given {name} of shape"):
        ctypes_call.call("tail_forward", y, *arguments.values())


def test_a_norm_of_another_size_is_refused() -> None:
    block = ConvBlock(3, 32)
    block.norm.weight = torch.nn.Parameter(torch.ones(40))
    block.norm.bias = torch.nn.Parameter(torch.zeros(40))
    with pytest.raises(FewShotError, match="expected"):
        block(torch.rand(2, 3, 8, 8))
