"""The GPU's kernels against the plain block; on a CPU's tensors where `TRITON_INTERPRET=1`, else on a GPU.

Run by `test_gpu_kernels.py` in a process of its own, as Triton reads the variable once, and by `benchmarks.gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import make_images
from fewshot_asam.engine import ExecutionMode, meta_backward
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.errors import FewShotError
from fewshot_asam.models import build_model, cpu_kernels, gpu_kernels
from fewshot_asam.models.gpu_kernels import Kernels, convolution, norm_relu_pool
from fewshot_asam.models.norm import EPS
from problems import deviation, made_learner, meta_gradient

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
WAYS = tuple(convolution.WAYS)
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not the CPU's own block; and few large programs, as an interpreter takes long for each."""
    if DEVICE == "cpu":
        monkeypatch.setattr(norm_relu_pool, "plan", few_programs)
    with cpu_kernels.disabled(), gpu_kernels.using(Kernels(triton=True)):
        yield


def few_programs(y: Tensor) -> norm_relu_pool.Plan:
    """One for all channels, whose tile has windows that are not there."""
    n, channels, height, width = y.shape
    windows = n * ((height + 1) // 2) * ((width + 1) // 2)
    power = norm_relu_pool._power_of_two
    return norm_relu_pool.Plan(1, 1, 1, power(channels), power(windows))


def in_primitives(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.conv2d(x, weight, padding=1)
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0, keepdim=True)
    normal = (y - mean) * torch.rsqrt(var + EPS)
    return F.max_pool2d(F.relu(normal * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)), 2)


def block(x: Tensor, *parameters: Tensor) -> Tensor:
    assert gpu_kernels.applies(x, *parameters)
    return gpu_kernels.conv_block(x, *parameters, EPS)


def inputs(channels: int = 3, height: int = 7, width: int = 6, filters: int = 5, tasks: int = 0) -> list[Tensor]:
    """Images, filters and the norm's weight, of both signs, and bias; of several tasks with a leading dimension."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, channels, height, width), (filters, channels, 3, 3), (filters,), (filters,)]
    lead = (tasks,) if tasks else ()
    values = [torch.randn((*lead, *s), generator=generator, dtype=torch.float64) for s in shapes]
    return [value.to(DEVICE).requires_grad_() for value in values]


def derivatives(function: Any, values: list[Tensor], order: int) -> list[Tensor]:
    """The output and the gradients up to `order`, each of a random projection of all before."""
    generator = torch.Generator().manual_seed(1)
    found: list[Tensor] = [function(*values)]
    latest = found
    for level in range(order):
        projection = sum(
            (v * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)).sum() for v in latest
        )
        more = level + 1 < order
        latest = list(
            torch.autograd.grad(projection, values, allow_unused=True, create_graph=more, materialize_grads=True)
        )
        found += latest
    return found


def off(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / (1e-3 + expected.abs().max())).item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 7, 6), (4, 6, 9), (2, 2, 2), (3, 5, 5), (2, 3, 2)])
def test_derivatives_are_pytorchs(shape: tuple[int, int, int], channels_last: bool) -> None:
    values = inputs(*shape)
    with gpu_kernels.using(Kernels("channels_last" if channels_last else "grouped", triton=True)):
        ours = derivatives(block, values, 2)
    for mine, theirs in zip(ours, derivatives(in_primitives, values, 2), strict=True):
        assert off(mine, theirs) < 1e-10


def test_third_derivatives_are_pytorchs() -> None:
    values = inputs(2, 5, 4, 3)
    for mine, theirs in zip(derivatives(block, values, 3), derivatives(in_primitives, values, 3), strict=True):
        assert off(mine, theirs) < 1e-10


def test_many_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = inputs(2, 5, 4, 3)  # 18 windows
    monkeypatch.setattr(norm_relu_pool, "plan", lambda y: norm_relu_pool.Plan(2, 3, 2, 2, 4))
    for mine, theirs in zip(derivatives(block, values, 2), derivatives(in_primitives, values, 2), strict=True):
        assert off(mine, theirs) < 1e-10


def test_the_plan_covers_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for shape in ((1, 1, 2, 2), (75, 128, 84, 84), (5, 128, 84, 84), (300, 1024, 28, 28), (25, 256, 5, 5)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = torch.empty(shape, device="meta").contiguous(memory_format=memory_format)
            plan = norm_relu_pool.plan(y)
            windows = shape[0] * ((shape[2] + 1) // 2) * ((shape[3] + 1) // 2)
            assert (
                (plan.programs - 1) * plan.tiles * plan.block_w < windows <= plan.programs * plan.tiles * plan.block_w
            )
            assert (plan.channel_tiles - 1) * plan.block_c < shape[1] <= plan.channel_tiles * plan.block_c
            assert plan.channel_tiles * plan.programs <= max(norm_relu_pool.PROGRAMS, plan.channel_tiles)


def test_single_precision_is_as_exact_as_pytorchs() -> None:
    values = [value.detach() for value in inputs(3, 16, 16, 8)]
    values[0] = values[0] * 10 + 30

    def found(function: Any, dtype: torch.dtype) -> list[Tensor]:
        cast = [value.float().to(dtype).requires_grad_() for value in values]
        return [value.double() for value in derivatives(function, cast, 2)]

    true = found(in_primitives, torch.float64)
    for mine, theirs, expected in zip(
        found(block, torch.float32), found(in_primitives, torch.float32), true, strict=True
    ):
        assert off(mine, expected) < 1e-5 + 3 * off(theirs, expected)


def test_ties_are_broken_as_pytorch_breaks_them() -> None:
    x, *parameters = inputs(1, 6, 6)
    flat = [torch.ones_like(x).detach().requires_grad_(), *parameters]
    for mine, theirs in zip(derivatives(block, flat, 1), derivatives(in_primitives, flat, 1), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-8)


def test_not_a_number_is_not_hidden() -> None:
    values = inputs()
    with torch.no_grad():
        values[0][0, 0, 0, 0] = torch.nan
    assert block(*values).isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_convolutions_of_several_tasks_are_pytorchs(way: Any) -> None:
    x, weight, *_ = inputs(3, 5, 6, 4, tasks=3)

    def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([F.conv2d(a, b, padding=1) for a, b in zip(x, weight, strict=True)]).square()

    together = torch.func.vmap(lambda x, weight: convolution.convolve(x, weight, way).square())
    ours = derivatives(together, [x, weight], 3)
    for mine, theirs in zip(ours, derivatives(one_by_one, [x, weight], 3), strict=True):
        assert off(mine, theirs) < 1e-12


def test_images_that_all_tasks_share() -> None:
    x, *_ = inputs(2, 6, 5, 3)
    _, *parameters = inputs(2, 6, 5, 3, tasks=2)

    def together(x: Tensor, *own: Tensor) -> Tensor:
        return torch.func.vmap(block, in_dims=(None, 0, 0, 0))(x, *own)

    def one_by_one(x: Tensor, *own: Tensor) -> Tensor:
        return torch.stack([in_primitives(x, *values) for values in zip(*own, strict=True)])

    given = [x, *parameters]
    for mine, theirs in zip(derivatives(together, given, 2), derivatives(one_by_one, given, 2), strict=True):
        assert off(mine, theirs) < 1e-10


def test_the_fastest_way_is_found_once_for_each_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_known", {})
    asked: list[float] = []

    def clock(run: Any) -> float:
        run()
        asked.append(float(len(asked) % 4 != 2))
        return asked[-1]

    monkeypatch.setattr(convolution, "seconds", clock)
    x, weight, *_ = inputs(3, 5, 6, 4)
    for _ in range(2):
        derivatives(lambda *values: convolution.convolve(*values, "fastest"), [x, weight], 1)
    assert len(asked) == 3 * len(WAYS)
    assert set(convolution.choices().values()) == {"unfold"}


def test_a_way_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_known", {})
    monkeypatch.setattr(convolution, "WAYS", {"grouped": convolution._grouped, "unfold": out_of_memory})
    x, weight, *_ = inputs()
    assert convolution.fastest(convolution.Problem("y", 1), x, weight) == "grouped"


def out_of_memory(*_: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("transform", ["jvp", "hessian", "nested vmap"])
def test_transforms_that_are_not_understood_take_the_plain_path(transform: str) -> None:
    x, *parameters = (value.detach() for value in inputs())
    seen = []

    def loss(gamma: Tensor) -> Tensor:
        seen.append(gpu_kernels.applies(x, parameters[0], gamma, parameters[2]))
        return gpu_kernels.conv2d(x, parameters[0]).sum() * gamma.sum()

    gamma = parameters[1]
    if transform == "jvp":
        torch.func.jvp(loss, (gamma,), (gamma,))
    elif transform == "hessian":
        torch.func.hessian(loss)(gamma)
    else:
        torch.func.vmap(torch.func.vmap(loss))(gamma.expand(2, 2, -1))
    assert not any(seen)


def tiny_batch(shape: tuple[int, int, int] = (1, 21, 18)) -> Episodes:
    drawn = EpisodeSampler(make_images(12, 8, shape, 0), 3, 1, 1, seed=0).sample(2)
    batch = Episodes(drawn.support_x.double(), drawn.support_y, drawn.query_x.double(), drawn.query_y)
    return batch.to(DEVICE)


def learner(name: str, engine: Any, **options: Any) -> Any:
    model = build_model("conv4", 3, (1, 21, 18), 4, seed=0).double()
    with torch.no_grad():
        for layer in model.blocks:
            layer.norm.weight.mul_(torch.linspace(-2, 1.5, 4))
    return made_learner(model, 0.1, name, engine=engine, **options).to(DEVICE)


@pytest.mark.parametrize(
    ("name", "engine", "kernels"),
    [
        ("maml", "loop", Kernels("grouped", True)),
        ("maml", "vmap", Kernels("unfold", True)),
        ("sharp_maml_low", "vmap", Kernels("channels_last", True)),
        ("sharp_maml_low constant", "vmap", Kernels("each", True)),
        ("agnostic_sam", "vmap", Kernels("fastest", False)),
        ("agnostic_sam", "loop", Kernels("unfold", False)),
    ],
)
def test_the_meta_gradient_is_the_plain_engines(name: str, engine: Any, kernels: Kernels) -> None:
    given, batch, steps = learner(name, engine), tiny_batch(), 1 if kernels.triton else 2
    with gpu_kernels.using(Kernels()):
        expected = meta_gradient(given, batch, steps)
    with gpu_kernels.using(kernels):
        assert deviation(meta_gradient(given, batch, steps), expected) < 1e-10


@pytest.mark.parametrize(("name", "recompute"), [("agnostic_sam", False), ("maml", True)])
def test_meta_backward_leaves_the_plain_engines_gradients(name: str, recompute: bool) -> None:
    given, batch = learner(name, "vmap"), tiny_batch()

    def gradients(kernels: Kernels) -> Tensor:
        given.zero_grad()
        with gpu_kernels.using(kernels):
            meta_backward(given.inner_loop, given.batch(batch), 1, ExecutionMode("vmap", recompute=recompute))
        return torch.cat([parameter.grad.flatten() for parameter in given.parameters()])

    assert deviation(gradients(Kernels("unfold", True)), gradients(Kernels())) < 1e-10


def test_under_autocast_every_block_runs_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts digits off where a GPU rounds, so errors are twice as large there."""
    kinds: list[torch.dtype] = []
    tail = norm_relu_pool.norm_relu_pool

    def seen(y: Tensor, *others: Any) -> Tensor:
        kinds.append(y.dtype)
        return tail(y, *others)

    monkeypatch.setattr("fewshot_asam.models.gpu_kernels.block.norm_relu_pool", seen)
    given, drawn = learner("maml", "vmap").float(), tiny_batch()
    batch = Episodes(drawn.support_x.float(), drawn.support_y, drawn.query_x.float(), drawn.query_y)
    with gpu_kernels.using(Kernels()):
        exact = meta_gradient(given, batch, 1)
    with precision("bfloat16", torch.device(DEVICE)), gpu_kernels.using(Kernels("unfold", True)):
        rough = meta_gradient(given, batch, 1)
    assert torch.cosine_similarity(rough, exact, dim=0) > 0.85
    assert kinds == [torch.bfloat16] * 8


def test_the_tail_in_bfloat16_is_off_by_its_digits() -> None:
    y, gamma, beta = (value.detach().float() for value in inputs(height=8, width=8)[1:])
    y = torch.randn(3, 5, 8, 8, generator=torch.Generator().manual_seed(3)).to(y)

    def found(function: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [y.bfloat16().to(dtype).requires_grad_(), gamma.clone().requires_grad_(), beta.clone().requires_grad_()]
        out = function(*given)
        first = torch.autograd.grad(out.sum() + out.square().sum(), given, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(value.square().sum() for value in first), given)]

    def in_pytorch(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0, keepdim=True)
        values = (y - mean) * torch.rsqrt(var + EPS) * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
        return F.max_pool2d(F.relu(values), 2)

    ours = found(lambda *given: norm_relu_pool.norm_relu_pool(*given, EPS), torch.bfloat16)
    for mine, expected in zip(ours, found(in_pytorch, torch.float32), strict=True):
        assert (mine.float() - expected).norm() < 0.02 * expected.norm()


def test_tensors_beyond_32_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_relu_pool, "LARGEST", 100)
    with pytest.raises(FewShotError, match=r"given a tensor \[3, 5, 7, 6\]; expected fewer than 2\*\*31 numbers"):
        block(*inputs())


def test_the_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []
    run = norm_relu_pool._Pass.__call__

    def counted(self: Any, name: str, tensors: tuple[Tensor, ...], *rest: Any, **more: Any) -> None:
        called.append(tuple(tensors[0].shape) if name == "choose" else (0,))
        run(self, name, tensors, *rest, **more)

    monkeypatch.setattr(norm_relu_pool._Pass, "__call__", counted)
    meta_gradient(learner("maml", "vmap"), tiny_batch(), steps=1)
    assert [shape[1] for shape in called if len(shape) == 4] == [8] * 8, "the channels of two tasks in one call"
