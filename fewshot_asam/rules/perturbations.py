"""The paper on one page: from gradients to the perturbation of the parameters.

- SAM (Foret et al. 2021): `rho * g / ||g||`
- ASAM (Kwon et al. 2021): `rho * |theta|^2 g / || |theta| g ||`
- Agnostic-SAM (Nguyen et al., equations 4 to 6), with `g` the training and `v` the validation gradient:

        theta_v = theta + rho2 * v / ||v||                                  v~ = grad L_v(theta_v)      (4)
        theta_t = theta + rho1 * g / ||g||  -  rho2 * v~ / ||v~||                                       (5)
        theta'  = theta - alpha * grad L_t(theta_t)                                                     (6)

`sam` is the ascent of (4) as well as SAM's own; `agnostic_sam` is (5). They are pure functions of dictionaries of
tensors by parameter name, differentiable twice, and they use one L2 norm over all the tensors that they are given.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]

SMALLEST_SQUARED_NORM = 1e-24
"""Keeps the norm and its derivatives finite at a gradient of zero."""


def l2_norm(tree: Params) -> Tensor:
    """The L2 norm over all tensors together, a scalar."""
    return (_squared_norm(tree) + SMALLEST_SQUARED_NORM).sqrt()


def add(tree: Params, other: Params) -> Params:
    """`tree + other`, tensor by tensor."""
    return {name: value + other[name] for name, value in tree.items()}


def sam(params: Params, grad: Params, rho: float, *, adaptive: bool = False, norm_of: Params | None = None) -> Params:
    """The perturbation of length `rho` along `grad`.

    **Arguments:**

    - `rho`: the radius, in the units of the parameters; with `adaptive` (ASAM), in units of `|theta|`.
    - `norm_of`: divide by the norm of these gradients instead of `grad`'s.
    """
    measured = grad if norm_of is None else norm_of
    if not adaptive:
        scale = _over_norm(rho, measured)
        return {name: scale * value for name, value in grad.items()}
    scale = _over_norm(rho, {name: params[name].abs() * value for name, value in measured.items()})
    return {name: scale * params[name].square() * value for name, value in grad.items()}


def agnostic_sam(
    params: Params,
    train_grad: Params,
    val_grad: Params,
    val_norm_of: Params | None = None,
    *,
    rho1: float,
    rho2: float,
    adaptive: bool = False,
) -> Params:
    """Equation (5): `rho1` along the training gradient and `rho2` against the validation gradient.

    **Arguments:**

    - `val_norm_of`: divide the validation gradient by the norm of these gradients instead of its own.
    """
    ascent = sam(params, train_grad, rho1, adaptive=adaptive)
    descent = sam(params, val_grad, -rho2, adaptive=adaptive, norm_of=val_norm_of)
    return add(ascent, descent)


def momentum(previous: Params, grad: Params, beta: float) -> Params:
    """`beta * previous + (1 - beta) * grad`; an empty previous one counts as zero."""
    if not previous:
        return {name: (1 - beta) * value for name, value in grad.items()}
    return {name: beta * previous[name] + (1 - beta) * value for name, value in grad.items()}


def descended(params: Params, grad: Params, lr: Mapping[str, float | Tensor]) -> Params:
    """`params - lr * grad`, tensor by tensor, each of the precision that it had."""
    return {name: value - (lr[name] * grad[name]).to(value.dtype) for name, value in params.items()}


def _squared_norm(tree: Params) -> Tensor:
    return torch.stack([value.square().sum() for value in tree.values()]).sum()


def _over_norm(rho: float, tree: Params) -> Tensor:
    """`rho / norm(tree)`, and a constant 0 where the norm is 0: there the direction has no derivative.

    A head of zeros has such gradients, as no other layer matters yet and ASAM scales the head's own by 0.
    """
    squared = _squared_norm(tree)
    return torch.where(squared > 0, rho / (squared + SMALLEST_SQUARED_NORM).sqrt(), 0.0)
