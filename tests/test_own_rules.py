"""Somebody's own rule is treated as the package's: everywhere the same numbers, or one clear line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fewshot_asam import FewShotError, MetaLearner, TrainConfig
from fewshot_asam.analysis.congruence import congruence
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.rules import rule_class, rule_name
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule
from fewshot_asam.training.config import from_yaml
from own_rules import Counting, Curved, Forgetful, HeavyBall, MySAM, Partial, Shrinking
from problems import deviation, episodes, meta_gradient, smooth_net

WAYS_TO_RUN: list[dict[str, Any]] = [
    {"engine": engine, "recompute": recompute} for engine in ("loop", "vmap") for recompute in (False, True)
]


@pytest.mark.parametrize("options", WAYS_TO_RUN, ids=str)
def test_the_same_rule_written_by_somebody_else(options: dict[str, Any]) -> None:
    model, batch = smooth_net(), episodes()
    expected = meta_gradient(MetaLearner(model, 0.1, SharpMAMLRule(0.05), engine="loop"), batch)
    assert deviation(meta_gradient(MetaLearner(model, 0.1, MySAM(), **options), batch), expected) < 1e-11


@pytest.mark.parametrize("options", WAYS_TO_RUN, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_state_is_kept_over_the_steps_of_a_task(nesterov: bool, options: dict[str, Any]) -> None:
    """Against PyTorch's SGD with the same momentum, without a graph."""
    model, batch = smooth_net(), episodes()
    learner = MetaLearner(model, 0.1, HeavyBall(0.8, nesterov), **options)
    with torch.no_grad():
        found = learner.meta_loss(batch, 4).logits
    for i in range(batch.num_tasks):
        net = smooth_net()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.8, nesterov=nesterov)
        for _ in range(4):
            sgd.zero_grad()
            F.cross_entropy(net(batch.support_x[i]), batch.support_y[i]).backward()
            sgd.step()
        assert deviation(found[i], net(batch.query_x[i]).detach()) < 1e-11


@pytest.mark.parametrize("options", WAYS_TO_RUN, ids=str)
def test_meta_gradient_is_that_of_clone_and_adapt(options: dict[str, Any]) -> None:
    learner, batch = MetaLearner(smooth_net(), 0.1, HeavyBall(), **options), episodes()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(batch.num_tasks):
        task = learner.clone().adapt(lambda net, i=i: F.cross_entropy(net(batch.support_x[i]), batch.support_y[i]), 3)
        total = total + F.cross_entropy(task(batch.query_x[i]), batch.query_y[i]) / batch.num_tasks
    grads = torch.autograd.grad(total, list(learner.parameters()))
    assert deviation(meta_gradient(learner, batch), torch.cat([grad.flatten() for grad in grads])) < 1e-10


def test_congruence_takes_any_rule() -> None:
    learner = MetaLearner(smooth_net(), 0.1, MySAM())
    found = congruence(learner, episodes(), torch.Generator().manual_seed(0))
    same = replace(SharpMAMLRule(), rho=0.05)
    learner.rule = same
    torch.testing.assert_close(found, congruence(learner, episodes(), torch.Generator().manual_seed(0)))


def test_a_rule_is_found_by_its_name() -> None:
    assert rule_class("own_rules:MySAM") is MySAM
    assert [rule_name(rule) for rule in (MySAM, SharpMAMLRule())] == ["own_rules:MySAM", "sharp_maml_low"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sam", "inner is 'sam'; expected one of agnostic_sam, maml, sharp_maml_low, or package.module:Rule"),
        ("own_rules:Nothing", "inner is 'own_rules:Nothing', but own_rules has no 'Nothing'"),
        ("no_such_module:Rule", "there is no module 'no_such_module'"),
        ("own_rules:NOT_A_RULE", "has no init and step"),
        ("a b:c", "expected package.module:name"),
    ],
)
def test_names_of_no_rule(name: str, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        TrainConfig(inner=name)


def test_what_is_no_rule() -> None:
    with pytest.raises(FewShotError, match=r"the class MySAM; expected an instance: MySAM\(...\)"):
        MetaLearner(smooth_net(), 0.1, MySAM)  # type: ignore[arg-type]
    for engine in ("loop", "vmap"):
        with pytest.raises(FewShotError, match="own_rules:Forgetful returned something else than the new parameters"):
            MetaLearner(smooth_net(), 0.1, Forgetful(), engine=engine).meta_loss(episodes(), 1)  # type: ignore[arg-type]


TINY = "--ways 3 --queries 2 --hidden 8 --iterations 4 --validate-every 2 --validate-tasks 4 --test-tasks 4"
TINY += " --seed 3 --schedule constant --engine loop"


def test_its_fields_are_options_and_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Trained, stopped, resumed, tested: by the command line alone."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    rule = ["--inner", "own_rules:HeavyBall", "--decay", "0.5", "--nesterov", "true"]
    assert train_maml.main([*TINY.split(), *rule, "--output-dir", str(whole)]) == 0
    config = from_yaml(whole / "config.yaml")
    assert config.rule == HeavyBall(0.5, True)
    assert config.inner_settings == {"decay": 0.5, "nesterov": True, "kind": "plain"}
    assert "own_rules:HeavyBall, decay 0.5, nesterov True" in capfd.readouterr().out
    assert (
        train_maml.main([*TINY.replace("--iterations 4", "--iterations 2").split(), *rule, "--output-dir", str(run)])
        == 0
    )
    assert train_maml.main(["--resume", "--output-dir", str(run), "--iterations", "4", "--decay", "0.6"]) == 2
    assert "decay" in capfd.readouterr().err
    assert train_maml.main(["--resume", "--output-dir", str(run), "--iterations", "4"]) == 0
    assert eval_maml.main([str(run), "--tasks", "4"]) == 0
    assert eval_maml.main([str(run), "--tasks", "4", "--inner", "maml"]) == 0
    assert "NOT as trained (inner own_rules:HeavyBall)" in capfd.readouterr().out
    again = ["--config", str(whole / "config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert train_maml.main(again) == 0
    weights = [load_file(folder / "last.safetensors") for folder in (whole, run, tmp_path / "again")]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_settings_shared_with_the_package_are_its_own(tmp_path: Path) -> None:
    """`rho` is 0.05 by default there, whatever it is for the package's rules."""
    run = ["--inner", "own_rules:MySAM", *TINY.split()]
    assert train_maml.main([*run, "--output-dir", str(tmp_path / "usual")]) == 0
    assert from_yaml(tmp_path / "usual" / "config.yaml").rule == MySAM(0.05)
    assert train_maml.main([*run, "--rho", "0.0005", "--output-dir", str(tmp_path / "small")]) == 0
    assert from_yaml(tmp_path / "small" / "config.yaml").rule == MySAM(0.0005)
    assert TrainConfig(inner="own_rules:MySAM").rule == MySAM(0.05)
    assert TrainConfig(inner="own_rules:MySAM", rho=0.2).rule == MySAM(0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--decay fast", "decay is 'fast'; expected a number"),
        ("--decai 0.5", "decai"),
        ("--rule own_rules:HeavyBall", "rule"),
    ],
)
def test_mistakes_cost_one_line(words: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ["--inner", "own_rules:HeavyBall", *TINY.split(), "--output-dir", str(tmp_path / "run")]
    assert train_maml.main([*run, *words.split()]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(FewShotError, match="inner_settings of own_rules:MySAM: there is no setting 'tau'"):
        TrainConfig(inner="own_rules:MySAM", inner_settings={"tau": 1})


@pytest.mark.parametrize("options", WAYS_TO_RUN, ids=str)
def test_a_state_of_whole_numbers_and_parameters_in_another_order(options: dict[str, Any]) -> None:
    """Against MAML's steps of rates that are written out."""
    model, batch = smooth_net(), episodes()

    class Shorter(torch.nn.Module):
        def forward(self, step: int) -> dict[str, float]:
            return {name: 0.2 / (step + 1) for name, _ in model.named_parameters()}

    expected = meta_gradient(MetaLearner(model, Shorter(), MAMLRule(), engine="loop"), batch)
    found = meta_gradient(MetaLearner(model, 0.2, Counting(torch.tensor(0)), **options), batch)
    assert deviation(found, expected) < 1e-11


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Partial(), {"engine": "loop"}, "asked for the gradient at 2 of 10 parameters; expected all of them"),
        (Partial(), {"engine": "vmap"}, "asked for the gradient at 2 of 10 parameters; expected all of them"),
        (Curved(), {"engine": "vmap"}, "differentiates a gradient itself, which vmap cannot do; use engine='loop'"),
        (Counting(), {"engine": "loop"}, "the rule remembers 0, a int; expected tensors alone"),
        (Shrinking(), {"engine": "loop", "recompute": True}, r"use a parameter of shape \[\] .* use recompute=False"),
        (Shrinking(), {"engine": "vmap", "recompute": True}, r"use a parameter of shape \[\] .* use recompute=False"),
    ],
)
def test_what_would_be_wrong_without_a_word(rule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        meta_gradient(MetaLearner(smooth_net(), 0.1, rule, **options), episodes())


def test_a_gradient_at_some_parameters_in_a_loop_of_ones_own() -> None:
    batch = episodes()
    with pytest.raises(FewShotError, match="2 of 10 parameters"):
        MetaLearner(smooth_net(), 0.1, Partial()).clone().adapt(
            lambda net: F.cross_entropy(net(batch.support_x[0]), batch.support_y[0])
        )


def test_the_parameter_of_a_rule_is_learned() -> None:
    rule = Shrinking()
    learner, batch = MetaLearner(smooth_net(), 0.1, rule, engine="vmap"), episodes()
    found = torch.autograd.grad(learner.meta_loss(batch, 3).loss, rule.by)[0].item()

    def at(value: float) -> float:
        rule.by.data.fill_(value)
        return learner.meta_loss(batch, 3).loss.item()

    assert found == pytest.approx((at(0.9 + 1e-5) - at(0.9 - 1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"error: code of your own failed \(KeyError: 'blocks.0.conv.weights', own_rules.py line \d+\)"),
        ("--inside-torch true", r"error: code of your own failed \(TypeError: .*, own_rules.py line \d+\)"),
    ],
)
def test_an_exception_of_a_rule_is_one_line_that_says_where(
    words: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ["--inner", "own_rules:Mistyped", *TINY.split(), *words.split(), "--output-dir", str(tmp_path / "run")]
    assert train_maml.main(run) == 2
    assert re.fullmatch(message, capfd.readouterr().err.strip().splitlines()[-1])
