"""Odd images, values and surroundings: the fused block does what the plain one does, or says why not."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_asam import FewShotError, fused
from fewshot_asam.fused import build, compiled, first
from fewshot_asam.models import EPS, ConvBlock

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")

FILTERS = [5, 16]
"""Of a first block with its convolution apart, and of one in one piece."""


def make_block(channels: int, filters: int) -> ConvBlock:
    torch.manual_seed(0)
    block = ConvBlock(channels, filters).double()
    with torch.no_grad():
        block.norm.weight.copy_(torch.linspace(-1, 2, filters))
        block.norm.bias.normal_()
    return block


def make_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def derivatives(block: ConvBlock, x: Tensor, last_graph: bool = False) -> list[Tensor]:
    """The output and both orders of gradients, each of a random projection of all that it follows."""
    generator = torch.Generator().manual_seed(2)
    values = [*([x] if x.requires_grad else []), *block.parameters()]
    found: list[Tensor] = [block(x)]
    latest = found
    for order in (1, 2):
        projection = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in latest)
        latest = list(
            torch.autograd.grad(
                projection, values, create_graph=order < 2 or last_graph, allow_unused=True, materialize_grads=True
            )
        )
        found += latest
    return found


def agree(block: ConvBlock, x: Tensor, last_graph: bool = False) -> None:
    assert fused.applies(x, *block.parameters())
    ours = derivatives(block, x, last_graph)
    with fused.disabled():
        theirs = derivatives(block, x, last_graph)
    for mine, expected in zip(ours, theirs, strict=True):
        scale = expected.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9 * (1e-3 + scale), equal_nan=True)


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
    assert not fused.applies(torch.zeros(shape))


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
    with fused.disabled():
        torch.testing.assert_close(ours, found())


@pytest.mark.parametrize("filters", FILTERS)
def test_saved_tensors_may_come_back_in_another_format(filters: int) -> None:
    block, x = make_block(3, filters), make_images(2, 3, 7, 6)
    expected = derivatives(block, x)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: value.detach().clone(memory_format=torch.contiguous_format), lambda value: value
    ):
        torch.testing.assert_close(block(x).square().sum(), expected[0].square().sum())
        loss = block(x).square().sum()
    grads = torch.autograd.grad(loss, list(block.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(block(x).square().sum(), list(block.parameters())))


def shift_data(x: Tensor) -> None:
    x.data.add_(1)


def shift_array(x: Tensor) -> None:
    x.numpy()[0] += 1


def shift_view(x: Tensor) -> None:
    x.data.view(-1)[3] = 5


def shift_in_inference(x: Tensor) -> None:
    with torch.inference_mode():
        x.add_(1)


def other_data(x: Tensor) -> None:
    x.data = x.data + 1


def other_size(x: Tensor) -> None:
    x.data = x.data[:1, :, 1:].clone()


@pytest.mark.parametrize(
    "change", [shift_data, shift_array, shift_view, shift_in_inference, other_data, other_size, Tensor.neg_]
)
def test_images_that_changed_are_looked_at_again(change: Callable[[Tensor], object]) -> None:
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    block(x)
    change(x)
    agree(block, x)


def test_images_seen_without_gradients_first_can_be_trained_on() -> None:
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    with torch.inference_mode():
        block(x)
    agree(block, x)


def test_images_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, prepared = make_block(3, 16), make_images(2, 3, 6, 6), []
    genuine = first._prepared
    monkeypatch.setattr(first, "_prepared", lambda images: prepared.append(1) or genuine(images))
    derivatives(block, x)
    block(x)
    assert len(prepared) == 1


def test_many_threads_at_once() -> None:
    """Of Python, on shared images that some of them see for the first time, and of OpenMP."""
    block, threads = make_block(3, 16), torch.get_num_threads()
    images = [make_images(2, 3, 9, 6) + shift for shift in range(4)]
    expected = [derivatives(block, x) for x in images]
    torch.set_num_threads(16)
    try:
        with ThreadPoolExecutor(8) as pool:
            for found, true in zip(pool.map(partial(derivatives, block), images * 8), expected * 8, strict=True):
                torch.testing.assert_close(found, true)
    finally:
        torch.set_num_threads(threads)


def test_a_forked_process_can_go_on() -> None:
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    expected = block(x).sum().item()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(forked, (block.state_dict(), x)).get(timeout=60) == pytest.approx(expected)


def forked(state: dict[str, Tensor], x: Tensor) -> float:
    block = make_block(3, 16)
    block.load_state_dict(state)
    return float(block(x).sum().item())


SURROUNDINGS = {
    "with torch.device": "torch.device('meta').__enter__()",
    "a default device": "torch.set_default_device('meta')",
    "float64": "torch.set_default_dtype(torch.float64)",
    "float16": "torch.set_default_dtype(torch.float16)",
    "inference mode before": "with torch.inference_mode(): model(x)",
}
CODE = """
import torch
from fewshot_asam.models import build_model
model, x = build_model("conv4", 3, (3, 16, 16), {filters}, 0), torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)
def found():
    gradients = torch.autograd.grad(model(x.clone()).square().sum(), list(model.parameters()), create_graph=True)
    return [*gradients, *torch.autograd.grad(sum(v.square().sum() for v in gradients), list(model.parameters()))]
expected = found()
{surroundings}
print(all(torch.equal(a, b) for a, b in zip(found(), expected)))
"""


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(name: str) -> None:
    """In a process of its own: an address that is not one ends it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fused.__file__).parents[2])}
    code = CODE.format(filters=32, surroundings=SURROUNDINGS[name])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def traced(block: ConvBlock, x: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(block)(torch.zeros_like(x))(x)


def forward_mode(block: ConvBlock, x: Tensor) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).primal


def scripted(block: ConvBlock, x: Tensor) -> Any:
    return torch.jit.trace(block, torch.zeros_like(x), check_trace=False)(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [traced, forward_mode, scripted])
def test_what_observes_operations_sees_them(way: Callable[[ConvBlock, Tensor], Tensor]) -> None:
    """What records a call on some images computes others rightly."""
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    torch.testing.assert_close(way(block, x), block(x))


def test_fake_tensors_have_no_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        image = mode.from_tensor(x)
        assert block(image).shape == (2, 16, 3, 3)
    assert not fused.applies(image)
    assert not fused.applies(x.to_sparse())


def tail_arguments() -> dict[str, Tensor | float]:
    """Of `tail_forward` for 2 images of 3 channels and 4x4 pixels."""
    y = make_images(2, 3, 4, 4).to(memory_format=torch.channels_last)
    best, out, place = compiled.pooled(y), compiled.pooled(y), compiled.pooled(y, torch.uint8)
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
    compiled.call("tail_forward", y, *arguments.values())
    name, change = WRONG[case]
    value = arguments[name]
    assert isinstance(value, Tensor)
    arguments[name] = change(value)
    with pytest.raises(FewShotError, match=f"was given {name} of shape"):
        compiled.call("tail_forward", y, *arguments.values())


def test_a_norm_of_another_size_is_refused() -> None:
    block = ConvBlock(3, 32)
    block.norm.weight = torch.nn.Parameter(torch.ones(40))
    block.norm.bias = torch.nn.Parameter(torch.zeros(40))
    with pytest.raises(FewShotError, match="expected"):
        block(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(("channels", "at"), [(3, (0, slice(None), 10, 10)), (4, (0, slice(None), 0, 0))])
def test_single_precision_survives_an_outlier_where_the_sums_begin(channels: int, at: tuple[Any, ...]) -> None:
    block, x = make_block(channels, 32).float(), make_images(25, channels, 20, 20).float()
    x[at] = 1e5
    exact = make_block(channels, 32)

    def found(block: ConvBlock, x: Tensor) -> list[Tensor]:
        out = block(x)
        return [out, *torch.autograd.grad(out.square().sum(), [block.norm.weight, block.norm.bias])]

    with fused.disabled():
        expected = found(exact, x.double())
    for mine, true in zip(found(block, x), expected, strict=True):
        assert (mine - true).abs().max() < 1e-5 * true.abs().max()
