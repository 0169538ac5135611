"""One lower-level step against the paper's equations on a quadratic, where every gradient is known by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewshot_asam import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules import inner_step
from fewshot_asam.rules.inner_step import Rule
from fewshot_asam.rules.perturbations import Params
from problems import RULES, deviation, episodes, meta_gradient, smooth_net

A = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
B = torch.diag(torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64))
THETA = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LR = 0.1


def quadratic(matrix: Tensor) -> inner_step.Loss:
    return lambda params: 0.5 * params["w"] @ matrix @ params["w"]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def take(
    rule: Rule, steps: int = 1, split: bool = True, gradient: inner_step.Gradient = inner_step.functional_gradient
) -> Tensor:
    params, memory = {"w": THETA.clone().requires_grad_()}, {}
    val_loss = quadratic(B) if split else None
    for _ in range(steps):
        params, memory = inner_step.step(rule, params, memory, quadratic(A), val_loss, LR, gradient)
    return params["w"]


@pytest.mark.parametrize("gradient", [inner_step.functional_gradient, inner_step.autograd_gradient])
class TestEquations:
    def test_maml(self, gradient: inner_step.Gradient) -> None:
        torch.testing.assert_close(take(Rule("maml"), gradient=gradient), THETA - LR * A @ THETA)

    def test_sharp_maml_low(self, gradient: inner_step.Gradient) -> None:
        expected = THETA - LR * A @ (THETA + 0.3 * unit(A @ THETA))
        torch.testing.assert_close(take(Rule("sharp_maml_low", rho=0.3), gradient=gradient), expected)

    @pytest.mark.parametrize("split", [False, True])
    def test_agnostic_sam(self, split: bool, gradient: inner_step.Gradient) -> None:
        matrix = B if split else A
        perturbed = THETA + 0.1 * unit(matrix @ THETA)  # (4)
        theta_t = THETA + 0.2 * unit(A @ THETA) - 0.1 * unit(matrix @ perturbed)  # (5)
        expected = THETA - LR * A @ theta_t  # (6)
        rule = Rule("agnostic_sam", rho=0.1)
        torch.testing.assert_close(take(rule, split=split, gradient=gradient), expected)

    def test_current_point(self, gradient: inner_step.Gradient) -> None:
        theta_t = THETA + 0.2 * unit(A @ THETA) - 0.1 * unit(B @ THETA)
        rule = Rule("agnostic_sam", rho=0.1, val_grad_point="current")
        torch.testing.assert_close(take(rule, gradient=gradient), THETA - LR * A @ theta_t)

    def test_current_norm(self, gradient: inner_step.Gradient) -> None:
        perturbed = THETA + 0.1 * unit(B @ THETA)
        theta_t = THETA + 0.2 * unit(A @ THETA) - 0.1 * B @ perturbed / (B @ THETA).norm()
        rule = Rule("agnostic_sam", rho=0.1, val_norm="current")
        torch.testing.assert_close(take(rule, gradient=gradient), THETA - LR * A @ theta_t)

    def test_momentum_over_two_steps(self, gradient: inner_step.Gradient) -> None:
        theta, memory = THETA, torch.zeros(3, dtype=torch.float64)
        for _ in range(2):
            memory = 0.7 * memory + 0.3 * B @ (theta + 0.1 * unit(B @ theta))
            theta = theta - LR * A @ (theta + 0.2 * unit(A @ theta) - 0.1 * unit(memory))
        rule = Rule("agnostic_sam", rho=0.1, beta=0.7)
        torch.testing.assert_close(take(rule, steps=2, gradient=gradient), theta)


@pytest.mark.parametrize(("name", "evaluations"), [("maml", 1), ("sharp_maml_low", 2), ("agnostic_sam", 4)])
def test_number_of_gradient_evaluations(name: str, evaluations: int) -> None:
    calls = []

    def counted(loss: inner_step.Loss, params: Params) -> Params:
        calls.append(loss)
        return inner_step.functional_gradient(loss, params)

    take(Rule(name), gradient=counted)
    assert len(calls) == evaluations
    calls.clear()
    take(Rule(name), split=False, gradient=counted)
    assert len(calls) == min(evaluations, 3)


def test_a_constant_perturbation_passes_no_gradient() -> None:
    """Then `theta' = theta - alpha * A (theta + e)` has the Jacobian `1 - alpha * A`, whatever `e` is."""
    rule = Rule("agnostic_sam", rho=0.3, through_perturbation=False)

    def taken(w: Tensor) -> Tensor:
        params, _ = inner_step.step(rule, {"w": w}, {}, quadratic(A), quadratic(B), LR, inner_step.functional_gradient)
        return params["w"]

    jacobian = torch.func.jacrev(taken)(THETA)
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=torch.float64) - LR * A)


def test_first_order_passes_the_gradient_straight_through() -> None:
    """FOMAML: the meta-gradient is the query gradient at the adapted parameters."""
    rule = replace(RULES["agnostic_sam"], first_order=True)
    learner, batch = MetaLearner(smooth_net(), 0.1, rule, engine="loop"), episodes(tasks=1)
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


@pytest.mark.parametrize("gradient", [inner_step.functional_gradient, inner_step.autograd_gradient])
def test_no_graph_is_built_under_no_grad(gradient: inner_step.Gradient) -> None:
    with torch.no_grad():
        assert not take(Rule("agnostic_sam"), steps=2, gradient=gradient).requires_grad
    assert take(Rule("agnostic_sam"), steps=2, gradient=gradient).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sam"}, "inner rule is 'sam'; expected one of maml, sharp_maml_low, agnostic_sam"),
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
        Rule(**{"name": "agnostic_sam", **settings})
