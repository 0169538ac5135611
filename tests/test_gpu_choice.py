"""How a run on a GPU is chosen: by a clock, here a stand-in, among ways that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_images
from fewshot_asam import engine
from fewshot_asam.data import Dataset
from fewshot_asam.engine.candidates import Candidate, Fastest, Trial, alike, candidates, fastest, parsed
from fewshot_asam.models import build_model, gpu_kernels
from fewshot_asam.models.gpu_kernels import Kernels, block
from fewshot_asam.training import gpu_rehearsal, loop, rehearsal
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.progress import Progress
from fewshot_asam.training.state import TrainState, build
from problems import SHAPE, smooth_net

GRADIENT = torch.tensor([1.0, -2.0, 3.0])
CHOSEN = Candidate("vmap", Kernels("unfold", triton=True, cudnn_benchmark=True))


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "runs_on", lambda device: True)


def conv4_candidates() -> list[Candidate]:
    return candidates(build_model("conv4", 3, SHAPE, 4, seed=0), torch.device("cuda"))


@pytest.mark.usefixtures("_triton")
def test_every_candidate_is_known_by_its_text() -> None:
    given = [*conv4_candidates(), CHOSEN]
    assert len({one.text for one in given}) == len(given)
    for one in given:
        assert parsed(one.text) == one
        assert not Progress(engine=one.text).problem()
    for wrong in ("", "auto", "vmap cudnn", "unfold", "loop triton triton", "vmap  unfold"):
        assert parsed(wrong) is None
    assert Progress(engine="vmap triton unfold").problem() == "engine is 'vmap triton unfold'"


@pytest.mark.usefixtures("_triton")
def test_the_candidates_are_those_that_the_model_and_the_machine_have(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {one.kernels.convolution for one in conv4_candidates() if one.batching == "vmap"}
    assert ways == {"grouped", "channels_last", "unfold", "fastest"}
    assert sum(one.kernels.triton for one in conv4_candidates()) == 5
    monkeypatch.setattr(gpu_kernels, "runs_on", lambda device: False)
    assert not any(one.kernels.triton for one in conv4_candidates())
    assert candidates(smooth_net(), torch.device("cuda")) == [Candidate("vmap"), Candidate("loop")]


def test_the_clock_decides_and_says_what_it_saw() -> None:
    taken = {"vmap": 0.004, "loop": 0.002, "vmap unfold": 0.001, "vmap unfold cudnn_benchmark": 0.0005}
    given = [*map(Candidate, ("vmap", "loop")), Candidate("vmap", Kernels("unfold"))]
    found = fastest(given, lambda one: Trial(taken[one.text], GRADIENT))
    assert found.candidate == Candidate("vmap", Kernels("unfold", cudnn_benchmark=True))
    assert found.reason == (
        "measured, a meta-batch: vmap unfold cudnn_benchmark 0.5 ms, vmap unfold 1 ms, loop 2 ms, vmap 4 ms"
    )


def test_what_fails_or_computes_something_else_is_left() -> None:
    def run(one: Candidate) -> Trial:
        if one.kernels.cudnn_benchmark:
            raise RuntimeError("cuDNN")
        return Trial(0.001 if one.kernels.triton else 0.002, GRADIENT.flip(0) if one.kernels.triton else GRADIENT)

    found = fastest([Candidate("vmap"), Candidate("vmap", Kernels(triton=True))], run)
    assert found.candidate == Candidate("vmap")
    assert "vmap grouped triton computes something else" in found.reason
    assert "vmap cudnn_benchmark failed (RuntimeError)" in found.reason or "cudnn_benchmark failed" in found.reason


@pytest.mark.parametrize("wrong", [GRADIENT * 2, -GRADIENT, GRADIENT.flip(0), GRADIENT * torch.nan, GRADIENT * 0])
def test_gradients_that_are_not_alike(wrong: torch.Tensor) -> None:
    assert not alike(wrong, GRADIENT)
    assert alike(GRADIENT * 1.01 + 0.01, GRADIENT)


class Immediately:
    """Stands in for CUDA graphs."""

    def warm_up(self, work: Any) -> torch.Tensor:
        return work()

    def record(self, work: Any) -> Any:
        return work


def untrained(**settings: Any) -> TrainState:
    config = TrainConfig(inner="maml", ways=3, queries=2, meta_batch_size=2, hidden=4, **settings)
    shape = (1, 16, 16)
    return build(config, Dataset("tiny", *(make_images(8, 4, shape, seed) for seed in range(3))), torch.device("cpu"))


@pytest.mark.parametrize("recorder", [None, Immediately()])
def test_every_candidate_is_run_as_it_is_called(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readings of the clock an iteration; the one of `vmap unfold` goes slower."""
    state = untrained(cuda_graph=recorder is not None)
    now, seen = [0.0], []

    def clock() -> float:
        here = Candidate("loop" if state.learner.engine == "loop" else "vmap", gpu_kernels.current())
        seen.append(here)
        now[0] += 1 if here == Candidate("vmap", Kernels("unfold")) else 2
        return now[0]

    batch = state.learner.batch(state.train_tasks.sample(2))
    found = gpu_rehearsal.fastest_on_gpu(state, batch, clock, recorder)
    assert found.candidate == Candidate("vmap", Kernels("unfold"))
    given = candidates(state.learner.model, torch.device("cpu"))
    assert not any(one.kernels.triton for one in given)
    assert set(seen) == {*given, found.candidate._replace(kernels=Kernels("unfold", cudnn_benchmark=True))}
    assert state.learner.engine == "auto"
    assert gpu_kernels.current() == Kernels()
    assert all(parameter.grad is None for parameter in state.learner.parameters())


def test_auto_asks_the_clock_on_a_gpu_and_keeps_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    state = untrained()
    monkeypatch.setattr(TrainState, "device", torch.device("cuda"))
    monkeypatch.setattr(state.learner, "execution_mode", lambda batch: engine.ExecutionMode("vmap"))
    monkeypatch.setattr(rehearsal, "fastest_on_gpu", lambda state, batch: Fastest(CHOSEN, "measured"))
    assert rehearsal.choose_engine(state) == engine.Choice("vmap", "measured", CHOSEN.kernels)
    state.progress.engine = CHOSEN.text
    assert rehearsal.choose_engine(state) == engine.Choice("vmap", "as before", CHOSEN.kernels)
    state.learner.engine = "loop"
    assert rehearsal.choose_engine(state) == engine.Choice("loop", "as asked")


def test_a_run_has_the_chosen_kernels_says_so_and_puts_them_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    train_step = TrainState.train_step
    monkeypatch.setattr(TrainState, "train_step", lambda s: (seen.append(gpu_kernels.current()), train_step(s))[1])
    monkeypatch.setattr(loop, "choose_engine", lambda state: engine.Choice("vmap", "measured", CHOSEN.kernels))
    options: Any = {"validate_tasks": 2, "test_tasks": 2, "hidden": 4, "queries": 2}
    config = TrainConfig(iterations=2, output_dir=tmp_path / "run", **options)
    summary = loop.train(config, dataset=Dataset("tiny", *(make_images(8, 4, (1, 16, 16), s) for s in range(3))))
    assert seen == [CHOSEN.kernels] * 2
    assert summary["engine"] == CHOSEN.text
    assert f"engine {CHOSEN.text}: measured" in capsys.readouterr().out
    assert gpu_kernels.current() == Kernels()
    assert not torch.backends.cudnn.benchmark


def test_without_interpretation_no_candidate_runs_triton_on_a_cpu() -> None:
    assert not block.interpreted()
