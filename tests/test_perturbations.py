"""The equations against their own text, written out with plain vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewshot_asam.rules import perturbations
from fewshot_asam.rules.perturbations import Params

DRAWS = torch.Generator().manual_seed(0)


def tree() -> Params:
    return {name: torch.randn(shape, generator=DRAWS, dtype=torch.float64) for name, shape in (("w", (3, 2)), ("b", 4))}


def flat(values: Params) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


PARAMS, GRAD, VAL_GRAD = tree(), tree(), tree()


def test_one_norm_over_all_tensors() -> None:
    assert perturbations.l2_norm(GRAD).item() == pytest.approx(flat(GRAD).norm().item(), rel=1e-14)


def test_sam_is_a_step_of_length_rho_along_the_gradient() -> None:
    step = flat(perturbations.sam(PARAMS, GRAD, 0.3))
    assert step.norm().item() == pytest.approx(0.3)
    assert torch.cosine_similarity(step, flat(GRAD), 0).item() == pytest.approx(1.0)


def test_asam_is_the_best_step_in_its_ellipsoid() -> None:
    """Kwon et al.: it maximises `g . e` among the steps with `|| e / |theta| || <= rho`; random ones do no better."""
    step, theta, grad = flat(perturbations.sam(PARAMS, GRAD, 0.3, adaptive=True)), flat(PARAMS), flat(GRAD)
    assert (step / theta.abs()).norm().item() == pytest.approx(0.3)
    others = torch.randn(10_000, len(theta), generator=DRAWS, dtype=torch.float64)
    others = 0.3 * others / others.norm(dim=1, keepdim=True) * theta.abs()
    assert (others @ grad).max() < step @ grad


def test_agnostic_sam_is_equation_5() -> None:
    expected = 0.2 * flat(GRAD) / flat(GRAD).norm() - 0.1 * flat(VAL_GRAD) / flat(VAL_GRAD).norm()
    torch.testing.assert_close(flat(perturbations.agnostic_sam(PARAMS, GRAD, VAL_GRAD, rho1=0.2, rho2=0.1)), expected)


def test_the_validation_gradient_can_be_measured_by_another_norm() -> None:
    expected = 0.2 * flat(GRAD) / flat(GRAD).norm() - 0.1 * flat(VAL_GRAD) / flat(PARAMS).norm()
    step = perturbations.agnostic_sam(PARAMS, GRAD, VAL_GRAD, PARAMS, rho1=0.2, rho2=0.1)
    torch.testing.assert_close(flat(step), expected)


def test_momentum_is_an_exponential_average_from_zero() -> None:
    memory = None
    for _ in range(3):
        memory = perturbations.momentum(memory, GRAD, 0.9)
    torch.testing.assert_close(flat(memory), (1 - 0.9**3) * flat(GRAD))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_gradient_of_zero_gives_no_step_and_no_derivatives(adaptive: bool) -> None:
    zero = {name: torch.zeros_like(value, requires_grad=True) for name, value in GRAD.items()}
    step = flat(perturbations.sam(PARAMS, zero, 0.3, adaptive=adaptive))
    assert step.abs().max() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(step.sum(), list(zero.values())))


def test_friendly_sam_takes_the_average_away() -> None:
    expected = flat(GRAD) - 0.7 * flat(VAL_GRAD)
    torch.testing.assert_close(flat(perturbations.friendly(GRAD, VAL_GRAD, 0.7)), expected)


@pytest.mark.parametrize("adaptive", [False, True])
def test_radii_by_name_share_one_norm(adaptive: bool) -> None:
    whole = perturbations.sam(PARAMS, GRAD, 1.0, adaptive=adaptive)
    found = perturbations.sam(PARAMS, GRAD, {"w": 0.3, "b": 0.0}, adaptive=adaptive)
    torch.testing.assert_close(found["w"], 0.3 * whole["w"])
    assert not found["b"].any()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_one_call_for_all_tensors_gives_the_same_as_one_for_each(adaptive: bool, mixed: bool) -> None:
    """Without a graph there is one call, where all tensors are of one type."""
    trees = [{"w": one["w"], "b": one["b"].float() if mixed else one["b"]} for one in (PARAMS, GRAD, VAL_GRAD)]
    found = []
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            step = perturbations.agnostic_sam(*trees, rho1=0.2, rho2=0.1, adaptive=adaptive)
            average = perturbations.momentum(step, trees[1], 0.9)
            found.append({**step, **{f"average of {name}": value for name, value in average.items()}})
    torch.testing.assert_close(found[0], found[1], rtol=1e-6 if mixed else 1e-13, atol=0)
    assert found[1]["b"].dtype == trees[0]["b"].dtype


def test_no_single_call_is_made_under_vmap() -> None:
    """Which has no rule for it; nothing is recorded there either."""
    several = {name: torch.stack([value, 2 * value]) for name, value in GRAD.items()}
    with torch.no_grad():
        found = torch.vmap(lambda grad: perturbations.sam(PARAMS, grad, 0.3, adaptive=True))(several)
    for one in range(2):
        expected = perturbations.sam(PARAMS, {name: value[one] for name, value in several.items()}, 0.3, adaptive=True)
        torch.testing.assert_close({name: value[one] for name, value in found.items()}, expected)
