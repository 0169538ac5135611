"""Small problems in float64 for the tests of the rules and engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import make_images
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import TaskNorm
from fewshot_asam.rules import Rule
from fewshot_asam.rules.agnostic_sam import AgnosticSAMRule
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule

RULES: dict[str, Rule] = {
    "maml": MAMLRule(),
    "sharp_maml_low": SharpMAMLRule(rho=0.05),
    "sharp_maml_low adaptive": SharpMAMLRule(rho=0.5, adaptive=True),
    "sharp_maml_low constant": SharpMAMLRule(rho=0.05, through_perturbation=False),
    "agnostic_sam": AgnosticSAMRule(rho=0.05),
    "agnostic_sam radii": AgnosticSAMRule(rho1=0.02, rho2=0.07),
    "agnostic_sam current point": AgnosticSAMRule(rho=0.05, val_grad_point="current"),
    "agnostic_sam current norm": AgnosticSAMRule(rho=0.05, val_norm="current"),
    "agnostic_sam momentum": AgnosticSAMRule(rho=0.05, beta=0.9),
    "agnostic_sam momentum, current norm": AgnosticSAMRule(rho=0.05, beta=0.9, val_norm="current"),
    "agnostic_sam adaptive": AgnosticSAMRule(rho=0.5, adaptive=True),
    "agnostic_sam constant": AgnosticSAMRule(rho=0.05, through_perturbation=False),
    "agnostic_sam first order": AgnosticSAMRule(rho=0.05),
    "maml first order": MAMLRule(),
}


def made_learner(model: nn.Module, lr: Any, name: str, **options: Any) -> MetaLearner:
    """A learner with a rule of `RULES`, of first order where its name says so."""
    return MetaLearner(model, lr, RULES[name], first_order="first order" in name, **options)


class SmoothNet(nn.Module):
    """Two convolutions with norm and softplus: no kinks, so finite differences are exact up to rounding."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2)
        self.first_norm, self.second_norm = TaskNorm(4), TaskNorm(4)
        self.head = nn.Linear(4, ways)

    def forward(self, x: Tensor, support: int | None = None) -> Tensor:
        x = F.softplus(self.first_norm(self.first(x), support))
        x = F.softplus(self.second_norm(self.second(x), support))
        return self.head(x.mean(dim=(2, 3)))


def seeded(make: type[nn.Module], *args: object) -> nn.Module:
    """A module in float64 whose weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args).double()


def smooth_net(ways: int = 3) -> nn.Module:
    return seeded(SmoothNet, ways)


SHAPE = (1, 16, 16)


def episodes(ways: int = 3, shots: int = 2, queries: int = 2, tasks: int = 2, seed: int = 0) -> Episodes:
    sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0), ways, shots, queries, seed=seed)
    drawn = sampler.sample(tasks)
    return Episodes(drawn.support_x.double(), drawn.support_y, drawn.query_x.double(), drawn.query_y)


def meta_gradient(learner: MetaLearner, batch: Episodes, steps: int = 3) -> Tensor:
    """The meta-gradient as one vector; a fresh generator of the same seed each time for augmented validation sets."""
    generator = torch.Generator().manual_seed(0)
    loss = learner.meta_loss(batch, steps, generator).loss
    grads = torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def deviation(value: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected entry."""
    return ((value - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def shifted(model: nn.Module, direction: Tensor, by: float) -> Iterator[None]:
    """The model with its parameters moved."""
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(start + by * direction, model.parameters())
    yield
    nn.utils.vector_to_parameters(start, model.parameters())
