"""Convolutions by `winograd.cpp` against PyTorch's, in double precision and to both orders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_asam import MAML, Conv4, Episodes
from fewshot_asam.models.cpu_kernels import convolution, disabled
from fewshot_asam.models.cpu_kernels.block import conv_block
from fewshot_asam.models.cpu_kernels.build import winograd_is_fast
from fewshot_asam.models.cpu_kernels.ctypes_call import call

pytestmark = pytest.mark.skipif(not winograd_is_fast(), reason="no C++ compiler, or a processor of narrow vectors")

SHAPES = [
    (1, 8, 8, 1, 1),
    (2, 8, 16, 2, 3),
    (3, 24, 8, 7, 6),
    (2, 8, 24, 5, 9),
    (1, 16, 8, 14, 14),
    (33, 8, 8, 14, 13),
    (120, 8, 8, 6, 6),
]
"""Images, channels, filters, height, width. The last two, of large and of small tiles, are summed in two stages."""


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    assert convolution._by_winograd(x, weight, x.dtype)
    return convolution.apply(x, weight, x.dtype)


def theirs(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def both_orders(convolve, x: Tensor, weight: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The convolution, its gradients, and the gradients of a function of those that is not linear."""
    given = [value.clone().requires_grad_() for value in (x, weight)]
    y = convolve(*given)
    first = torch.autograd.grad((y * numbers(*y.shape).to(y.dtype) + y**2).sum(), given, create_graph=True)
    second = torch.autograd.grad(torch.stack([(g**2).sum() for g in first]).sum(), given)
    return [y.detach(), *(g.detach() for g in first), *second]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_both_orders_are_pytorchs(shape: tuple[int, ...], threads: int) -> None:
    n, channels, filters, *size = shape
    x, weight = numbers(n, channels, *size), numbers(filters, channels, 3, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = both_orders(ours, x, weight)
    finally:
        torch.set_num_threads(before)
    for mine, expected in zip(found, both_orders(theirs, x, weight), strict=True):
        assert error(mine, expected) < 1e-14


def test_derivatives_agree_with_finite_differences() -> None:
    x, weight = numbers(2, 8, 3, 4).requires_grad_(), numbers(8, 8, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(ours, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, (x, weight), fast_mode=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_and_weights_may_lie_in_memory_as_they_like(memory_format: torch.memory_format) -> None:
    x = numbers(4, 16, 12, 10).contiguous(memory_format=memory_format)[:, :8, ::2, 1:]
    weight = numbers(8, 3, 3, 8).permute(0, 3, 1, 2)
    for mine, expected in zip(both_orders(ours, x, weight), both_orders(theirs, x, weight), strict=True):
        assert error(mine, expected) < 1e-14


@pytest.mark.parametrize(("n", "side"), [(5, 14), (75, 42)])
def test_single_precision_loses_no_more_than_a_digit_to_pytorchs(n: int, side: int) -> None:
    x, weight = numbers(n, 32, side, side), numbers(32, 32, 3, 3)
    gy = numbers(n, 32, side, side)

    def found(convolve, dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        given = [value.to(dtype).requires_grad_() for value in (x, weight)]
        y = convolve(*given)
        return [value.detach().double() for value in (y, *torch.autograd.grad(y, given, gy.to(dtype)))]

    exact = found(theirs, torch.float64)  # PyTorch's in single precision are within 3e-7, 3e-7 and 14e-7
    for mine, value, bound in zip(found(ours, torch.float32), exact, (2e-6, 2e-6, 5e-6), strict=True):
        assert error(mine, value) < bound


def meta_gradient(dtype: torch.dtype, steps: int, side: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x = [torch.rand(n, 3, side, side, generator=generator, dtype=torch.float64).to(dtype) for n in (5, 75)]
    y = [torch.arange(5), torch.arange(5).repeat_interleave(15)]
    learner = MAML(Conv4(5, (3, side, side), hidden=32).to(dtype), lr=0.01)
    episodes = Episodes(x[0][None], y[0][None], x[1][None], y[1][None])
    learner.meta_backward(episodes, steps=steps)
    return torch.cat([p.grad.double().flatten() for p in learner.parameters() if p.grad is not None])


@pytest.mark.parametrize(("steps", "side", "bound"), [(1, 28, 1e-2), (5, 84, 0.2)])
def test_rounding_in_a_meta_gradient(steps: int, side: int, bound: float) -> None:
    """The bounds are wide, as rounding may change which place max-pooling takes, in PyTorch's float32 as well."""
    for seed in (0, 1):
        with disabled():
            exact = meta_gradient(torch.float64, steps, side, seed)
            plain = error(meta_gradient(torch.float32, steps, side, seed), exact)
        found = error(meta_gradient(torch.float32, steps, side, seed), exact)
        print(f"{steps} steps, {side} pixels, seed {seed}: off by {found:.1e}, plain PyTorch by {plain:.1e}")
        assert found < bound


def test_runs_are_repeated_bit_for_bit() -> None:
    x, weight = numbers(40, 32, 14, 14, dtype=torch.float32), numbers(32, 32, 3, 3, dtype=torch.float32)
    once, again = (both_orders(ours, x, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_place_reaches_its_neighbours_alone() -> None:
    x, weight = torch.zeros(2, 16, 9, 9), numbers(16, 16, 3, 3, dtype=torch.float32)
    x[1, 3, 4, 5] = 1
    y = ours(x, weight)
    torch.testing.assert_close(y[1, :, 3:6, 4:7], weight[:, 3].flip(-1, -2), rtol=0, atol=1e-6)
    y[1, :, 3:6, 4:7] = 0
    assert y.abs().max() < 1e-6


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def seen(name: str, *given, **more) -> None:  # type: ignore[no-untyped-def]
        calls.append(name)
        call(name, *given, **more)

    monkeypatch.setattr("fewshot_asam.models.cpu_kernels.convolution.call", seen)

    def used(channels: int, filters: int, dtype: torch.dtype = torch.float32) -> bool:
        calls.clear()
        x, weight = numbers(2, channels, 6, 6, dtype=dtype), numbers(filters, channels, 3, 3, dtype=dtype)
        one = torch.ones(filters, dtype=dtype)
        y = conv_block(x.requires_grad_(), weight.requires_grad_(), one, one, 1e-5)
        torch.autograd.grad(y.sum(), [x, weight])
        return calls == ["conv_forward", "conv_input_gradient", "conv_weight_gradient"]

    assert used(32, 32)
    assert used(16, 48)
    assert used(8, 8, torch.float64)
    for channels, filters in ((12, 32), (32, 12), (8, 8)):
        assert not used(channels, filters)
        assert not calls
