"""What MAML++ and Sharp-MAML add to training, each against a training loop written out here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fewshot_asam import EpisodeSampler, FewShotError, TrainConfig, train
from fewshot_asam.cli import eval_maml
from fewshot_asam.runtime.distributed import PeerLost
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.meta_step import _sharpness_aware
from fewshot_asam.training.schedules import step_weights
from own_parts import learned_rate, own_dataset

ITERATIONS = 6
CONFIG = TrainConfig(
    ways=3, queries=2, hidden=4, inner_steps=3, inner_lr=0.2, iterations=ITERATIONS, meta_batch_size=2, meta_lr=0.01,
    schedule="constant", head_init="default", validate_every=2, validate_tasks=4, test_tasks=4, engine="loop", rho=0.05,
)  # fmt: skip
SWITCHES: dict[str, dict[str, Any]] = {
    "multi-step loss": {"multi_step_iterations": 4},
    "first order at first": {"first_order_iterations": 3},
    "rates of tensors": {"learned_rates": "tensor"},
    "rates of elements": {"learned_rates": "element"},
    "rates of layers and steps": {"learned_rates": "layer_and_step"},
    "outer radius": {"outer_rho": 0.1},
    "all together": {
        **{"multi_step_iterations": 4, "first_order_iterations": 3, "learned_rates": "layer_and_step"},
        "outer_rho": 0.1,
    },
}


@pytest.fixture
def double() -> Iterator[None]:
    """Adam divides by the size of a gradient, so that rounding in single precision soon shows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss_by_hand(learner: Any, episodes: Any, config: TrainConfig, iteration: int) -> torch.Tensor:
    """The meta-loss of an iteration by `clone` and `adapt`, step by step."""
    first_order = iteration < config.first_order_iterations
    done = iteration / config.multi_step_iterations if config.multi_step_iterations else 1.0
    total = torch.zeros(())
    for i in range(config.meta_batch_size):
        task = learner.clone(first_order=first_order)
        for step in range(config.inner_steps):
            task.adapt(lambda net, i=i: F.cross_entropy(net(episodes.support_x[i]), episodes.support_y[i]))
            if done < 1:
                equal = 1 / config.inner_steps
                earlier = max(equal - done * equal, 0.03 * equal)
                last = step == config.inner_steps - 1
                weight = 1 - earlier * (config.inner_steps - 1) if last else earlier
            else:
                weight = float(step == config.inner_steps - 1)
            total = total + weight * F.cross_entropy(task(episodes.query_x[i]), episodes.query_y[i])
    return total / config.meta_batch_size


def trained_by_hand(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The last weights of a plain loop."""
    dataset = own_dataset()
    learner = build_learner(config, dataset.train.shape)
    sampler = EpisodeSampler(dataset.train, config.ways, config.shots, config.queries, seed=config.seed)
    adam = torch.optim.Adam(learner.parameters(), lr=config.meta_lr)
    parameters = list(learner.parameters())
    for iteration in range(config.iterations):
        episodes = sampler.sample(config.meta_batch_size)
        loss = loss_by_hand(learner, episodes, config, iteration)
        grads = torch.autograd.grad(loss, parameters)
        if config.outer_rho:
            length = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
            start = [parameter.detach().clone() for parameter in parameters]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.data += config.outer_rho * grad / length
            grads = torch.autograd.grad(loss_by_hand(learner, episodes, config, iteration), parameters)
            for parameter, value in zip(parameters, start, strict=True):
                parameter.data = value
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        adam.step()
    return dict(learner.state_dict())


@pytest.mark.parametrize("inner", ["maml", "sharp_maml_low", "agnostic_sam"])
@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.usefixtures("double")
def test_training_is_the_loop_written_out(name: str, inner: str, tmp_path: Path) -> None:
    config = replace(CONFIG, inner=inner, **SWITCHES[name], output_dir=tmp_path / "run")
    train(config, dataset=own_dataset())
    found, expected = load_file(tmp_path / "run" / "last.safetensors"), trained_by_hand(config)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    usual = trained_by_hand(replace(CONFIG, inner=inner))
    assert max((found[key] - usual[key]).abs().max().item() for key in usual) > 5e-3, "the switch does something"


@pytest.mark.parametrize("name", ["all together"])
def test_a_stopped_run_goes_on_in_its_phase(name: str, tmp_path: Path) -> None:
    """Stopped within the first-order phase, and again within the multi-step one."""
    whole = replace(CONFIG, **SWITCHES[name], output_dir=tmp_path / "whole")
    train(whole, dataset=own_dataset())
    parts = replace(whole, output_dir=tmp_path / "parts")
    for iterations in (2, 3, ITERATIONS):
        train(replace(parts, iterations=iterations), dataset=own_dataset(), resume=iterations > 2)
    weights = [load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts")]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_a_given_learner_keeps_its_own_order(tmp_path: Path) -> None:
    """The run ends within its first-order phase."""
    given = learned_rate()
    train(replace(CONFIG, first_order_iterations=9, output_dir=tmp_path), learner=given, dataset=own_dataset())
    assert given.first_order is False


def test_a_gradient_that_fails_leaves_the_weights_where_they_were() -> None:
    """Where another process is lost, a checkpoint is made of them."""
    parameter, calls = torch.nn.Parameter(torch.tensor([0.1, 0.7])), 0

    def gradient(_: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise PeerLost("gone")
        return torch.tensor([1.0, 2.0, 0.0, 0.0])

    with pytest.raises(PeerLost):
        _sharpness_aware(gradient, [parameter], 0.3)(None)  # type: ignore[arg-type]
    assert parameter.tolist() == torch.tensor([0.1, 0.7]).tolist()


def test_snapshots_of_a_lost_life_are_removed(tmp_path: Path) -> None:
    """The newer checkpoint and its line of metrics are lost; the run then ends before it comes so far again."""
    config = replace(CONFIG, keep_snapshots=True, checkpoint_every=2, output_dir=tmp_path)
    train(config, dataset=own_dataset())
    (tmp_path / "checkpoints" / f"{ITERATIONS:010d}.ckpt").unlink()
    train(replace(config, iterations=5), dataset=own_dataset(), resume=True)
    assert sorted(int(path.stem) for path in (tmp_path / "snapshots").iterdir()) == [2, 4, 5]


def test_weights_of_the_steps() -> None:
    assert step_weights(5, 0.0) == pytest.approx([0.2] * 5)
    assert step_weights(5, 0.5) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    assert step_weights(5, 0.99) == pytest.approx([0.006] * 4 + [0.976])
    assert step_weights(5, 1.0) == [0, 0, 0, 0, 1]
    assert step_weights(1, 0.3) == [1.0]


TINY = ["--ways", "3", "--queries", "2", "--hidden", "4", "--iterations", "6", "--validate-every", "2"]
TINY += ["--validate-tasks", "4", "--test-tasks", "4", "--engine", "loop", "--keep-snapshots", "true"]


def test_an_ensemble_of_the_best_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewshot_asam.cli import train_maml

    run = tmp_path / "run"
    assert train_maml.main([*TINY, "--output-dir", str(run)]) == 0
    assert sorted(path.stem for path in (run / "snapshots").iterdir()) == ["0000000002", "0000000004", "0000000006"]
    capsys.readouterr()
    assert eval_maml.main([str(run), "--tasks", "6", "--ensemble", "2", "--permutations", "3"]) == 0
    said = capsys.readouterr().out
    assert "of an ensemble of 2 checkpoints, the mean over 3 numberings of the classes" in said
    assert eval_maml.main([str(run), "--tasks", "6", "--ensemble", "4"]) == 2
    assert "3 snapshots of its validations; expected 1 to that many" in capsys.readouterr().err


def test_rates_learned_for_some_steps_are_tested_with_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewshot_asam.cli import train_maml

    run = tmp_path / "run"
    words = ["--learned-rates", "layer_and_step", "--inner-steps", "2", "--output-dir", str(run)]
    assert train_maml.main([*TINY, *words]) == 0
    assert "learned_rates layer_and_step" in capsys.readouterr().out
    assert eval_maml.main([str(run), "--tasks", "4", "--inner-steps", "5"]) == 0
    assert eval_maml.main([str(run), "--tasks", "4", "--inner-lr", "0.1"]) == 2
    assert "learned its inner rates; leave --inner-lr out" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("outer_rho", -0.1), ("outer_rho", 1e31), ("first_order_iterations", -1)])
def test_bad_values(name: str, value: float) -> None:
    with pytest.raises(FewShotError, match=f"{name} is "):
        replace(CONFIG, **{name: value})
