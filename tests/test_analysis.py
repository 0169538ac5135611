"""Curvature, surfaces, sharpness and Theorem 2 against finite differences, dense matrices, formulas and curvlinops."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from fewshot_asam import Conv4, FewShotError
from fewshot_asam.analysis import (
    analyse,
    filter_normalised_direction,
    gradient_cosine,
    hessian,
    hessian_trace,
    loss_path,
    loss_plane,
    meta_loss,
    rank_correlation,
    relative_radius,
    sam_sharpness,
    supervised_loss,
    task_losses,
    top_eigenvalues,
    validation_decrease,
)
from fewshot_asam.engine.gradients import Loss
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.supervised.networks import build_network
from problems import deviation, episodes, made_learner, meta_gradient, seeded, shifted, smooth_net

LR, STEP = 0.4, 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=generator(seed), dtype=torch.float64)


def quadratic(size: int = 6) -> tuple[Loss, Params, Tensor, Tensor]:
    """`x'Ax / 2` of a symmetric `A`, in two tensors; the point and the matrix."""
    drawn = vector(size * size).view(size, size)
    matrix, point = drawn @ drawn.T / size, vector(size, 1)

    def loss(params: Params) -> Tensor:
        x = torch.cat([params["a"], params["b"]])
        return x @ matrix @ x / 2

    return loss, {"a": point[:2], "b": point[2:]}, point, matrix


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    model = seeded(nn.Sequential, nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return model, vector(40, 2).view(10, 4), torch.arange(10) % 3


def gradient_at(loss: Loss, params: Params, by: Tensor) -> Tensor:
    """The gradient at parameters moved by a vector, by one backward pass."""
    moves = by.split([value.numel() for value in params.values()])
    at = {
        name: (value + move.view_as(value)).detach().requires_grad_()
        for (name, value), move in zip(params.items(), moves, strict=True)
    }
    loss(at).backward()
    return torch.cat(
        [torch.zeros_like(value).flatten() if value.grad is None else value.grad.flatten() for value in at.values()]
    )


def differences(loss: Loss, params: Params, direction: Tensor) -> Tensor:
    """Of gradients so near to each other that no ReLU changes its side between them."""
    step = STEP / direction.norm()
    up, down = (gradient_at(loss, params, sign * step * direction) for sign in (1, -1))
    return (up - down) / (2 * step)


def dense(loss: Loss, params: Params) -> Tensor:
    """The whole Hessian, by PyTorch's own function."""
    sizes = [value.numel() for value in params.values()]

    def flat(x: Tensor) -> Tensor:
        parts = zip(params.items(), x.split(sizes), strict=True)
        return loss({name: part.view_as(value) for (name, value), part in parts})

    at = torch.cat([value.flatten() for value in params.values()])
    return torch.autograd.functional.hessian(flat, at)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_products_are_those_of_another_library() -> None:
    curvlinops: Any = importlib.import_module("curvlinops")
    model, x, y = classifier()
    loss, params = supervised_loss(model, x, y)
    v = vector(27)
    other = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    assert deviation(hessian(loss, params)(v), other @ v) < 1e-10


@pytest.mark.parametrize("fused", [True, False])
def test_products_of_a_task_are_finite_differences(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Conv4's blocks in C++, whose second derivatives are formulas of their own, and in plain PyTorch."""
    if not fused:
        monkeypatch.setattr("fewshot_asam.models.cpu_kernels.applies", lambda *_: False)
    model = seeded(Conv4, 3, (1, 16, 16), 4)
    learner = made_learner(model, 0.1, "agnostic_sam", adapt="no_norm")
    task = task_losses(learner, episodes(), 2, generator())[0]
    for loss in (task.support, task.query):
        for params in (task.before, task.after):
            v = vector(sum(value.numel() for value in params.values()))
            assert deviation(hessian(loss, params)(v), differences(loss, params, v)) < 1e-6


@pytest.mark.parametrize(
    "rule", ["maml", "sharp_maml_low", "agnostic_sam", "agnostic_sam constant", "maml first order"]
)
def test_products_of_the_meta_loss_are_differences_of_meta_gradients(rule: str) -> None:
    """Those of the function itself, also where training takes a cheaper gradient."""
    model, batch = smooth_net(), episodes()
    exact = rule.replace(" constant", "").replace(" first order", "")
    loss, params = meta_loss(made_learner(model, LR, rule), batch, 2)
    learner = made_learner(model, LR, exact)
    assert loss(params).item() == pytest.approx(learner.meta_loss(batch, 2).loss.item(), rel=1e-12)
    v = vector(sum(value.numel() for value in params.values()))
    found = []
    for sign in (1, -1):
        with shifted(model, v, sign * STEP):
            found.append(meta_gradient(learner, batch, 2))
    assert deviation(hessian(loss, params)(v), (found[0] - found[1]) / (2 * STEP)) < 1e-6


def test_the_meta_loss_of_conv4_has_third_derivatives() -> None:
    model = seeded(Conv4, 3, (1, 16, 16), 2)
    learner = made_learner(model, 0.1, "agnostic_sam", adapt="no_norm", zero_head=True)
    loss, params = meta_loss(learner, episodes(tasks=1), 2)
    assert params.keys() == {name for name, _ in model.named_parameters() if not name.startswith("head")}
    v = vector(sum(value.numel() for value in params.values()))
    assert deviation(hessian(loss, params)(v), differences(loss, params, v)) < 1e-6


def test_eigenvalues_and_trace_are_those_of_the_dense_matrix() -> None:
    loss, params = supervised_loss(*classifier())
    matrix = dense(loss, params)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    assert torch.allclose(top_eigenvalues(loss, params, 5), expected[:5], rtol=1e-3)
    estimates = hessian_trace(loss, params, 400)
    error = estimates.std().item() / 20
    assert estimates.mean().item() == pytest.approx(matrix.trace().item(), abs=4 * error)
    assert error < 0.1 * matrix.trace().item()


def test_eigenvalues_of_a_task_are_those_of_the_dense_matrix() -> None:
    task = task_losses(made_learner(smooth_net(), LR, "maml"), episodes(), 1, generator())[1]
    expected = torch.linalg.eigvalsh(dense(task.query, task.after)).flip(0)[:3]
    assert torch.allclose(top_eigenvalues(task.query, task.after, 3), expected, rtol=1e-3)


def test_a_flat_loss_and_one_with_a_diagonal() -> None:
    params = {"a": vector(3)}
    assert hessian(lambda p: p["a"].sum(), params)(vector(3)).tolist() == [0, 0, 0]
    estimates = hessian_trace(lambda p: (p["a"].square() * torch.tensor([1, 2, 3])).sum(), params, 3)
    assert estimates.tolist() == [12, 12, 12]


def test_what_cannot_be_computed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, params, _, _ = quadratic()
    for number in (0, 6):
        with pytest.raises(
            FewShotError, match=rf"{number} eigenvalues of 6 parameters were asked for; expected 1 to 5"
        ):
            top_eigenvalues(loss, params, number)
    with pytest.raises(FewShotError, match="samples is 0"):
        hessian_trace(loss, params, 0)
    with pytest.raises(FewShotError, match="the Hessian is not finite"):
        top_eigenvalues(lambda p: (loss(p) - loss(p)).sqrt(), params, 2)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("fewshot_asam.analysis.scipy_import.import_module", missing)
    with pytest.raises(FewShotError, match=r"scipy is missing; install it by: pip install 'fewshot_asam\[analysis\]'"):
        top_eigenvalues(loss, params, 2)


def test_a_direction_is_as_long_as_each_filter() -> None:
    params = {name: value.detach() for name, value in smooth_net().named_parameters()}
    direction = filter_normalised_direction(params, generator())
    assert torch.allclose(
        direction["first.weight"].square().sum((1, 2, 3)), params["first.weight"].square().sum((1, 2, 3))
    )
    assert torch.allclose(direction["head.weight"].norm(dim=1), params["head.weight"].norm(dim=1))
    assert not torch.allclose(direction["head.weight"], params["head.weight"])
    assert all(not bool(value.any()) for value in direction.values() if value.ndim == 1)


def test_a_surface_does_not_depend_on_the_scale_of_filters_before_a_norm() -> None:
    """What the normalisation is for (Li et al.): without it the second plane would be nearly flat."""
    batch, planes, side = episodes(), [], [-0.5, 0.0, 0.5]
    for scale in (1, 100):
        model = smooth_net()
        with torch.no_grad():
            model.get_parameter("second.weight").mul_(scale)
            model.get_parameter("second.bias").mul_(scale)
        loss, params = supervised_loss(model, batch.query_x[0], batch.query_y[0])
        drawn = generator()
        directions = filter_normalised_direction(params, drawn), filter_normalised_direction(params, drawn)
        planes.append(loss_plane(loss, params, directions, side, side))
    assert torch.allclose(*planes, rtol=1e-3)
    assert planes[0].max() > 1.05 * planes[0].min()


def test_planes_and_paths_are_the_loss_there() -> None:
    loss, params, point, matrix = quadratic()
    first, second = vector(6, 3), vector(6, 4)
    directions = tuple({"a": d[:2], "b": d[2:]} for d in (first, second))
    plane = loss_plane(loss, params, (directions[0], directions[1]), [0, 2], [-1, 0, 1])
    assert plane.shape == (2, 3)
    for i, a in enumerate([0, 2]):
        for j, b in enumerate([-1, 0, 1]):
            x = point + a * first + b * second
            assert plane[i, j].item() == pytest.approx((x @ matrix @ x / 2).item())
    end = {"a": first[:2], "b": first[2:]}
    middle = 0.75 * point + 0.25 * first
    expected = [loss(params).item(), (middle @ matrix @ middle / 2).item(), loss(end).item()]
    assert loss_path(loss, params, end, [0, 0.25, 1]).tolist() == pytest.approx(expected)


def test_sharpness_of_a_quadratic() -> None:
    loss, params, point, matrix = quadratic()
    gradient = matrix @ point
    unit, radii = gradient / gradient.norm(), [0.01, 0.1, 1.0]
    expected = [rho * gradient.norm() + rho**2 / 2 * unit @ matrix @ unit for rho in radii]
    assert sam_sharpness(loss, params, radii).tolist() == pytest.approx(torch.stack(expected).tolist())
    scaled = point.abs() * gradient
    move = 0.1 * point.abs() * scaled / scaled.norm()
    expected_adaptive = (gradient @ move + move @ matrix @ move / 2).item()
    assert sam_sharpness(loss, params, [0.1], adaptive=True).item() == pytest.approx(expected_adaptive)
    found = relative_radius(loss, params, 0.3)
    assert found == pytest.approx((0.3 / point.norm().item(), 0.3 * gradient.norm().item()))


def test_the_quantities_of_theorem_2_on_quadratics() -> None:
    """By the closed form: the Hessian of the training loss is `matrix`, that of the validation loss the identity."""
    train, params, x, matrix = quadratic()
    target, lr, rho1, rho2 = vector(6, 5), 0.05, 0.2, 0.1

    def val(p: Params) -> Tensor:
        return (torch.cat([p["a"], p["b"]]) - target).square().sum() / 2

    g, v = matrix @ x, x - target
    v_there = v + rho2 * v / v.norm()
    g_there = g + rho1 * matrix @ g / g.norm() - rho2 * matrix @ v_there / v_there.norm()
    after = x - lr * g_there
    found = validation_decrease(train, val, params, lr, rho1=rho1, rho2=rho2)
    assert found.product_at_theta == pytest.approx((g @ v_there).item())
    assert found.product_at_perturbed == pytest.approx((g_there @ v_there).item())
    assert found.predicted == pytest.approx(lr * (g_there @ v_there).item())
    assert found.measured == pytest.approx((v.square().sum() - (after - target).square().sum()).item() / 2)
    cosine = (g @ v_there / g.norm() / v_there.norm()).item()
    assert gradient_cosine(train, val, params, rho2) == pytest.approx(cosine)


def test_the_prediction_is_right_for_small_steps_and_radii() -> None:
    task = task_losses(made_learner(smooth_net(), LR, "agnostic_sam"), episodes(), 1, generator())[0]
    errors = []
    for size in (1e-1, 1e-2, 1e-3):
        found = validation_decrease(task.support, task.validation, task.before, size, rho1=2 * size, rho2=size)
        errors.append(abs(found.measured / found.predicted - 1))
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5


@pytest.mark.parametrize("norm", ["transductive", "inductive"])
@pytest.mark.parametrize("validation", ["duplicate", "split"])
def test_tasks_are_adapted_as_the_learner_adapts(norm: str, validation: str) -> None:
    batch = episodes()
    learner = made_learner(smooth_net(), LR, "agnostic_sam momentum", norm=norm, validation=validation)
    found = task_losses(learner, batch, 3, generator())
    with torch.no_grad():
        expected = learner.meta_loss(batch, 3)
    assert torch.allclose(torch.stack([task.logits for task in found]), expected.logits, atol=1e-10)
    mean = torch.stack([task.query(task.after) for task in found]).mean()
    assert mean.item() == pytest.approx(expected.loss.item())
    own = parameters_to_vector(learner.model.parameters())
    assert torch.equal(torch.cat([value.flatten() for value in found[0].before.values()]), own)
    support = batch.support_x[0], batch.support_y[0]
    if validation == "duplicate":
        assert found[0].support(found[0].before).item() == pytest.approx(
            F.cross_entropy(learner(support[0]), support[1]).item()
        )


def test_a_classifier_is_analysed_in_eval_mode_and_left_as_it_is() -> None:
    model = seeded(nn.Sequential, nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 3))
    _, x, y = classifier()
    for layer, name in ((1, "BatchNorm1d"), (3, "Dropout")):
        model.eval()
        model[layer].train()
        with pytest.raises(FewShotError, match=rf"layer '{layer}' \({name}\) is in train\(\) mode"):
            supervised_loss(model, x, y)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, params = supervised_loss(model, x, y)
    assert loss(params).item() == F.cross_entropy(model(x), y).item()
    hessian_trace(loss, params)
    top_eigenvalues(loss, params, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_losses_stay_when_the_model_is_trained_further() -> None:
    learner = made_learner(smooth_net(), LR, "maml", adapt="head")
    for steps in (0, 1):
        task = task_losses(learner, episodes(), steps, generator())[0]
        loss = task.query(task.after).item()
        with torch.no_grad():
            for value in learner.model.parameters():
                value.add_(0.1)
        assert task.query(task.after).item() == loss


@pytest.mark.parametrize(("name", "depth"), [("small", 4), ("resnet", 8)])
def test_networks_of_train_classifier_are_analysed_too(name: Any, depth: int) -> None:
    """In `eval()` mode, where their batch norm is an affine map."""
    model = build_network(name, depth, 1, (1, 16, 16), 3, seed=0).double().eval()
    batch = episodes()
    loss, params = supervised_loss(model, batch.query_x[0], batch.query_y[0])
    v = vector(sum(value.numel() for value in params.values()))
    assert deviation(hessian(loss, params)(v), differences(loss, params, v)) < 1e-6
    assert top_eigenvalues(loss, params, 1).item() > 0


def test_rank_correlation_is_spearman_s() -> None:
    first = vector(12)
    second = first.exp() + 0.3 * vector(12, 7)
    found = rank_correlation(first, second)
    value = stats.spearmanr(first, second).statistic
    assert found.value == pytest.approx(value)
    ends = [math.tanh(math.atanh(value) + sign * 1.959964 / 3) for sign in (-1, 1)]
    assert [found.low, found.high] == pytest.approx(ends)
    assert all(map(math.isnan, rank_correlation(first, torch.ones(12))))
    with pytest.raises(FewShotError, match="12 and 11 tasks are given"):
        rank_correlation(first, second[:11])


def test_an_analysis_holds_what_the_functions_give() -> None:
    batch = episodes(tasks=4)
    learner = made_learner(smooth_net(), LR, "sharp_maml_low")
    done: list[int] = []
    found = analyse(
        learner,
        batch,
        2,
        radii=[0.01, 0.1],
        eigenvalues=2,
        meta_tasks=2,
        side=[-1.0, 0.0],
        between=lambda: done.append(1),
    )
    task = task_losses(learner, batch, 2, generator())[2]
    assert len(done) == 4
    assert found.tasks["eigenvalues_query_after"][2].tolist() == top_eigenvalues(task.query, task.after, 2).tolist()
    assert found.tasks["sharpness_support"][2].tolist() == sam_sharpness(task.support, task.after, [0.01, 0.1]).tolist()
    assert found.tasks["path_query"].shape == (4, len(found.way))
    step = validation_decrease(task.support, task.validation, task.before, LR, rho1=0.02, rho2=0.01)
    measured = found.tasks["decrease_measured"][2, 0].item(), found.tasks["decrease_predicted"][2, 0].item()
    assert measured == pytest.approx((step.measured, step.predicted))
    norm = parameters_to_vector(learner.model.parameters()).norm().item()
    assert found.tasks["rho_over_norm"].tolist() == pytest.approx([0.05 / norm] * 4)
    assert found.planes["query"].shape == (2, 2)
    assert found.planes["query"][1, 1].item() == pytest.approx(found.tasks["loss_query_after"][0].item())
    assert "rho_over_norm" not in analyse(made_learner(smooth_net(), LR, "maml"), batch, 1, radii=[0.1]).tasks
    with pytest.raises(FewShotError, match="steps is 0"):
        analyse(learner, batch, 0)


def test_the_room_names_what_it_has() -> None:
    room = importlib.import_module("fewshot_asam.analysis")
    assert all(callable(getattr(room, name)) for name in room.__all__)
