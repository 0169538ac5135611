"""Inner rates that are learned, against finite differences and against formulas written out for one task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import MAML, FewShotError, LearnedRates
from problems import RULES, deviation, episodes, made_learner, meta_gradient, smooth_net

STEPS = 3
KINDS: dict[str, dict[str, Any]] = {
    "tensor": {"per": "tensor", "lr": 0.1},
    "element": {"per": "element", "lr": 0.1},
    "layer_and_step": {"per": "layer_and_step", "lr": 0.1, "steps": STEPS},
    "by name": {"per": "tensor", "lr": {"head.*": 0.3, "*": 0.05}},
}


def learner_with(kind: str, rule: str = "maml", **options: Any) -> Any:
    model = smooth_net()
    return made_learner(model, LearnedRates(model, **KINDS[kind]), rule, **options)


def scattered(learner: Any) -> None:
    """Different values for all rates, as training would leave them."""
    generator = torch.Generator().manual_seed(0)
    for value in learner.lr.parameters():
        factor = torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5
        value.data.mul_(factor)


@pytest.mark.parametrize("rule", ["maml", "sharp_maml_low", "agnostic_sam momentum", "maml first order"])
@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_by_hand(kind: str, rule: str) -> None:
    """`theta' = theta - alpha * g`, written out with the rates of each step and the gradients of the rule of rate 1."""
    learner, batch = learner_with(kind, rule), episodes(tasks=1)
    scattered(learner)
    unit = made_learner(learner.model, 1.0, rule)
    reference, task = unit.clone(), learner.clone()

    def loss(net: Any) -> Tensor:
        return F.cross_entropy(net(batch.support_x[0]), batch.support_y[0])

    for step in range(STEPS):
        reference.params = dict(task.params)
        expected = dict(task.params)
        reference.adapt(loss)
        for name, rate in learner.lr(step).items():
            expected[name] = task.params[name] - rate * (task.params[name] - reference.params[name])
        task.adapt(loss)
        assert max(deviation(task.params[name], expected[name]) for name in expected) < 1e-12


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_rates_is_a_finite_difference(kind: str, recompute: bool, engine: str) -> None:
    learner, batch = learner_with(kind, "agnostic_sam", engine=engine, recompute=recompute), episodes()
    scattered(learner)
    rates = list(learner.lr.parameters())
    found = torch.autograd.grad(learner.meta_loss(batch, STEPS).loss, rates)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in rates]

    def at(by: float) -> float:
        for value, along in zip(rates, direction, strict=True):
            value.data.add_(along, alpha=by)
        loss = learner.meta_loss(batch, STEPS).loss.item()
        for value, along in zip(rates, direction, strict=True):
            value.data.sub_(along, alpha=by)
        return loss

    slope = sum((grad * along).sum().item() for grad, along in zip(found, direction, strict=True))
    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_equal_rates_are_one_rate(rule: str) -> None:
    model = smooth_net()
    one = meta_gradient(made_learner(model, 0.1, rule, engine="vmap"), episodes())
    several = made_learner(model, LearnedRates(model, lr=0.1), rule, engine="vmap")
    assert deviation(meta_gradient(several, episodes())[: len(one)], one) < 1e-10


def test_rates_are_of_the_learner() -> None:
    learner = learner_with("layer_and_step")
    assert learner.state_dict()["lr.values.head"].shape == (STEPS,)
    copy = learner_with("layer_and_step")
    scattered(learner)
    copy.load_state_dict(learner.state_dict())
    torch.testing.assert_close(copy.lr(1)["head.weight"], learner.lr(1)["head.weight"])
    assert {id(value) for value in learner.lr.parameters()} <= {id(value) for value in learner.parameters()}


def test_steps_beyond_the_last_take_its_rates() -> None:
    rates = learner_with("layer_and_step").lr
    rates.values["head"].data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert [rates(step)["head.bias"].item() for step in (0, 2, 9)] == [1.0, 3.0, 3.0]


def test_a_rate_may_be_set_later() -> None:
    learner = learner_with("tensor")
    learner.lr = 0.2
    assert "lr.values.head/weight" not in learner.state_dict()
    expected = meta_gradient(MAML(learner.model, 0.2), episodes())
    assert deviation(meta_gradient(learner, episodes()), expected) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per": "weight"}, "per is 'weight'; expected one of tensor, element, layer_and_step"),
        ({"per": "layer_and_step"}, "expected steps with 'layer_and_step'"),
        ({"per": "tensor", "steps": 2}, "expected steps with 'layer_and_step'"),
        ({"per": "layer_and_step", "steps": 0}, "steps is 0"),
        ({"lr": 0.0}, r"rate is 0\.0"),
        ({"lr": {"head.*": 0.1}}, "no rate for parameter 'first.weight'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        LearnedRates(smooth_net(), **settings)


def test_rates_of_another_model_are_refused() -> None:
    with pytest.raises(FewShotError, match=r"no inner learning rate for parameter 'first\.weight'"):
        MAML(smooth_net(), LearnedRates(nn.Linear(2, 2)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_rate_that_is_computed(engine: str, recompute: bool) -> None:
    """The logarithm of a rate is learned: its graph is one for all tasks, and there are two."""
    log_rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64).log())
    learner = MAML(smooth_net(), log_rate.exp(), engine=engine, recompute=recompute)
    learner.meta_backward(episodes(), STEPS)
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    plain = MAML(smooth_net(), rate, engine=engine)
    plain.meta_loss(episodes(), STEPS).loss.backward()
    assert log_rate.grad is not None
    assert rate.grad is not None
    assert log_rate.grad.item() == pytest.approx(0.1 * rate.grad.item(), rel=1e-12)
    found, expected = ([value.grad for value in one.model.parameters()] for one in (learner, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Positive(nn.Module):
    """Rates that are computed anew in each step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.names = [name for name, _ in model.named_parameters()]

    def forward(self, step: int) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, F.softplus(self.raw) / (step + 1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_module_that_computes_rates(engine: str, recompute: bool) -> None:
    model = smooth_net()
    learner = MAML(model, Positive(model), engine=engine, recompute=recompute)
    learner.meta_backward(episodes(), STEPS)
    found = learner.lr.raw.grad.item()

    def at(value: float) -> float:
        learner.lr.raw.data.fill_(value)
        return learner.meta_loss(episodes(), STEPS).loss.item()

    assert found == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)


class Keyed(nn.Module):
    """Layers whose names a dictionary has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.pop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.update = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.pop(self.values(self.keys(x)) * self.update)


@pytest.mark.parametrize("per", ["tensor", "layer_and_step"])
def test_layers_may_have_any_names(per: Any) -> None:
    model = Keyed()
    rates = LearnedRates(model, per, lr={"keys.*": 0.3, "*": 0.1}, steps=2 if per == "layer_and_step" else None)
    found = {name: round(value.item(), 6) for name, value in rates(0).items()}
    assert found == {name: 0.3 if name.startswith("keys") else 0.1 for name, _ in model.named_parameters()}
    other = LearnedRates(model, per, steps=rates.steps)
    other.load_state_dict(rates.state_dict())
    assert other(0)["keys.weight"].item() == rates(0)["keys.weight"].item()
