"""A task and the network that closures get stand for the model: layers, methods, values, with the task's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fewshot_asam import MAML, FewShotError
from problems import deviation, episodes, seeded, smooth_net


class Backbone(nn.Module):
    """A body, a head, and a method that people call by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.again = self.head
        self.temperature = 2.0
        self.finish = lambda features: self.head(features) / 2
        self.listed = [self.body, self.head]

    @property
    def scaled_head(self) -> Tensor:
        return self.head.weight / 2

    @property
    def last(self) -> nn.Module:
        return self.head

    def whole(self, x: Tensor) -> Tensor:
        return self(x)

    def layers(self) -> Iterator[nn.Module]:
        yield from self.children()

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        yield self.features(x)
        yield self(x)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) / self.temperature


def support_loss(batch: Any) -> Any:
    return lambda net: F.cross_entropy(net(batch.support_x[0]), batch.support_y[0])


PARTS: dict[str, Any] = {
    "method": lambda net, x: net.head(net.features(x)) / net.temperature,
    "layers": lambda net, x: net.head(net.body(x.flatten(1))) / 2,
    "one by one": lambda net, x: net.head(net.body[1](net.body[0](x.flatten(1)))) / 2,
    "property": lambda net, x: F.linear(net.features(x), net.scaled_head, net.head.bias / 2),
    "alias": lambda net, x: net.again(net.features(x)) / 2,
    "values of an alias": lambda net, x: F.linear(net.features(x), net.again.weight, net.again.bias) / 2,
    "property of a layer": lambda net, x: net.last(net.features(x)) / 2,
    "function": lambda net, x: net.finish(net.features(x)),
    "calls itself": lambda net, x: net.whole(x),
    "generator": lambda net, x: list(net.stages(x))[-1],
    "parameters": lambda net, x: F.linear(net.features(x), *list(net.parameters())[2:]) / 2,
    "state": lambda net, x: F.linear(net.features(x), *(net.head.state_dict(keep_vars=True).values())) / 2,
    "names": lambda net, x: F.linear(net.features(x), *dict(net.head.named_parameters()).values()) / 2,
    "values": lambda net, x: F.linear(net.features(x), net.head.weight, net.head.bias) / 2,
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_task_have_its_parameters(part: str) -> None:
    """The same adaptation and the same meta-gradient, whichever way the network is called."""
    learner, batch = MAML(seeded(Backbone), 0.5), episodes(tasks=1)

    def gradient(call: Any) -> Tensor:
        task = learner.clone()
        for _ in range(2):
            task.adapt(lambda net: F.cross_entropy(call(net, batch.support_x[0]), batch.support_y[0]))
        loss = F.cross_entropy(call(task, batch.query_x[0]), batch.query_y[0])
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(learner.parameters()))])

    assert deviation(gradient(PARTS[part]), gradient(lambda net, x: net(x))) < 1e-12
    before = learner.model.head.weight.clone()
    torch.testing.assert_close(learner.model.head.weight, before)


@pytest.mark.parametrize(
    "part",
    [
        lambda net: net.listed,
        lambda net: list(net.children()),
        lambda net: net.layers(),
        lambda net: net.eval(),
        lambda net: net.body.train(),
        lambda net: net.double(),
        lambda net: net.modules(),
        lambda net: net.body[0].requires_grad_(False),
        lambda net: net.get_submodule("head"),
    ],
)
def test_what_would_have_the_meta_parameters_is_refused(part: Any) -> None:
    learner = MAML(seeded(Backbone), 0.5)
    with pytest.raises(FewShotError, match=r"of a task gives modules|was called on a task"):
        part(learner.clone())
    assert learner.model.training
    assert all(value.requires_grad for value in learner.parameters())


class DetachedNorm(nn.Module):
    """Its backward pass takes the mean for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0).detach()


class Listed(nn.Module):
    """Takes its weight from a list, which adaptation does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.weights = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights[0]


class Partly(Backbone):
    """A layer that goes wrong, which `forward` does not use."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.normed = nn.Sequential(nn.Tanh(), layer)

    def encoded(self, x: Tensor) -> Tensor:
        return self.normed(self.features(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (DetachedNorm, r"gradient of layer 'normed\.1' \(DetachedNorm\) by PyTorch is wrong"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), r"derivative of layer 'normed\.1.* is wrong"),
        (Listed, "has a parameter 'weight' that forward takes from somewhere else"),
    ],
)
@pytest.mark.parametrize(
    "part",
    [
        lambda net, x: net.encoded(x),
        lambda net, x: net.normed(net.features(x)),
        lambda net, x: net.normed[1](net.features(x)),
    ],
    ids=["method", "layer", "inner layer"],
)
def test_a_part_that_is_differentiated_wrongly_is_refused(part: Any, make: Any, message: str) -> None:
    learner, batch = MAML(seeded(Partly, make()), 0.5), episodes(tasks=1)
    loss = lambda net: F.cross_entropy(net.head(part(net, batch.support_x[0])), batch.support_y[0])  # noqa: E731
    with pytest.raises(FewShotError, match=message):
        learner.clone().adapt(loss)
    learner.check = False
    learner.clone().adapt(loss)


def test_what_the_model_has_not() -> None:
    task = MAML(smooth_net(), 0.1).clone()
    with pytest.raises(AttributeError, match="colour"):
        task.colour  # noqa: B018
    assert not hasattr(task, "__len__")


def test_parameters_are_those_of_the_task() -> None:
    learner, batch = MAML(smooth_net(), 0.1, adapt="head"), episodes(tasks=1)
    task = learner.clone().adapt(support_loss(batch))
    own = dict(zip(dict(learner.model.named_parameters()), task.parameters(), strict=True))
    assert own["head.weight"] is task.params["head.weight"]
    assert own["first.weight"] is learner.model.first.weight


def test_first_order_of_one_clone() -> None:
    learner, fomaml, batch = MAML(smooth_net(), 0.1), MAML(smooth_net(), 0.1, first_order=True), episodes(tasks=1)

    def gradient(learner: MAML, **options: Any) -> Tensor:
        task = learner.clone(**options).adapt(support_loss(batch), 2)
        loss = F.cross_entropy(task(batch.query_x[0]), batch.query_y[0])
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(learner.parameters()))])

    assert deviation(gradient(learner, first_order=True), gradient(fomaml)) == 0
    assert deviation(gradient(learner), gradient(fomaml)) > 1e-3
    assert deviation(gradient(fomaml, first_order=False), gradient(learner)) == 0


def test_what_learn2learn_takes_besides() -> None:
    learner, batch = MAML(smooth_net(), 0.1), episodes(tasks=1)
    learner.clone(allow_unused=True).adapt(support_loss(batch), allow_unused=True)
    for refused in (lambda: learner.clone(allow_unused=False), lambda: learner.clone().adapt(None, allow_unused=False)):
        with pytest.raises(FewShotError, match=r"allow_unused is False, but .*; leave it out"):
            refused()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (1.0, "adapt was given 1.0; expected a closure"),
        (torch.tensor(1.0), "the loss has no gradient"),
        (torch.zeros(2, 3, requires_grad=True), r"the loss is a tensor \[2, 3\]; expected a tensor of one number"),
        (lambda net: None, "the loss is None; expected a tensor of one number"),
        (lambda net: torch.tensor(1.0), "the loss has no gradient"),
    ],
)
def test_what_is_no_loss(loss: Any, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        MAML(smooth_net(), 0.1).clone().adapt(loss)


def test_what_is_no_model() -> None:
    with pytest.raises(FewShotError, match=r"model is 3; expected an nn.Module"):
        MAML(3, 0.1)  # type: ignore[arg-type]
