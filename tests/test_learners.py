"""The public classes: clone and adapt in one's own loop, the batched loss, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import MAML, FewShotError, MetaAgnosticSAM, MetaLearner, SharpMAML
from fewshot_asam.engine import choose
from fewshot_asam.episodes import Episodes
from fewshot_asam.models import adapted_names, build_model
from problems import RULES, deviation, episodes, made_learner, meta_gradient, smooth_net


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_loop_of_ones_own_is_the_batched_loss(name: str, engine: Any) -> None:
    learner, batch = made_learner(smooth_net(), 0.1, name, engine=engine), episodes()
    losses = []
    for x, y, query_x, query_y in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        task = learner.clone()
        task.adapt(lambda net, x=x, y=y: F.cross_entropy(net(x), y), steps=3)
        losses.append(F.cross_entropy(task(query_x), query_y))
    loss = torch.stack(losses).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.parameters()))])
    assert deviation(loss, learner.meta_loss(batch, 3).loss) < 1e-12
    assert deviation(gradient, meta_gradient(learner, batch)) < 1e-10


def test_a_loop_of_ones_own_with_a_validation_closure_is_split() -> None:
    batch = episodes(tasks=1, shots=2)
    learner = MetaAgnosticSAM(smooth_net(), 0.1, rho=0.05, validation="split")
    x, y = batch.support_x[0].view(3, 2, *batch.support_x.shape[2:]), batch.support_y[0].view(3, 2)
    task = learner.clone().adapt(
        lambda net: F.cross_entropy(net(x[:, 1]), y[:, 1]),
        steps=3,
        validation=lambda net: F.cross_entropy(net(x[:, 0]), y[:, 0]),
    )
    loss = F.cross_entropy(task(batch.query_x[0]), batch.query_y[0])
    assert deviation(loss, learner.meta_loss(batch, 3).loss) < 1e-12


def test_maml_adapts_to_a_loss_tensor_as_learn2learn_does() -> None:
    learner, batch = MAML(smooth_net(), 0.1), episodes(tasks=1)
    task = learner.clone()
    for _ in range(3):
        task.adapt(F.cross_entropy(task(batch.support_x[0]), batch.support_y[0]))
    loss = F.cross_entropy(task(batch.query_x[0]), batch.query_y[0])
    assert deviation(loss, learner.meta_loss(batch, 3).loss) < 1e-12


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_meta_backward_is_the_backward_of_meta_loss(engine: Any) -> None:
    learner, batch = MetaAgnosticSAM(smooth_net(), 0.1, rho=0.05, engine=engine), episodes()
    output = learner.meta_backward(batch, 3)
    gradient = torch.cat([value.grad.flatten() for value in learner.parameters() if value.grad is not None])
    assert deviation(gradient, meta_gradient(learner, batch)) < 1e-12
    assert not output.loss.requires_grad
    for value, expected in zip(output, learner.meta_loss(batch, 3), strict=True):
        assert torch.allclose(value, expected)


def test_shapes_and_accuracy_of_the_output() -> None:
    batch = episodes(tasks=2, ways=3, queries=3)
    output = MAML(smooth_net(), 0.1).meta_loss(batch, 1)
    assert output.loss.shape == ()
    assert output.logits.shape == (2, 9, 3)
    right = [(output.logits[t].argmax(1) == batch.query_y[t]).double().mean() for t in range(2)]
    assert torch.equal(output.accuracy, torch.stack(right))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_testing_builds_no_graph_and_leaves_the_model_alone(engine: Any) -> None:
    learner = MetaAgnosticSAM(smooth_net(), 0.1, engine=engine)
    before = [value.clone() for value in learner.parameters()]
    with torch.no_grad():
        output = learner.meta_loss(episodes(), 3)
    assert not output.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
    assert all(value.grad is None for value in learner.parameters())


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        ("head", {"head.weight", "head.bias"}),
        ("body", {f"{n}.{p}" for n in ("first", "second", "first_norm", "second_norm") for p in ("weight", "bias")}),
        ("no_norm", {f"{name}.{p}" for name in ("first", "second", "head") for p in ("weight", "bias")}),
    ],
)
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_the_inner_loop_changes_what_it_should_and_all_is_meta_learned(adapt: Any, expected: set[str], engine: Any):
    model = smooth_net()
    assert set(adapted_names(model, adapt)) == expected
    learner = MetaAgnosticSAM(model, 0.1, rho=0.05, adapt=adapt, engine=engine)
    batch = episodes()
    assert deviation(meta_gradient(learner, batch), meta_gradient(MetaAgnosticSAM(model, 0.1, rho=0.05), batch)) > 1e-3
    learner.meta_backward(batch, 2)
    assert all(value.grad is not None and value.grad.abs().max() > 0 for name, value in model.named_parameters() if
               not name.endswith(("first.bias", "second.bias")))  # fmt: skip


def test_zero_steps_is_the_unadapted_model() -> None:
    learner, batch = MAML(smooth_net(), 0.1), episodes(tasks=1)
    assert torch.allclose(learner.meta_loss(batch, 0).logits[0], learner(batch.query_x[0]))


def test_a_batch_norm_without_running_statistics_runs_one_by_one() -> None:
    def network() -> nn.Module:
        norm = nn.BatchNorm2d(2, track_running_stats=False)
        return nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), norm, nn.Flatten(), nn.Linear(98, 3)).double()

    by_auto, batch = MAML(network(), 0.1), episodes()
    with pytest.warns(UserWarning, match=r"one by one: the second derivative of layer '1' \(BatchNorm2d\) by vmap is"):
        assert by_auto.execution_mode(by_auto.batch(batch)).batching == "loop"
    assert by_auto.execution_mode(by_auto.batch(batch)).batching == "loop"
    vectorised = MAML(network(), 0.1, engine="vmap")
    with pytest.raises(FewShotError, match=r"use engine='loop', or fewshot_asam.models.TaskNorm in its place"):
        vectorised.meta_loss(batch, 1)
    with torch.no_grad():  # its first derivative is right
        assert vectorised.meta_loss(batch, 1).loss > 0


@pytest.mark.parametrize(("device", "side", "name"), [("cpu", 28, "vmap"), ("cpu", 84, "loop"), ("cuda", 84, "vmap")])
def test_the_engine_is_chosen_by_device_and_image(device: str, side: int, name: str) -> None:
    assert choose("auto", smooth_net(), torch.device(device), side).name == name
    assert choose("loop", smooth_net(), torch.device(device), side).name == "loop"


class Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAML(smooth_net(), 0.0), "inner learning rate is 0.0"),
        (lambda: MAML(smooth_net(), float("nan")), "inner learning rate is nan"),
        (
            lambda: MetaLearner(smooth_net(), 0.1, "maml"),
            "the rule is 'maml'; expected one of fewshot_asam.rules",
        ),
        (lambda: MAML(Refusing(), 0.1), "Refusing has no trainable parameter"),
        (lambda: MAML(nn.BatchNorm2d(3), 0.1), "BatchNorm2d"),
        (lambda: MAML(smooth_net(), 0.1, adapt="some"), "adapt is 'some'"),
        (lambda: MAML(nn.Linear(2, 2), 0.1, adapt="body"), "leaves Linear no parameter"),
        (lambda: MAML(smooth_net(), 0.1, norm="batch"), "norm is 'batch'"),
        (lambda: MAML(smooth_net(), 0.1, validation="copy"), "validation is 'copy'"),
        (lambda: MAML(nn.Linear(2, 2), 0.1, norm="inductive"), "Linear.forward takes no `support`"),
        (lambda: SharpMAML(smooth_net(), 0.1, rho=-1.0), "rho is -1.0"),
        (lambda: MetaAgnosticSAM(smooth_net(), 0.1, rho2=-1.0), "rho2 is -1.0"),
        (lambda: MAML(smooth_net(), 0.1).meta_loss(episodes(), -1), "-1 inner steps"),
        (lambda: MAML(smooth_net(), 0.1, engine="fast").meta_loss(episodes(), 1), "engine is 'fast'"),
        (lambda: SharpMAML(smooth_net(), 0.1).clone().adapt(torch.zeros(())), "pass a closure"),
        (lambda: MAML(smooth_net(), 0.1).clone().adapt(torch.zeros(()), steps=2), "pass a closure"),
        (
            lambda: MetaAgnosticSAM(smooth_net(), 0.1, validation="split").clone().adapt(lambda net: torch.zeros(())),
            "no validation= closure",
        ),
        (lambda: MAML(smooth_net(), 0.1, norm="inductive").clone()(torch.zeros(1)), "pass support=images"),
    ],
)
def test_bad_input_gets_one_clear_line(make: Any, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        make()


def test_inductive_predictions_in_ones_own_loop() -> None:
    model = build_model("conv4", 3, (1, 16, 16), 4, seed=0).double()
    learner, batch = MAML(model, 0.1, norm="inductive"), episodes(tasks=1)
    x, y = batch.support_x[0], batch.support_y[0]
    task = learner.clone().adapt(lambda net: F.cross_entropy(net(x), y), steps=2)
    logits = task(batch.query_x[0], support=x)
    assert torch.allclose(logits, learner.meta_loss(batch, 2).logits[0])
    assert torch.allclose(logits[:1], task(batch.query_x[0][:1], support=x))


def test_a_switch_of_the_rule_cannot_be_set_to_no_effect() -> None:
    learner = MetaAgnosticSAM(torch.nn.Linear(2, 2), lr=0.1, rho=0.1)
    with pytest.raises(FewShotError, match="rho is of the learner's rule"):
        learner.rho = 0.5


def test_what_is_adapted_may_be_said_by_a_function() -> None:
    by_function = MAML(smooth_net(), 0.1, adapt=lambda name, value: value.ndim > 1 and "head" not in name)
    by_names = MAML(smooth_net(), 0.1, adapt=["first.weight", "second.weight"])
    assert by_function.adapted == by_names.adapted
    assert deviation(meta_gradient(by_function, episodes()), meta_gradient(by_names, episodes())) == 0
    with pytest.raises(FewShotError, match="adapt fits no trainable parameter of SmoothNet"):
        MAML(smooth_net(), 0.1, adapt=lambda name, value: False)


def test_weights_of_the_steps_for_images_that_are_numbers_of_words() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(20, (2, 5, 7)), torch.arange(5).expand(2, 5).contiguous()
    learner = MAML(nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(56, 5)), 0.1)
    first, second = (learner.meta_loss(Episodes(x, y, x, y), steps).loss for steps in (1, 2))
    both = learner.meta_loss(Episodes(x, y, x, y), 2, step_weights=[0.5, 0.5]).loss
    assert deviation(both, (first + second) / 2) < 1e-6


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_what_was_computed_for_all_tasks_gets_its_gradient(engine: Any) -> None:
    weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    batch, found = episodes(), []
    for backward in (False, True):
        pixels = batch.support_x.clone().requires_grad_()
        given = replace(batch, support_x=2 * pixels)
        learner = MAML(smooth_net(), 0.1, engine=engine)
        if backward:
            learner.meta_backward(given, 3, step_weights=weights.softmax(0))
        else:
            learner.meta_loss(given, 3, step_weights=weights.softmax(0)).loss.backward()
        found.append((weights.grad, pixels.grad, *(value.grad for value in learner.parameters())))
        weights.grad = None
    assert max(deviation(*pair) for pair in zip(*found, strict=True)) < 1e-12


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_recomputing_leaves_an_unused_layer_alone(engine: Any) -> None:
    model = smooth_net()
    model.unused = nn.Linear(2, 2).double()
    gradients = []
    for recompute in (False, True):
        learner = MAML(model, 0.1, engine=engine, recompute=recompute)
        gradients.append(meta_gradient(learner, episodes()))
    assert deviation(*gradients) < 1e-12


class Attending(nn.Module):
    """Says which support images it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, support: Tensor | None = None) -> Tensor:
        return self.head(x if support is None else x - support.mean(0))


def test_a_model_that_takes_support_images_gets_them() -> None:
    model, x = Attending(), torch.rand(3, 4)
    task = MAML(model, 0.1).clone()
    assert torch.equal(task(x, support=x), model(x, support=x))
    assert torch.equal(task(x), model(x))


def test_a_closure_that_forgets_the_network_it_was_given() -> None:
    model, batch = smooth_net(), episodes(tasks=1)
    task = MAML(model, 0.1).clone()
    with pytest.raises(FewShotError, match=r"the loss has no gradient; expected one .* the task's network"):
        task.adapt(lambda net: F.cross_entropy(model(batch.support_x[0]), batch.support_y[0]), steps=2)


def test_learn2learns_second_argument_is_not_taken_for_steps() -> None:
    task, batch = MAML(smooth_net(), 0.1).clone(), episodes(tasks=1)
    loss = F.cross_entropy(task(batch.support_x[0]), batch.support_y[0])
    for given in (loss, lambda net: F.cross_entropy(net(batch.support_x[0]), batch.support_y[0])):
        with pytest.raises(FewShotError, match=r"True was given for the inner steps; expected first_order=True"):
            task.adapt(given, True)
