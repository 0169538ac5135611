"""The same numbers on a GPU, where there is one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from conftest import make_images
from fewshot_asam.cli import train_maml
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.meta import MetaLearner
from fewshot_asam.models import build_model
from problems import RULES, SHAPE, deviation, episodes, meta_gradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", RULES)
def test_the_meta_gradient_is_the_cpus(name: str) -> None:
    model, batch = build_model("conv4", 3, SHAPE, 4, seed=0).double(), episodes()
    on_gpu = MetaLearner(copy.deepcopy(model), 0.1, RULES[name]).to("cuda")
    expected = meta_gradient(MetaLearner(model, 0.1, RULES[name]), batch)
    assert deviation(meta_gradient(on_gpu, batch.to("cuda")).cpu(), expected) < 1e-8


def test_the_sampler_draws_on_the_device_and_goes_on_from_its_state() -> None:
    sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0).to("cuda"), 5, 1, 2, seed=7)
    state = sampler.state_dict()
    first = sampler.sample(4)
    assert first.support_x.device.type == "cuda"
    sampler.load_state_dict(state)
    assert torch.equal(first.query_x, sampler.sample(4).query_x)


def test_training_on_the_gpu(tmp_path: Path) -> None:
    words = ["--device", "cuda", "--iterations", "20", "--hidden", "8", "--validation", "augment", "--shots", "2"]
    assert train_maml.main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["device"] != "cpu"
