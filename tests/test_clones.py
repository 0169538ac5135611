"""A task and the network that closures get stand for the model: layers, methods, values, with the task's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import MAML, FewShotError
from problems import deviation, episodes, seeded, smooth_net


class Backbone(nn.Module):
    """A body, a head, and a method that people call by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.temperature = 2.0

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
