"""Gradient congruence against gradients taken by backward passes of a plain module."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fewshot_asam.analysis.congruence import RADIUS, congruence
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules.agnostic_sam import AgnosticSAMRule
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule
from fewshot_asam.rules.validation_sets import lower_level_sets
from problems import RULES, episodes, made_learner, smooth_net

LR = 0.4


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def moved(model: nn.Module, by: Tensor) -> nn.Module:
    """A copy of the model with its parameters moved."""
    other = copy.deepcopy(model)
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() + by, other.parameters())
    return other


def cosine(model: nn.Module, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], radius: float) -> float:
    ascent = gradient(model, *val)
    return F.cosine_similarity(
        gradient(model, *train), gradient(moved(model, radius * ascent / ascent.norm()), *val), dim=0
    ).item()


@pytest.mark.parametrize("validation", ["duplicate", "augment", "split"])
@pytest.mark.parametrize("rule", ["maml", "sharp_maml_low", "agnostic_sam"])
def test_congruence_is_that_of_plain_gradients(rule: str, validation: str) -> None:
    model, batch = smooth_net(), episodes()
    learner = made_learner(model, LR, rule, validation=validation)
    found = congruence(learner, batch, generator())
    assert found.shape == (batch.num_tasks, 2)
    sets = "augment" if validation == "duplicate" else validation
    (x, y), val_sets = lower_level_sets(batch.support_x, batch.support_y, sets, generator())
    assert val_sets is not None
    for i in range(batch.num_tasks):
        train, val = (x[i], y[i]), (val_sets[0][i], val_sets[1][i])
        closure = None if validation == "duplicate" else (lambda net, val=val: F.cross_entropy(net(val[0]), val[1]))
        task = learner.clone().adapt(lambda net, own=train: F.cross_entropy(net(own[0]), own[1]), validation=closure)
        step = torch.cat([(task.params[name] - p).detach().flatten() for name, p in model.named_parameters()])
        radius = getattr(RULES[rule], "rho", RADIUS)
        expected = [cosine(point, train, val, radius) for point in (model, moved(model, step))]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_radius_is_that_on_the_validation_gradient() -> None:
    batch, model = episodes(), smooth_net()
    first, second, third = (
        congruence(MetaLearner(model, LR, rule), batch, generator())[:, 0]
        for rule in (AgnosticSAMRule(rho2=0.3), SharpMAMLRule(rho=0.3), AgnosticSAMRule(rho1=0.3))
    )
    assert torch.allclose(first, second, atol=1e-12)
    assert not torch.allclose(first, third, atol=1e-3)


def test_copies_that_are_the_same_agree_without_a_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewshot_asam.rules.validation_sets.augmented", lambda x, _: x)
    learner = MetaLearner(smooth_net(), LR, replace(RULES["agnostic_sam"], rho=0.0))
    assert congruence(learner, episodes(), generator()).tolist() == [pytest.approx([1, 1])] * 2


def test_nothing_is_left_on_the_model() -> None:
    model, batch = smooth_net(), episodes()
    before = copy.deepcopy(model.state_dict())
    congruence(MetaLearner(model, LR, RULES["agnostic_sam"]), batch, generator())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
