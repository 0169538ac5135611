"""The same numbers on a GPU, where there is one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import make_images
from fewshot_asam.cli import train_maml
from fewshot_asam.engine import cuda_graph
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MAML, MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.meta_step import iteration, optimizer, schedule
from problems import RULES, SHAPE, deviation, episodes, made_learner, meta_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("way", ["loop", "vmap"])
@pytest.mark.parametrize("name", RULES)
def test_the_meta_gradient_is_the_cpus(name: str, way: Any) -> None:
    model, batch = build_model("conv4", 3, SHAPE, 4, seed=0).double(), episodes()
    on_gpu = made_learner(copy.deepcopy(model), 0.1, name, engine=way).to("cuda")
    expected = meta_gradient(made_learner(model, 0.1, name, engine="loop"), batch)
    assert deviation(meta_gradient(on_gpu, batch.to("cuda")).cpu(), expected) < 1e-8


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_recomputed_steps_give_the_same_gradient(way: Any) -> None:
    model, batch = build_model("conv4", 3, SHAPE, 4, seed=0).double().to("cuda"), episodes().to("cuda")
    kept, recomputed = (
        MetaLearner(model, 0.1, RULES["agnostic_sam"], engine=way, recompute=again) for again in (False, True)
    )
    assert deviation(meta_gradient(recomputed, batch), meta_gradient(kept, batch)) < 1e-10


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_code_computes_the_same() -> None:
    model, batch = build_model("conv4", 3, SHAPE, 4, seed=0).double().to("cuda"), episodes().to("cuda")
    eager, compiled = (
        MetaLearner(model, 0.1, RULES["agnostic_sam"], engine="vmap", torch_compile=again) for again in (False, True)
    )
    assert deviation(meta_gradient(compiled, batch), meta_gradient(eager, batch)) < 1e-8


def trained(name: str, cuda_graph: bool, iterations: int = 8) -> tuple[Tensor, Tensor]:
    """The numbers of each iteration and the last weights, in float64."""
    config = TrainConfig(iterations=iterations, clip_grad=0.5, ways=3, cuda_graph=cuda_graph)
    model = build_model("conv4", 3, SHAPE, 4, seed=0).double().to("cuda")
    learner = made_learner(model, 0.1, name, engine="vmap")
    adam = optimizer(learner, config)
    rates, iterate = schedule(adam, config), iteration(learner, adam, config)
    assert isinstance(iterate, cuda_graph.CudaGraphed) == cuda_graph
    numbers = []
    for index in range(iterations):
        numbers.append(iterate(learner.batch(episodes(seed=index).to("cuda"))))
        rates.step()
    return torch.stack(numbers), nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("name", ["maml", "sharp_maml_low", "agnostic_sam", "agnostic_sam momentum"])
def test_a_recorded_iteration_is_the_iteration(name: str) -> None:
    for recorded, plain in zip(trained(name, True), trained(name, False), strict=True):
        assert deviation(recorded, plain) < 1e-8


def test_an_iteration_waits_for_nothing() -> None:
    config = TrainConfig(iterations=20, ways=3)
    learner = MAML(build_model("conv4", 3, SHAPE, 4, seed=0).to("cuda"), 0.1)
    adam = optimizer(learner, config)
    rates, iterate = schedule(adam, config), iteration(learner, adam, config)
    sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0).to("cuda"), 3, 1, 2)

    def once() -> None:
        iterate(learner.batch(sampler.sample(2)))
        rates.step()

    for _ in range(cuda_graph.WARM_UP + 2):
        once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_and_bfloat16_change_the_meta_gradient_a_little() -> None:
    model, batch = build_model("conv4", 3, SHAPE, 16, seed=0).to("cuda"), episodes(shots=3, queries=5)
    batch = type(batch)(batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y).to("cuda")

    def gradient(name: Any) -> Tensor:
        with precision(name, torch.device("cuda")):
            return meta_gradient(MAML(model, 0.01), batch)

    for name, least in (("tf32", 0.99), ("bfloat16", 0.9)):
        assert torch.cosine_similarity(gradient(name), gradient("float32"), dim=0) > least


def test_the_sampler_draws_on_the_device_and_goes_on_from_its_state() -> None:
    sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0).to("cuda"), 5, 1, 2, seed=7)
    state = sampler.state_dict()
    first = sampler.sample(4)
    assert first.support_x.device.type == "cuda"
    sampler.load_state_dict(state)
    assert torch.equal(first.query_x, sampler.sample(4).query_x)


@pytest.mark.parametrize("options", [[], ["--precision", "bfloat16"], ["--cuda-graph", "false"]])
def test_training_on_the_gpu(tmp_path: Path, options: list[str]) -> None:
    words = ["--device", "cuda", "--iterations", "20", "--hidden", "8", "--validation", "augment", "--shots", "2"]
    assert train_maml.main([*words, *options, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] != "cpu"


def test_a_recorded_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    words = ["--device", "cuda", "--hidden", "8", "--schedule", "constant", "--output-dir", str(tmp_path / "run")]
    assert train_maml.main([*words, "--iterations", "10"]) == 0
    assert train_maml.main([*words, "--iterations", "20", "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 20
