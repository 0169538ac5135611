"""The five identities that tie the rules together, in float64; each prints the largest deviation it saw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewshot_asam import FewShotError
from fewshot_asam.learners import MetaLearner, Norm
from fewshot_asam.models import build_model
from fewshot_asam.rules import Rule, rule_class, rule_name
from fewshot_asam.rules.agnostic_sam import AgnosticSAMRule
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule
from fewshot_asam.rules.validation_sets import Validation
from problems import RULES, SHAPE, deviation, episodes, made_learner, meta_gradient, shifted, smooth_net

MAML = MAMLRule()
EXACT = 1e-10


def compare(first: Rule, second: Rule, validation: Validation = "duplicate") -> float:
    """How far loss and meta-gradient of two rules are apart, on two models."""
    worst = 0.0
    for model in (smooth_net(), build_model("conv4", 3, SHAPE, 4, seed=0).double()):
        for engine in ("loop", "vmap"):
            learners = [MetaLearner(model, 0.1, rule, validation=validation, engine=engine) for rule in (first, second)]
            worst = max(worst, deviation(*(meta_gradient(learner, episodes()) for learner in learners)))
            losses = [learner.meta_loss(episodes(), 3, torch.Generator().manual_seed(0)).loss for learner in learners]
            worst = max(worst, deviation(*losses))
    return worst


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("validation", ["duplicate", "augment", "split"])
@pytest.mark.parametrize("name", ["sharp_maml_low", "agnostic_sam"])
def test_identity_1_zero_radii_are_maml(name: str, validation: Validation, adaptive: bool) -> None:
    zero: Any = rule_class(name)
    zero = zero(rho=0.0, adaptive=adaptive)
    worst = compare(zero, MAML, validation)
    print(f"\nidentity 1, {name}, {validation}: largest deviation {worst:.1e}")
    assert worst < EXACT
    assert compare(replace(zero, rho=0.05), MAML, validation) > 1e-4


@pytest.mark.parametrize("switches", [{}, {"val_grad_point": "current"}, {"val_norm": "current"}, {"beta": 0.9}])
@pytest.mark.parametrize("validation", ["duplicate", "augment", "split"])
def test_identity_2_no_validation_radius_is_sharp_maml(validation: Validation, switches: dict[str, object]) -> None:
    rule = AgnosticSAMRule(rho1=0.05, rho2=0.0, **switches)
    worst = compare(rule, SharpMAMLRule(rho=0.05), validation)
    print(f"\nidentity 2, {validation}, {switches}: largest deviation {worst:.1e}")
    assert worst < EXACT
    assert compare(replace(rule, rho2=0.05), SharpMAMLRule(rho=0.05), validation) > 1e-4


def test_identity_3_duplicate_at_the_current_point_is_sharp_maml_of_the_difference() -> None:
    rule = AgnosticSAMRule(rho1=0.07, rho2=0.02, val_grad_point="current")
    worst = compare(rule, SharpMAMLRule(rho=0.05))
    print(f"\nidentity 3: largest deviation {worst:.1e}")
    assert worst < EXACT


def test_identity_3_leaves_a_term_of_second_order_in_the_radius() -> None:
    """The paper's own setting against Sharp-MAML_low of radius rho: ten times the radius, a hundred times apart."""
    model, batch = smooth_net(), episodes()

    def apart(rho: float) -> float:
        rules = AgnosticSAMRule(rho=rho), SharpMAMLRule(rho=rho)
        start, agnostic, sharp = (
            torch.cat([value.detach().flatten() for value in task.params.values()])
            for task in [MetaLearner(model, 0.1, MAML).clone()]
            + [
                MetaLearner(model, 0.1, rule)
                .clone()
                .adapt(lambda net: torch.nn.functional.cross_entropy(net(batch.support_x[0]), batch.support_y[0]))
                for rule in rules
            ]
        )
        return ((agnostic - sharp).norm() / (sharp - start).norm()).item()

    ratio = apart(5e-3) / apart(5e-4)
    print(
        f"\nidentity 3: relative distance {apart(5e-4):.1e} at rho 5e-4, {apart(5e-3):.1e} at 5e-3, ratio {ratio:.1f}"
    )
    assert 80 < ratio < 120


@pytest.mark.parametrize("inductive", [False, True], ids=["transductive", "inductive"])
@pytest.mark.parametrize("validation", ["duplicate", "augment", "split"])
@pytest.mark.parametrize("name", [name for name in RULES if "constant" not in name and "first order" not in name])
def test_identity_4_meta_gradient_is_the_finite_difference(name: str, validation: Validation, inductive: bool) -> None:
    model, batch = smooth_net(), episodes()
    norm = "inductive" if inductive else "transductive"
    learner = made_learner(model, 0.1, name, validation=validation, norm=norm, engine="vmap")
    gradient = meta_gradient(learner, batch)
    worst = 0.0
    for seed in range(3):
        direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = []
        for by in (1e-5, -1e-5):
            with shifted(model, direction, by), torch.no_grad():
                values.append(learner.meta_loss(batch, 3, torch.Generator().manual_seed(0)).loss)
        slope = (values[0] - values[1]) / 2e-5
        worst = max(worst, (slope - gradient @ direction).abs().item() / (gradient.norm() * direction.norm()).item())
    print(f"\nidentity 4, {name}, {validation}, {norm}: largest deviation {worst:.1e}")
    assert worst < 1e-8


def test_identity_4_for_conv4_away_from_its_kinks() -> None:
    model, batch = build_model("conv4", 3, SHAPE, 4, seed=0).double(), episodes()
    for rule in (MAML, RULES["agnostic_sam"]):
        learner = MetaLearner(model, 0.1, rule)
        gradient = meta_gradient(learner, batch)
        direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        direction /= direction.norm()
        values = []
        for by in (1e-7, -1e-7):
            with shifted(model, direction, by), torch.no_grad():
                values.append(learner.meta_loss(batch, 3).loss)
        slope = (values[0] - values[1]) / 2e-7
        worst = ((slope - gradient @ direction).abs() / gradient.norm()).item()
        print(f"\nidentity 4, conv4, {rule_name(rule)}: deviation {worst:.1e}")
        assert worst < 1e-6


@pytest.mark.parametrize("norm", ["transductive", "inductive"])
@pytest.mark.parametrize("validation", ["duplicate", "augment", "split"])
@pytest.mark.parametrize("name", RULES)
def test_identity_5_batched_is_one_task_at_a_time(name: str, validation: Validation, norm: Norm) -> None:
    model = build_model("conv4", 3, SHAPE, 4, seed=0).double()
    worst = batched_against_loop(model, RULES[name], 3, validation=validation, norm=norm)
    print(f"\nidentity 5, conv4, {name}, {validation}, {norm}: largest deviation {worst:.1e}")
    assert worst < EXACT


@pytest.mark.parametrize("name", ["maml", "sharp_maml_low", "agnostic_sam"])
def test_identity_5_for_resnet12(name: str) -> None:
    worst = batched_against_loop(build_model("resnet12", 3, SHAPE, 2, seed=0).double(), RULES[name], 2)
    print(f"\nidentity 5, resnet12, {name}: largest deviation {worst:.1e}")
    assert worst < EXACT


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), norm, nn.Softplus(), nn.Flatten(), nn.Linear(4 * 49, 3)).double()


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.RMSNorm([4, 7, 7])], ids=["group", "rms"])
def test_identity_5_for_a_users_norm(norm: nn.Module) -> None:
    assert batched_against_loop(with_norm(norm), RULES["agnostic_sam"], 2) < EXACT


class CallsLayerNorm(nn.Module):
    """A norm that no layer gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.ones(4, 7, 7)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[1:], self.scale, self.shift)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm([4, 7, 7]), CallsLayerNorm()],
    ids=["batch", "layer", "called"],
)
def test_norms_that_are_not_vectorised_would_be_wrong(norm: nn.Module) -> None:
    """If the second part fails, PyTorch has mended them."""
    with pytest.raises(FewShotError, match=r"second derivative of layer '1' \(.*Norm.*\) by vmap is wrong"):
        batched_against_loop(with_norm(norm), MAML, 2)
    assert batched_against_loop(with_norm(norm), MAML, 2, check=False) > 1e-7


def batched_against_loop(model: nn.Module, rule: Rule, steps: int, **options: Any) -> float:
    loop, vmap = (
        meta_gradient(MetaLearner(model, 0.1, rule, engine=engine, **options), episodes(), steps)
        for engine in ("loop", "vmap")
    )
    return deviation(vmap, loop)
