"""Models, a learner and a dataset as people bring them; tests give some of them by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from conftest import make_images
from fewshot_asam import Dataset, MetaLearner
from fewshot_asam.engine import InnerLoop
from fewshot_asam.rates import LearnedRates
from fewshot_asam.rules import Rule
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule

SHAPE = (1, 16, 16)


def flat(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


def with_dropout(ways: int, shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(flat(shape), 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, ways))


def with_batch_norm(ways: int, shape: tuple[int, int, int]) -> nn.Module:
    """Which `vmap` would differentiate wrongly."""
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, ways))


class RegisteredTwice(nn.Module):
    """One layer under two names, a head that is not registered last and a buffer."""

    scale: Tensor

    def __init__(self, ways: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.head = nn.Linear(8, ways)
        self.embed = nn.Linear(flat(shape), 8)
        self.hidden = self.again = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x.flatten(1)))
        return self.head(self.again(torch.relu(self.hidden(x))) * self.scale)  # type: ignore[no-any-return]


class Wider(RegisteredTwice):
    """Another one of the same name."""

    def __init__(self, ways: int, shape: tuple[int, int, int]) -> None:
        super().__init__(ways, shape)
        self.more = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.more.weight.sum()


Wider.__qualname__ = "RegisteredTwice"


class Remembering(RegisteredTwice):
    """Keeps a state that is no tensor."""

    def get_extra_state(self) -> object:
        return {"seen": 3}

    def set_extra_state(self, state: object) -> None:
        pass


class LogRate(MetaLearner):
    """Learns the logarithm of its inner rate, beside a parameter that nothing depends on."""

    def __init__(self, model: nn.Module, rate: float, rule: Rule, **options: Any) -> None:
        super().__init__(model, rate, rule, **options)
        self.log_rate = nn.Parameter(torch.tensor(rate).log())
        self.unused = nn.Parameter(torch.ones(3))

    @property
    def inner_loop(self) -> InnerLoop:
        return replace(super().inner_loop, lr=self.log_rate.exp()) if hasattr(self, "log_rate") else super().inner_loop


def own_learner(rate: float = 0.2, model: type[nn.Module] = RegisteredTwice) -> LogRate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LogRate(model(3, SHAPE), rate, SharpMAMLRule(0.05), zero_head=["head.*"], engine="vmap")


def learned_rate(ways: int = 3) -> MetaLearner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return MetaLearner(RegisteredTwice(ways, SHAPE), nn.Parameter(torch.tensor(0.2)), MAMLRule(), engine="loop")


def learned_rates() -> MetaLearner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = RegisteredTwice(3, SHAPE)
    return MetaLearner(model, LearnedRates(model, "tensor", lr=0.2), MAMLRule(), engine="loop")


def first_order() -> MetaLearner:
    learner = own_learner()
    learner.first_order = True
    return learner


def own_dataset(name: str = "of mine", seed: int = 0) -> Dataset:
    return Dataset(name, *(make_images(6, 5, SHAPE, seed + split) for split in range(3)))
