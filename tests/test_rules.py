"""One lower-level step against the paper's equations on a quadratic, where every gradient is known by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_asam import FewShotError
from fewshot_asam.engine import gradients
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules import rule_class
from fewshot_asam.rules.agnostic_sam import AgnosticSAMRule
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule
from problems import RULES, deviation, episodes, made_learner, meta_gradient, smooth_net

A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
B = torch.diag(torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64))
THETA = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LR = 0.1
LossGradient = Callable[[gradients.Loss, Params], Params]


def quadratic(matrix: Tensor) -> gradients.Loss:
    return lambda params: 0.5 * params["w"] @ matrix @ params["w"]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def stepped(rule: Any, params: Params, state: Any, split: bool, gradient: LossGradient) -> tuple[Params, Any]:
    def train_grad(at: Params) -> Params:
        return gradient(quadratic(A), at)

    def val_grad(at: Params) -> Params:
        return gradient(quadratic(B), at)

    return rule.step(params, state, train_grad, val_grad if split else train_grad, {"w": LR})


def take(
    rule: Any, steps: int = 1, split: bool = True, gradient: LossGradient = gradients.functional_gradient
) -> Tensor:
    params: Params = {"w": THETA.clone().requires_grad_()}
    state = rule.init(params)
    for _ in range(steps):
        params, state = stepped(rule, params, state, split, gradient)
    return params["w"]


@pytest.mark.parametrize("gradient", [gradients.functional_gradient, gradients.autograd_gradient])
class TestEquations:
    def test_maml(self, gradient: LossGradient) -> None:
        torch.testing.assert_close(take(MAMLRule(), gradient=gradient), THETA - LR * A @ THETA)

    def test_sharp_maml_low(self, gradient: LossGradient) -> None:
        expected = THETA - LR * A @ (THETA + 0.3 * unit(A @ THETA))
        torch.testing.assert_close(take(SharpMAMLRule(rho=0.3), gradient=gradient), expected)

    @pytest.mark.parametrize("split", [False, True])
    def test_agnostic_sam(self, split: bool, gradient: LossGradient) -> None:
        matrix = B if split else A
        perturbed = THETA + 0.1 * unit(matrix @ THETA)  # (4)
        theta_t = THETA + 0.2 * unit(A @ THETA) - 0.1 * unit(matrix @ perturbed)  # (5)
        expected = THETA - LR * A @ theta_t  # (6)
        rule = AgnosticSAMRule(rho=0.1)
        torch.testing.assert_close(take(rule, split=split, gradient=gradient), expected)

    def test_current_point(self, gradient: LossGradient) -> None:
        theta_t = THETA + 0.2 * unit(A @ THETA) - 0.1 * unit(B @ THETA)
        rule = AgnosticSAMRule(rho=0.1, val_grad_point="current")
        torch.testing.assert_close(take(rule, gradient=gradient), THETA - LR * A @ theta_t)

    def test_current_norm(self, gradient: LossGradient) -> None:
        perturbed = THETA + 0.1 * unit(B @ THETA)
        theta_t = THETA + 0.2 * unit(A @ THETA) - 0.1 * B @ perturbed / (B @ THETA).norm()
        rule = AgnosticSAMRule(rho=0.1, val_norm="current")
        torch.testing.assert_close(take(rule, gradient=gradient), THETA - LR * A @ theta_t)

    def test_momentum_over_two_steps(self, gradient: LossGradient) -> None:
        theta, memory = THETA, torch.zeros(3, dtype=torch.float64)
        for _ in range(2):
            memory = 0.7 * memory + 0.3 * B @ (theta + 0.1 * unit(B @ theta))
            theta = theta - LR * A @ (theta + 0.2 * unit(A @ theta) - 0.1 * unit(memory))
        rule = AgnosticSAMRule(rho=0.1, beta=0.7)
        torch.testing.assert_close(take(rule, steps=2, gradient=gradient), theta)


@pytest.mark.parametrize(("name", "evaluations"), [("maml", 1), ("sharp_maml_low", 2), ("agnostic_sam", 4)])
def test_number_of_gradient_evaluations(name: str, evaluations: int) -> None:
    calls = []

    def counted(loss: gradients.Loss, params: Params) -> Params:
        calls.append(loss)
        return gradients.functional_gradient(loss, params)

    take(rule_class(name)(), gradient=counted)
    assert len(calls) == evaluations
    calls.clear()
    take(rule_class(name)(), split=False, gradient=counted)
    assert len(calls) == min(evaluations, 3)


def test_a_constant_perturbation_passes_no_gradient() -> None:
    """Then `theta' = theta - alpha * A (theta + e)` has the Jacobian `1 - alpha * A`, whatever `e` is."""
    rule = AgnosticSAMRule(rho=0.3, through_perturbation=False)

    def taken(w: Tensor) -> Tensor:
        return stepped(rule, {"w": w}, {}, True, gradients.functional_gradient)[0]["w"]

    jacobian = torch.func.jacrev(taken)(THETA)
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=torch.float64) - LR * A)


def test_first_order_passes_the_gradient_straight_through() -> None:
    """FOMAML: the meta-gradient is the query gradient at the adapted parameters."""
    learner, batch = made_learner(smooth_net(), 0.1, "agnostic_sam first order", engine="loop"), episodes(tasks=1)
    task = learner.clone().adapt(
        lambda net: torch.nn.functional.cross_entropy(net(batch.support_x[0]), batch.support_y[0]), steps=3
    )
    params = {name: value.detach().requires_grad_() for name, value in task.params.items()}
    task.params = params
    loss = torch.nn.functional.cross_entropy(task(batch.query_x[0]), batch.query_y[0])
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(params.values()))])
    assert deviation(meta_gradient(learner, batch), expected) < 1e-12
    second_order = MetaLearner(learner.model, 0.1, RULES["agnostic_sam"])
    assert deviation(meta_gradient(second_order, batch), expected) > 1e-3


@pytest.mark.parametrize("gradient", [gradients.functional_gradient, gradients.autograd_gradient])
def test_no_graph_is_built_under_no_grad(gradient: LossGradient) -> None:
    with torch.no_grad():
        assert not take(AgnosticSAMRule(), steps=2, gradient=gradient).requires_grad
    assert take(AgnosticSAMRule(), steps=2, gradient=gradient).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -1.0}, "rho is -1.0"),
        ({"rho1": float("nan")}, "rho1 is nan"),
        ({"rho2": float("inf")}, "rho2 is inf"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"val_norm": "other"}, "val_norm is 'other'; expected one of own, current"),
        ({"val_grad_point": "other"}, "val_grad_point is 'other'"),
    ],
)
def test_bad_switches(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        AgnosticSAMRule(**settings)
