"""The paper on one page: from gradients to the perturbation of the parameters.

- SAM (Foret et al. 2021): `rho * g / ||g||`
- ASAM (Kwon et al. 2021): `rho * |theta|^2 g / || |theta| g ||`
- Friendly SAM (Li et al. 2024): SAM along what `g` has beyond an average of earlier gradients
- Agnostic-SAM (Nguyen et al., equations 4 to 6), with `g` the training and `v` the validation gradient:

        theta_v = theta + rho2 * v / ||v||                                  v~ = grad L_v(theta_v)      (4)
        theta_t = theta + rho1 * g / ||g||  -  rho2 * v~ / ||v~||                                       (5)
        theta'  = theta - alpha * grad L_t(theta_t)                                                     (6)

`sam` is the ascent of (4) as well as SAM's own; `agnostic_sam` is (5). They are pure functions of dictionaries of
tensors by parameter name, differentiable twice, and they use one L2 norm over all the tensors that they are given.
The rules of the inner loop (`rules/`) and the optimizers (`optim/`) both are made of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewshot_asam.rules.trees import Params, add, scaled, squared_norm, times

__all__ = ["Params", "add", "agnostic_sam", "descended", "friendly", "l2_norm", "momentum", "sam"]

Radius = float | Mapping[str, float]
"""One for all parameters, or one by name."""

SMALLEST_SQUARED_NORM = 1e-24
"""Keeps the norm and its derivatives finite at a gradient of zero."""


def l2_norm(tree: Params) -> Tensor:
    """The L2 norm over all tensors together, a scalar."""
    return (squared_norm(tree) + SMALLEST_SQUARED_NORM).sqrt()


def sam(params: Params, grad: Params, rho: Radius, *, adaptive: bool = False, norm_of: Params | None = None) -> Params:
    """The perturbation of length `rho` along `grad`.

    **Arguments:**

    - `rho`: the radius, in the units of the parameters; with `adaptive` (ASAM), in units of `|theta|`.
    - `norm_of`: divide by the norm of these gradients instead of `grad`'s.
    """
    measured = grad if norm_of is None else norm_of
    if not adaptive:
        return scaled(grad, _over_norm(rho, measured))
    scale = _over_norm(rho, times(measured, {name: params[name].abs() for name in measured}))
    return scaled(times(grad, {name: params[name].square() for name in grad}), scale)


def friendly(grad: Params, average: Params, sigma: float) -> Params:
    """`grad - sigma * average`: without the part of the gradient that most batches share (Li et al. 2024)."""
    return add(grad, scaled(average, -sigma))


def agnostic_sam(
    params: Params,
    train_grad: Params,
    val_grad: Params,
    val_norm_of: Params | None = None,
    *,
    rho1: Radius,
    rho2: Radius,
    adaptive: bool = False,
) -> Params:
    """Equation (5): `rho1` along the training gradient and `rho2` against the validation gradient.

    **Arguments:**

    - `val_norm_of`: divide the validation gradient by the norm of these gradients instead of its own.
    """
    ascent = sam(params, train_grad, rho1, adaptive=adaptive)
    descent = sam(params, val_grad, rho2, adaptive=adaptive, norm_of=val_norm_of)
    return add(ascent, scaled(descent, -1))


def momentum(previous: Params, grad: Params, beta: float) -> Params:
    """`beta * previous + (1 - beta) * grad`; an empty previous one counts as zero."""
    new = scaled(grad, 1 - beta)
    return add(scaled(previous, beta), new) if previous else new


def descended(params: Params, grad: Params, lr: Mapping[str, float | Tensor]) -> Params:
    """`params - lr * grad`, tensor by tensor, each of the precision that it had."""
    return {name: value - (lr[name] * grad[name]).to(value.dtype) for name, value in params.items()}


def _over_norm(rho: Radius, tree: Params) -> Tensor | Params:
    """`rho / norm(tree)`, and a constant 0 where the norm is 0: there the direction has no derivative.

    A head of zeros has such gradients, as no other layer matters yet and ASAM scales the head's own by 0.
    """
    squared = squared_norm(tree)
    norm = (squared + SMALLEST_SQUARED_NORM).sqrt()
    if isinstance(rho, Mapping):
        return {name: torch.where(squared > 0, radius / norm, 0.0) for name, radius in rho.items()}
    return torch.where(squared > 0, rho / norm, 0.0)
