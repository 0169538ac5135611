"""Losses of one's own, and the multi-step loss, against sums written out task by task."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import MAML, Episodes, FewShotError
from problems import RULES, deviation, episodes, made_learner, meta_gradient, seeded, smooth_net


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.2)


class Curve(nn.Module):
    """Regression of one number on one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def by_hand(learner: Any, batch: Episodes, steps: int, loss: Any, weights: list[float] | None = None) -> Tensor:
    """The meta-loss by `clone` and `adapt`, a step at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(batch.num_tasks):
        task = learner.clone()
        for step in range(steps):
            task.adapt(lambda net, i=i: loss(net(batch.support_x[i]), batch.support_y[i]))
            weight = weights[step] if weights else float(step == steps - 1)
            total = total + weight * loss(task(batch.query_x[i]), batch.query_y[i])
    return total / batch.num_tasks


def gradient_of(loss: Tensor, learner: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", RULES)
def test_a_loss_of_ones_own(name: str, engine: str) -> None:
    learner, batch = made_learner(smooth_net(), 0.1, name, engine=engine), episodes()
    out = learner.meta_loss(batch, 2, loss=smoothed)
    expected = by_hand(learner, batch, 2, smoothed)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert deviation(gradient_of(out.loss, learner), gradient_of(expected, learner)) < 1e-9
    assert learner.meta_loss(batch, 2).loss.item() != pytest.approx(expected.item(), rel=1e-3), "the usual one again"
    same = made_learner(learner.model, 0.1, name, engine=engine, loss=smoothed)
    assert same.meta_loss(batch, 2).loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["maml", "sharp_maml_low", "agnostic_sam"])
def test_sinusoids(name: str, engine: str) -> None:
    """Regression: float labels, a loss of one's own, no accuracy."""
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.rand(3, 8, 1, generator=generator, dtype=torch.float64) - 5
    phase = math.pi * torch.rand(3, 1, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(x + phase)
    batch = Episodes(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
    learner = made_learner(seeded(Curve), 0.05, name, engine=engine)
    out = learner.meta_loss(batch, 3, loss=F.mse_loss)
    expected = by_hand(learner, batch, 3, F.mse_loss)
    assert deviation(gradient_of(out.loss, learner), gradient_of(expected, learner)) < 1e-9
    assert out.logits.shape == (3, 3, 1)
    assert out.accuracy.isnan().all()


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", RULES)
def test_multi_step_loss(name: str, engine: str) -> None:
    learner, batch, weights = made_learner(smooth_net(), 0.1, name, engine=engine), episodes(), [0.5, 0.2, 0.3]
    out = learner.meta_loss(batch, 3, step_weights=weights)
    expected = by_hand(learner, batch, 3, F.cross_entropy, weights)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert deviation(gradient_of(out.loss, learner), gradient_of(expected, learner)) < 1e-9


def test_weight_on_the_last_step_alone_is_the_usual_loss() -> None:
    learner, batch = MAML(smooth_net(), 0.1, engine="vmap"), episodes()
    loss = learner.meta_loss(batch, 3, step_weights=[0, 0, 1]).loss
    assert deviation(gradient_of(loss, learner), meta_gradient(learner, batch)) < 1e-12


def test_backward_adds_the_same_gradient() -> None:
    learner, batch = MAML(smooth_net(), 0.1, engine="loop"), episodes()
    expected = gradient_of(learner.meta_loss(batch, 2, loss=smoothed, step_weights=[0.4, 0.6]).loss, learner)
    learner.meta_backward(batch, 2, loss=smoothed, step_weights=[0.4, 0.6])
    assert deviation(torch.cat([p.grad.flatten() for p in learner.parameters()]), expected) < 1e-12


def test_as_many_weights_as_steps() -> None:
    with pytest.raises(FewShotError, match="2 step_weights and 3 steps were given; expected one of each"):
        MAML(smooth_net(), 0.1).meta_loss(episodes(), 3, step_weights=[0.5, 0.5])


def test_a_loss_may_be_set_later() -> None:
    learner = MAML(smooth_net(), 0.1, loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    smooth = learner.meta_loss(episodes(), 2).loss.item()
    learner.loss = F.cross_entropy
    assert learner.meta_loss(episodes(), 2).loss.item() != pytest.approx(smooth, rel=1e-3)
    learner.loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    assert learner.meta_loss(episodes(), 2).loss.item() == smooth


class Interrupted(MAML):
    """Another thread asks for a loss of its own as soon as one is kept."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_other" and value is not None and value[1].loss is smoothed:
            self._with_loss(F.nll_loss)


def test_threads_with_losses_of_their_own() -> None:
    learner = Interrupted(smooth_net(), 0.1)
    assert learner._with_loss(smoothed).loss is smoothed
    assert learner._with_loss(F.nll_loss).loss is F.nll_loss


def test_a_loss_that_does_not_fit() -> None:
    """Cross-entropy takes floats for probabilities of classes: of one class it is 0, whatever is predicted."""
    batch = Episodes(*(torch.rand(2, 4, 1) for _ in range(4)))
    learner = MAML(nn.Linear(1, 1), 0.1)
    with pytest.raises(FewShotError, match="the labels are floats and the loss is cross_entropy; pass a loss="):
        learner.meta_loss(batch, 1)
    with pytest.raises(FewShotError, match="loss is 'mse'; expected a function"):
        learner.meta_loss(batch, 1, loss="mse")  # type: ignore[arg-type]
    assert learner.meta_loss(batch, 1, loss=F.mse_loss).loss > 0
