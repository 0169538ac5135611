"""Initial weights against the formulas of their papers, and the head that starts every task from zeros."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import MAML, FewShotError, MetaAgnosticSAM, MetaLearner
from fewshot_asam.analysis.congruence import congruence
from fewshot_asam.cli import train_maml
from fewshot_asam.episodes import Episodes
from fewshot_asam.models import build_model
from fewshot_asam.models.initialisation import initialise
from fewshot_asam.rules import Rule
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.config import TrainConfig
from problems import RULES, SHAPE, deviation, episodes, made_learner, meta_gradient, seeded, shifted, smooth_net

KINDS = [("conv4", 32), ("resnet12", 8)]


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def fans(weight: Tensor) -> tuple[int, int]:
    """Numbers of inputs and outputs of one unit, taps of the kernel included."""
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps


def uniform(values: Tensor, bound: float) -> bool:
    """Within the bounds, close to both, and of a uniform distribution's standard deviation (to 6 standard errors)."""
    close = 6 * bound / math.sqrt(values.numel())
    fills = values.max() > bound - close and values.min() < close - bound
    return bool(values.abs().max() <= bound) and bool(fills) and abs(values.std() - bound / math.sqrt(3)) < close


@pytest.mark.parametrize(("name", "hidden"), KINDS)
def test_pytorch_draws_uniformly_up_to_one_over_the_root_of_the_fan_in(name: Any, hidden: int) -> None:
    model = build_model(name, 20, (3, 32, 32), hidden, seed=0, init="pytorch")
    for layer in layers(model):
        assert uniform(layer.weight, 1 / math.sqrt(fans(layer.weight)[0]))
    assert model.head.bias.abs().max() <= 1 / math.sqrt(model.head.in_features)
    assert model.head.bias.abs().min() > 0


@pytest.mark.parametrize(("name", "hidden"), KINDS)
def test_xavier_draws_uniformly_up_to_the_root_of_six_over_both_fans(name: Any, hidden: int) -> None:
    model = build_model(name, 20, (3, 32, 32), hidden, seed=0, init="xavier")
    for layer in layers(model):
        assert uniform(layer.weight, math.sqrt(6 / sum(fans(layer.weight))))
    assert not model.head.bias.any()


@pytest.mark.parametrize(("name", "hidden"), KINDS)
def test_a_truncated_normal_has_its_width_and_its_bounds(name: Any, hidden: int) -> None:
    model = build_model(name, 20, (3, 32, 32), hidden, seed=0, init="truncated_normal")
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    spread = 0.02 * math.sqrt(1 - 4 * density / inside)
    for layer in layers(model):
        assert layer.weight.abs().max() <= 0.04
        assert abs(layer.weight.std() / spread - 1) < 6 / math.sqrt(layer.weight.numel())
    assert not model.head.bias.any()


def test_norms_are_left_as_they_are() -> None:
    model = smooth_net()
    initialise(model, "truncated_normal")
    assert torch.equal(model.first_norm.weight, torch.ones(4))
    assert not model.first.bias.any()


@pytest.mark.parametrize("init", ["pytorch", "xavier", "truncated_normal"])
@pytest.mark.parametrize(("name", "hidden"), KINDS)
def test_a_head_of_zeros_changes_no_other_weight_and_gives_each_class_the_same_chance(
    name: Any, hidden: int, init: Any
) -> None:
    usual, zeroed = (build_model(name, 3, SHAPE, hidden, 0, init, head).double() for head in ("default", "zeros"))
    for value, other in zip(usual.blocks.parameters(), zeroed.blocks.parameters(), strict=True):
        assert torch.equal(value, other)
    assert usual.head.weight.all()
    output = MAML(zeroed, 0.1).meta_loss(episodes(), 0)
    assert not output.logits.any()
    assert output.loss.item() == pytest.approx(math.log(3), abs=1e-15)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_zeroed_in_every_task_the_stored_head_changes_nothing_and_is_not_learned(engine: Any) -> None:
    batch, found = episodes(), []
    for stored in (0.0, 1.0, float("nan")):
        model = smooth_net()
        nn.init.constant_(model.head.weight, stored)
        nn.init.constant_(model.head.bias, stored)
        learner = MetaAgnosticSAM(model, 0.1, rho=0.05, beta=0.9, zero_head=True, engine=engine, check=False)
        learner.meta_backward(batch, 2)
        assert not any(value.grad is not None and value.grad.any() for value in model.head.parameters())
        assert (model.head.weight == stored).all() or math.isnan(stored)
        with torch.no_grad():
            tested = learner.meta_loss(batch, 2).logits
        task = learner.clone().adapt(lambda net: F.cross_entropy(net(batch.support_x[0]), batch.support_y[0]), 2)
        own = task(batch.query_x[0])
        gradient = torch.cat([v.grad.flatten() for n, v in model.named_parameters() if not n.startswith("head")])
        torch.testing.assert_close(own, tested[0], rtol=1e-12, atol=1e-12)
        found.append((tested, gradient, congruence(learner, batch, torch.Generator().manual_seed(0))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    unzeroed = MetaAgnosticSAM(smooth_net(), 0.1, rho=0.05, beta=0.9, engine=engine)
    assert (unzeroed.meta_loss(batch, 2).logits - found[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", [name for name in RULES if "constant" not in name and "first order" not in name])
def test_the_meta_gradient_of_a_zeroed_head_is_the_finite_difference(name: str, engine: Any) -> None:
    model, batch = smooth_net(), episodes()
    learner = made_learner(model, 0.1, name, zero_head=True, engine=engine)
    gradient = meta_gradient(learner, batch)
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for by in (1e-5, -1e-5):
        with shifted(model, direction, by), torch.no_grad():
            values.append(learner.meta_loss(batch, 3).loss)
    slope = (values[0] - values[1]) / 2e-5
    assert gradient.abs().max() > 1e-3
    assert (slope - gradient @ direction).abs() / (gradient.norm() * direction.norm()) < 1e-8


@pytest.mark.parametrize("name", RULES)
def test_a_zeroed_head_is_the_same_vectorised_and_recomputed(name: str) -> None:
    expected = meta_gradient(made_learner(smooth_net(), 0.1, name, zero_head=True, engine="loop"), episodes())
    for engine, recompute in (("vmap", False), ("loop", True), ("vmap", True)):
        learner = made_learner(smooth_net(), 0.1, name, zero_head=True, engine=engine, recompute=recompute)
        assert deviation(meta_gradient(learner, episodes()), expected) < 1e-10


@pytest.mark.parametrize("name", RULES)
def test_the_meta_gradient_at_a_stored_head_of_zeros_is_of_the_usual_size(name: str) -> None:
    """The first inner gradient of all layers below such a head is 0, and ASAM scales that of the head by 0."""
    model = build_model("conv4", 3, SHAPE, 4, 0, head_init="zeros").double()
    assert 0.01 < meta_gradient(made_learner(model, 0.1, name), episodes(), 1).norm() < 100


def relabelled(batch: Episodes, order: Tensor) -> Episodes:
    """The same images in the same places, class `n` called `order[n]`."""
    return Episodes(batch.support_x, order[batch.support_y], batch.query_x, order[batch.query_y])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["maml", "sharp_maml_low", "agnostic_sam momentum"])
def test_other_names_for_the_classes_permute_the_logits_of_a_zeroed_head(name: str, steps: int) -> None:
    batch, order = episodes(), torch.tensor([2, 0, 1])
    zeroed, usual = (made_learner(smooth_net(), 0.4, name, zero_head=zero) for zero in (True, False))
    before, after = (zeroed.meta_loss(one, steps).logits for one in (batch, relabelled(batch, order)))
    assert deviation(after[..., order], before) < 1e-12
    before, after = (usual.meta_loss(one, steps).logits for one in (batch, relabelled(batch, order)))
    assert deviation(after[..., order], before) > 1e-3


def in_steps(rule: Rule, steps: int, **options: Any) -> Tensor:
    learner = MetaLearner(smooth_net(), 0.4, rule, zero_head=True, **options)
    return torch.cat([learner.meta_loss(episodes(), steps).logits.flatten(), meta_gradient(learner, episodes(), steps)])


def test_from_a_zeroed_head_maml_s_first_step_is_anil_s_and_asam_s_is_maml_s() -> None:
    """Nothing below such a head has a gradient yet, and ASAM scales the head's perturbation by 0."""
    maml, asam, sam = MAMLRule(), RULES["sharp_maml_low adaptive"], RULES["sharp_maml_low"]
    assert deviation(in_steps(maml, 1), in_steps(maml, 1, adapt="head")) < 1e-12
    assert deviation(in_steps(asam, 1), in_steps(maml, 1)) < 1e-12
    for first, second in ((asam, maml), (sam, maml)):
        assert deviation(in_steps(first, 2), in_steps(second, 2)) > 1e-4
    assert deviation(in_steps(maml, 2), in_steps(maml, 2, adapt="head")) > 1e-4
    assert deviation(in_steps(sam, 1), in_steps(maml, 1)) > 1e-4


def test_a_zeroed_head_must_be_adapted() -> None:
    with pytest.raises(FewShotError, match="with adapt 'body' a head that starts every task from zeros would stay"):
        MAML(smooth_net(), 0.1, adapt="body", zero_head=True)
    for adapt in ("all", "head", "no_norm"):
        MAML(smooth_net(), 0.1, adapt=adapt, zero_head=True)


class HeadFirst(nn.Module):
    """Registers its last layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = nn.Linear(4, 3), nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(F.softplus(self.bottom(x)).mean((2, 3)))


def test_the_head_of_a_model_of_ones_own_is_checked_and_can_be_named() -> None:
    model, batch = seeded(HeadFirst), episodes()
    with pytest.raises(FewShotError, match=r"zero_head takes bottom\.bias, bottom\.weight for the head, but the"):
        MAML(model, 0.1, zero_head=True).meta_loss(batch, 1)
    learner = MAML(model, 0.1, zero_head=["top.*"])
    assert not learner.meta_loss(batch, 0).logits.any()
    learner.zero_head = False
    assert learner.meta_loss(batch, 0).logits.any()


def test_the_settings_reach_model_and_learner() -> None:
    config = TrainConfig(ways=3, hidden=4, init="pytorch", head_init="zeros_every_task")
    learner = build_learner(config, SHAPE)
    assert learner.inner_loop.zeroed == ("head.weight", "head.bias")
    usual = build_learner(replace(config, head_init="zeros"), SHAPE)
    assert not usual.inner_loop.zeroed
    assert not usual.model.head.weight.any()
    default = build_learner(replace(config, head_init="default"), SHAPE)
    assert default.model.head.weight.all()
    assert torch.equal(default.model.blocks[0].conv.weight, usual.model.blocks[0].conv.weight)
    given, _ = train_maml._settings(["--init", "truncated_normal", "--head-init", "zeros"], TrainConfig())
    assert (given.init, given.head_init) == ("truncated_normal", "zeros")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(init="he"), "init is 'he'; expected one of pytorch, xavier, truncated_normal"),
        (lambda: TrainConfig(head_init="zero"), "head_init is 'zero'; expected one of default, zeros, zeros_every"),
        (lambda: build_model("conv4", 3, SHAPE, 4, 0, init="he"), "init is 'he'"),
        (lambda: build_model("conv4", 3, SHAPE, 4, 0, head_init="one"), "head_init is 'one'; expected one of default"),
    ],
)
def test_bad_input_gets_one_clear_line(make: Any, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        make()


def test_a_result_says_a_start_that_is_not_the_usual_one() -> None:
    assert "init" not in TrainConfig().rule_text
    assert (
        TrainConfig(inner="maml", init="xavier", head_init="default").rule_text
        == "maml, init xavier, head_init default"
    )
