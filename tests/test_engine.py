"""The ways to run a batch of tasks give the same numbers, and what is said of their memory and precision holds."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import make_images
from fewshot_asam import MAML, FewShotError, MetaAgnosticSAM, engine
from fewshot_asam.engine import cuda_graph, selection
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.meta_step import iteration, optimizer, schedule
from problems import RULES, SHAPE, deviation, episodes, made_learner, meta_gradient, smooth_net

CPU = torch.device("cpu")


def conv4() -> nn.Module:
    return build_model("conv4", 3, SHAPE, 4, seed=0).double()


@pytest.mark.parametrize("way", ["loop", "vmap"])
@pytest.mark.parametrize("adapt", ["all", "no_norm"])
@pytest.mark.parametrize("name", RULES)
def test_recomputed_steps_give_the_same_gradient(name: str, adapt: Any, way: Any) -> None:
    expected = meta_gradient(made_learner(conv4(), 0.1, name, adapt=adapt, engine="loop"), episodes())
    learner = made_learner(conv4(), 0.1, name, adapt=adapt, engine=way, recompute=True)
    assert deviation(meta_gradient(learner, episodes()), expected) < 1e-10


PEAK = """
import re, sys
import torch
from fewshot_asam import MAML
from fewshot_asam.episodes import Episodes
from fewshot_asam.models import build_model

way, recompute, steps = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
x, y = torch.rand(2, 15, 3, 42, 42), torch.arange(3).repeat_interleave(5).expand(2, -1)
learner = MAML(build_model("conv4", 3, (3, 42, 42), 8, 0), 0.01, engine=way, recompute=recompute)
learner.meta_backward(Episodes(x, y, x, y), 1)
read = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
learner.meta_backward(Episodes(x, y, x, y), steps)
print(read("VmHWM") - before + 2048)
"""
"""Kibibytes above what a first step left, and 2 MiB that do not matter."""


def peak(way: str, recompute: bool, steps: int) -> int:
    """What is in use at most, freed blocks returned to the system at once."""
    arguments = [sys.executable, "-c", PEAK, way, str(recompute), str(steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of a process's memory")
@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_the_memory_of_recomputed_steps_does_not_grow(way: str) -> None:
    assert peak(way, True, 50) < 1.5 * peak(way, True, 5)
    assert peak(way, False, 10) > 1.5 * peak(way, False, 5)


class Branching(nn.Module):
    """Chooses by the values of its input, which no compiler can follow in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SHAPE[1] * SHAPE[2], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * (1 if x.sum().item() > 0 else -1)


def test_what_cannot_be_compiled_runs_eagerly_and_says_so() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    expected = meta_gradient(MAML(model, 0.1, engine="loop"), episodes())
    learner = MAML(model, 0.1, engine="loop", torch_compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert deviation(meta_gradient(learner, episodes()), expected) < 1e-12
    said = [str(warning.message) for warning in caught if "could not be compiled" in str(warning.message)]
    assert len(said) == 2
    assert said[0].startswith("the inner gradient runs eagerly")


def test_what_cannot_be_vectorised_runs_task_by_task_and_says_so() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    expected = meta_gradient(MAML(model, 0.1, engine="loop"), episodes())
    learner = MAML(model, 0.1)
    refused = r"Branching.forward itself cannot be differentiated by vmap as is needed: vmap: It looks"
    with pytest.warns(UserWarning, match=f"tasks run one by one: {refused}"):
        assert deviation(meta_gradient(learner, episodes()), expected) < 1e-12
    assert deviation(meta_gradient(learner, episodes()), expected) < 1e-12
    with pytest.raises(FewShotError, match=f"{refused}.*; use engine='loop'"):
        meta_gradient(MAML(model, 0.1, engine="vmap"), episodes())


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`torch.compile` without code generation, which takes seconds; counts the graphs."""
    graphs: list[int] = []
    compile_ = torch.compile

    def trace(function: Any, **options: Any) -> Any:
        def backend(module: Any, inputs: Any) -> Any:
            from torch._dynamo.backends.debugging import aot_eager

            graphs.append(1)
            return aot_eager(module, inputs)

        return compile_(function, **options, backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", trace)
    return graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["maml", "agnostic_sam", "agnostic_sam momentum", "sharp_maml_low constant"])
def test_what_is_compiled_computes_the_same(name: str, way: Any, traced: list[int]) -> None:
    expected = meta_gradient(made_learner(conv4(), 0.1, name, engine="loop"), episodes())
    learner = made_learner(conv4(), 0.1, name, engine=way, torch_compile=True)
    assert deviation(meta_gradient(learner, episodes()), expected) < 1e-10
    assert len(traced) <= (3 if "constant" in name else 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_other_numbers_of_images_compile_once_more_and_steps_do_not(traced: list[int]) -> None:
    """The gradient once for each number of support images, the query loss once more for any number."""
    learner = MAML(conv4(), 0.1, engine="loop", torch_compile=True)
    meta_gradient(learner, episodes(shots=2), steps=1)
    first = len(traced)
    meta_gradient(learner, episodes(shots=2), steps=4)
    assert len(traced) == first == 2
    for compiled, (shots, queries) in ((3, (3, 2)), (4, (3, 4)), (5, (4, 3)), (5, (2, 4)), (5, (3, 5))):
        meta_gradient(learner, episodes(shots=shots, queries=queries), steps=2)
        assert len(traced) == compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_more_shapes_than_are_kept_compiled_run_eagerly(traced: list[int]) -> None:
    learner = MAML(smooth_net(), 0.1, engine="loop", torch_compile=True)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for shots in (1, 2, 3, 4):
            batch = episodes(shots=shots)
            expected = meta_gradient(MAML(smooth_net(), 0.1, engine="loop"), batch)
            assert deviation(meta_gradient(learner, batch), expected) < 1e-12
    assert any("runs eagerly" in str(warning.message) for warning in caught)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_code_computes_the_same() -> None:
    expected = meta_gradient(MetaAgnosticSAM(smooth_net(), 0.1, rho=0.05, engine="loop"), episodes())
    learner = MetaAgnosticSAM(smooth_net(), 0.1, rho=0.05, engine="loop", torch_compile=True)
    assert deviation(meta_gradient(learner, episodes()), expected) < 1e-10


class Immediately:
    """Stands in for CUDA graphs: 'records' nothing and runs the work on the recorded memory."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm_up(self, work: Any) -> Tensor:
        return work()

    def record(self, work: Any) -> Any:
        self.recorded += 1
        result = torch.zeros(3)

        def replay() -> Tensor:
            return result.copy_(work())

        return replay


def trained(wrap: Any, sizes: list[int]) -> tuple[list[Tensor], Tensor]:
    """The numbers of each iteration and the last weights."""
    config = TrainConfig(inner="agnostic_sam", rho=0.05, iterations=10, clip_grad=0.5, ways=3, engine="loop")
    model = build_model("conv4", 3, SHAPE, 4, seed=0)
    learner = MetaLearner(model, 0.1, config.rule, engine="loop")
    adam = optimizer(learner, config)
    steps = schedule(adam, config)
    iterate = wrap(iteration(learner, adam, config))
    sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0), 3, 1, 2, seed=0)
    numbers = []
    for size in sizes:
        numbers.append(iterate(learner.batch(sampler.sample(size))))
        steps.step()
    return numbers, nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_captured_iteration_is_the_iteration() -> None:
    sizes, recorder = [2, 2, 2, 2, 2, 3, 2], Immediately()
    expected, weights = trained(lambda body: body, sizes)
    numbers, captured = trained(lambda body: cuda_graph.CudaGraphed(body, recorder), sizes)
    assert recorder.recorded == 1
    assert torch.equal(torch.stack(numbers), torch.stack(expected))
    assert torch.equal(captured, weights)
    assert len({tuple(value.tolist()) for value in numbers}) == len(sizes)


def test_the_clock_chooses_where_the_rule_is_clearly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(selection.time, "perf_counter", lambda: clock["now"])

    def taking(**seconds: float) -> Any:
        def iterate(name: str) -> None:
            clock["now"] += seconds[name]

        return iterate

    rule = engine.Choice("loop", "by rule")
    assert engine.measured(rule, taking(loop=0.1, vmap=0.05)).name == "vmap"
    assert engine.measured(rule, taking(loop=0.1, vmap=0.09)).name == "loop"
    assert "loop 100 ms, vmap 200 ms" in engine.measured(rule, taking(loop=0.1, vmap=0.2)).reason
    assert engine.measured(rule, taking(loop=2.0, vmap=0.1)) == rule


def test_bfloat16_changes_the_meta_gradient_a_little() -> None:
    model = build_model("conv4", 3, SHAPE, 16, seed=0)
    batch = episodes(shots=3, queries=5)
    batch = type(batch)(batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y)
    exact = meta_gradient(MAML(model, 0.01, engine="loop"), batch)
    for way in ("loop", "vmap"):
        with precision("bfloat16", CPU):
            rough = meta_gradient(MAML(model, 0.01, engine=way), batch)
        assert rough.dtype == torch.float32
        assert not torch.equal(rough, exact)
        assert torch.cosine_similarity(rough, exact, dim=0) > 0.9
    with precision("tf32", CPU):
        assert torch.equal(meta_gradient(MAML(model, 0.01, engine="loop"), batch), exact)


def test_precision_is_put_back_and_checked() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with precision("tf32", CPU):
        assert torch.backends.cuda.matmul.allow_tf32
    with precision("float32", CPU):
        assert not torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    with pytest.raises(FewShotError, match="precision is 'half'; expected one of float32, tf32, bfloat16"):
        TrainConfig(precision="half")


def test_a_copied_learner_is_compiled_for_its_own_model(traced: list[int]) -> None:
    learner = MAML(smooth_net(), 0.1, engine="loop", torch_compile=True)
    meta_gradient(learner, episodes())
    twin = copy.deepcopy(learner)
    with torch.no_grad():
        for value in twin.parameters():
            value.mul_(1.5)
    plain = MetaLearner(twin.model, 0.1, MAMLRule(), engine="loop")
    assert deviation(meta_gradient(twin, episodes()), meta_gradient(plain, episodes())) < 1e-10


def test_a_cosine_schedule_falls_to_zero_at_the_end_of_the_iterations_or_of_the_minutes() -> None:
    def rates(spent: list[float]) -> list[float]:
        config = TrainConfig(iterations=10, meta_lr=0.5)
        adam = optimizer(MetaLearner(build_model("conv4", 3, SHAPE, 4, seed=0), 0.1, MAMLRule()), config)
        clock = iter([0.0, *spent])
        steps, found = schedule(adam, config, spent=lambda: next(clock)), []
        for _ in spent:
            adam.step()
            steps.step()
            found.append(adam.param_groups[0]["lr"])
        return found

    by_iterations = rates([0.0] * 10)
    assert by_iterations[4] == pytest.approx(0.25)
    assert by_iterations[9] == pytest.approx(0)
    by_minutes = rates([0.25, 0.5, 0.75, 1.0])
    assert by_minutes == pytest.approx([0.5 * (0.5 + 0.5**1.5), 0.25, 0.5 * (0.5 - 0.5**1.5), 0.0])
