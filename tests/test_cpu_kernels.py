"""The fused block against PyTorch's own operators, finite differences and itself with other threads and formats."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import make_images
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.models import build_model, cpu_kernels
from fewshot_asam.models.cpu_kernels import block, build, input_block
from fewshot_asam.models.norm import EPS
from problems import RULES, made_learner, meta_gradient

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


def reference(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, gamma, beta, training=True, eps=EPS)
    return F.max_pool2d(F.relu(y), 2)


def in_primitives(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The third derivative of `F.batch_norm` is wrong (torch 2.13)."""
    y = F.conv2d(x, weight, padding=1)
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0, keepdim=True)
    normal = (y - mean) * torch.rsqrt(var + EPS)
    return F.max_pool2d(F.relu(normal * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)), 2)


def fused_block(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return cpu_kernels.conv_block(x, weight, gamma, beta, EPS)


def inputs(channels: int = 3, height: int = 7, width: int = 6, filters: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, channels, height, width), (filters, channels, 3, 3), (filters,), (filters,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def derivatives(function: object, values: list[Tensor], order: int) -> list[Tensor]:
    """The output and the gradients up to `order`, each of a random projection of all before."""
    generator = torch.Generator().manual_seed(1)
    found: list[Tensor] = [function(*values)]  # type: ignore[operator]
    latest = found
    for level in range(order):
        projection = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in latest)
        latest = list(
            torch.autograd.grad(
                projection, values, allow_unused=True, create_graph=level + 1 < order, materialize_grads=True
            )
        )
        found += latest
    return found


def off(value: Tensor, expected: Tensor) -> float:
    """The largest difference, relative where the expected entries are not all zero."""
    return ((value - expected).abs().max() / (1e-3 + expected.abs().max())).item()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 7, 6), (4, 6, 9), (2, 2, 2), (3, 5, 5)])
def test_derivatives_are_pytorchs(shape: tuple[int, int, int], order: int) -> None:
    values, other = inputs(*shape), reference if order < 3 else in_primitives
    for ours, theirs in zip(derivatives(fused_block, values, order), derivatives(other, values, order), strict=True):
        assert off(ours, theirs) < 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 7, 9), (3, 5, 4), (3, 12, 13)])
def test_derivatives_of_the_first_block_are_pytorchs(shape: tuple[int, int, int], order: int) -> None:
    x, *values = inputs(*shape, filters=32)
    x = x.detach()
    assert input_block.applies(x, values[0])
    ours = derivatives(lambda *given: fused_block(x, *given), values, order)
    for mine, theirs in zip(ours, derivatives(lambda *given: in_primitives(x, *given), values, order), strict=True):
        assert off(mine, theirs) < 1e-10


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("order", [1, 2])
def test_several_gradients_at_once(order: int, way: str) -> None:
    torch.manual_seed(0)
    model = build_model("conv4", 5, (1, 16, 16), 16, seed=0).double()
    values, x = list(model.parameters()), torch.rand(6, 1, 16, 16, dtype=torch.float64)

    def found() -> Any:
        outputs: Any = [model(x)]
        if order == 2:
            outputs = torch.autograd.grad(outputs[0].square().sum(), values, create_graph=True)
        generator = torch.Generator().manual_seed(1)
        several = [torch.randn(3, *y.shape, generator=generator, dtype=y.dtype) for y in outputs]
        if way == "is_grads_batched":
            return torch.autograd.grad(outputs, values, several, is_grads_batched=True)
        return torch.func.vmap(lambda *g: torch.autograd.grad(outputs, values, g, retain_graph=True))(*several)

    fused = found()
    with cpu_kernels.disabled():
        assert max(off(*pair) for pair in zip(fused, found(), strict=True)) < 1e-11


def test_the_first_block_sees_that_its_images_were_changed() -> None:
    x, *values = inputs(3, 6, 6, filters=32)
    x = x.detach()
    derivatives(lambda *given: fused_block(x, *given), values, 1)
    x.mul_(2)
    ours = derivatives(lambda *given: fused_block(x, *given), values, 1)
    for mine, theirs in zip(ours, derivatives(lambda *given: in_primitives(x, *given), values, 1), strict=True):
        assert off(mine, theirs) < 1e-10


def test_derivatives_agree_with_finite_differences() -> None:
    values = inputs(2, 5, 4, 3)
    assert torch.autograd.gradcheck(fused_block, values)
    assert torch.autograd.gradgradcheck(fused_block, values)


@pytest.mark.parametrize("images_are_given", [False, True])
def test_single_precision_is_as_exact_as_pytorchs(images_are_given: bool) -> None:
    values = [v.detach() for v in inputs(3, 20, 20, 32)]
    values[0] = values[0] * 10 + 30

    def found(function: Any, dtype: torch.dtype) -> list[Tensor]:
        cast = [value.float().to(dtype) for value in values]
        fixed, free = (cast[:1], cast[1:]) if images_are_given else ([], cast)
        free = [value.requires_grad_() for value in free]
        return [value.double() for value in derivatives(lambda *given: function(*fixed, *given), free, 2)]

    true = found(reference, torch.float64)
    for ours, theirs, expected in zip(
        found(fused_block, torch.float32), found(reference, torch.float32), true, strict=True
    ):
        assert off(ours, expected) < 1e-5 + 3 * off(theirs, expected)


def test_ties_are_broken_as_pytorch_breaks_them() -> None:
    x, weight, gamma, beta = inputs(1, 6, 6)
    flat = [torch.ones_like(x).detach().requires_grad_(), weight, gamma, beta]
    for ours, theirs in zip(derivatives(fused_block, flat, 1), derivatives(reference, flat, 1), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)


def test_not_a_number_is_not_hidden() -> None:
    values = inputs()
    with torch.no_grad():
        values[0][0, 0, 0, 0] = torch.nan
    assert fused_block(*values).isnan().all()


@pytest.mark.parametrize("filters", [5, 16])
@pytest.mark.parametrize("name", RULES)
def test_the_meta_gradient_of_every_rule(name: str, filters: int) -> None:
    sampler = EpisodeSampler(make_images(12, 8, (3, 21, 18), 0), 3, 2, 3, seed=0)
    drawn = sampler.sample(2)
    batch = Episodes(drawn.support_x.double(), drawn.support_y, drawn.query_x.double(), drawn.query_y)
    model = build_model("conv4", 3, (3, 21, 18), filters, seed=0).double()
    with torch.no_grad():
        for layer in model.blocks:
            layer.norm.weight.mul_(torch.linspace(-2, 1.5, filters))
    learner = made_learner(model, 0.1, name, engine="loop")
    ours = meta_gradient(learner, batch)
    with cpu_kernels.disabled():
        assert off(ours, meta_gradient(learner, batch)) < 1e-10


def test_runs_are_repeated_bit_for_bit_and_threads_only_round() -> None:
    values, threads = [v.detach().float().requires_grad_() for v in inputs(3, 30, 30, 8)], torch.get_num_threads()
    first = derivatives(fused_block, values, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, derivatives(fused_block, values, 2), strict=True))
    torch.set_num_threads(2)
    try:
        for one, two in zip(first, derivatives(fused_block, values, 2), strict=True):
            assert off(two, one) < 1e-4
    finally:
        torch.set_num_threads(threads)


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, 8, 8)
    assert cpu_kernels.applies(x)
    assert not cpu_kernels.applies(x.half())
    assert not cpu_kernels.applies(x[..., :1])
    with cpu_kernels.disabled():
        assert not cpu_kernels.applies(x)
    for multiplies in (False, True):
        monkeypatch.setattr(block, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu_kernels.applies(x) == multiplies
            assert not cpu_kernels.applies(x.bfloat16())
        with torch.autocast("cpu", torch.float16):
            assert not cpu_kernels.applies(x)
    seen = []
    torch.func.vmap(lambda image: seen.append(cpu_kernels.applies(image)) or image)(x)
    assert seen == [False]


def test_what_does_not_fit_is_pytorchs_to_refuse() -> None:
    model = build_model("conv4", 3, (3, 16, 16), 32, seed=0)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.zeros(2, 1, 16, 16))
    assert not cpu_kernels.applies(torch.zeros(2, 3, 8, 8), torch.zeros(3, dtype=torch.float64))
    assert not cpu_kernels.applies(torch.zeros(0, 3, 8, 8))


def test_convolutions_in_bfloat16_and_all_else_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders of gradients against PyTorch's own of a convolution whose operands are rounded."""
    monkeypatch.setattr(block, "multiplies_bfloat16", lambda: True)
    values = [v.detach().float().requires_grad_() for v in inputs(8, 12, 12, 16)]

    def rounded(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.conv2d(x.bfloat16(), weight.bfloat16(), padding=1).float()
        return F.max_pool2d(F.relu(F.batch_norm(y, None, None, gamma, beta, training=True, eps=EPS)), 2)

    expected, exact = derivatives(rounded, values, 2), derivatives(fused_block, values, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(fused_block, values, 2)
    assert all(mine.dtype == torch.float32 for mine in found)
    assert max(map(off, found[:5], expected[:5])) < 1e-5
    assert max(map(off, found[5:], expected[5:])) < 1e-2  # PyTorch rounds at other places
    assert min(map(off, found[1:3], exact[1:3])) > 1e-2


def test_a_network_in_bfloat16_is_close_and_its_logits_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "multiplies_bfloat16", lambda: True)
    model, x = build_model("conv4", 5, (3, 32, 32), 16, seed=0), torch.rand(5, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.float32
    assert 1e-4 < off(rough, exact) < 0.1
    assert not torch.equal(rough, rough.bfloat16().float())  # the last layer is not rounded


def test_inference_mode() -> None:
    model, x = build_model("conv4", 3, (3, 16, 16), 32, seed=0), torch.rand(2, 3, 16, 16)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x.clone()), expected)


def test_a_model_that_was_used_can_be_copied() -> None:
    model = build_model("conv4", 3, (1, 16, 16), 4, seed=0)
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_without_a_compiler_the_block_is_plain_and_says_so(tmp_path: Path) -> None:
    code = (
        "import torch; from fewshot_asam.models import build_model; m = build_model('conv4', 3, (1, 16, 16), 4, 0); "
        "print(m(torch.zeros(2, 1, 16, 16)).shape)"
    )
    environment = {"PATH": "", "CXX": "no-such-compiler", "FEWSHOT_ASAM_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(cpu_kernels.__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0
    assert "torch.Size([2, 3])" in result.stdout
    assert "run unfused, which is slower" in result.stderr
