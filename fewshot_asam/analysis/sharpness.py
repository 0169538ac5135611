"""How much the loss rises within a radius, and how large a radius is beside the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_asam.engine.gradients import Loss, autograd_gradient
from fewshot_asam.rules.perturbations import Params, add, l2_norm, sam


class RelativeRadius(NamedTuple):
    """`over_norm` is `rho / ||theta||`; `times_gradient` is `rho * ||g||`, by which the loss rises to first order."""

    over_norm: float
    times_gradient: float


def sam_sharpness(loss: Loss, params: Params, radii: Sequence[float], *, adaptive: bool = False) -> Tensor:
    """`L(theta + rho g/||g||) - L(theta)`, SAM's estimate of `max L - L(theta)` in the ball of each radius.

    One ascent step (Foret et al. 2021, equation 2), so it is a lower bound of that maximum. Where the gradient is all
    but zero it says little; the Hessian's eigenvalues then say more.

    **Arguments:**

    - `radii`: in the units of the parameters; with `adaptive` (ASAM, Kwon et al. 2021), in units of `|theta|`.

    **Returns:** float64 `[len(radii)]`, on the CPU.
    """
    with torch.no_grad():
        gradient = autograd_gradient(loss, params)
        here = loss(params).item()
        there = [loss(add(params, sam(params, gradient, rho, adaptive=adaptive))).item() for rho in radii]
    return torch.tensor(there, dtype=torch.float64, device="cpu") - here


def relative_radius(loss: Loss, params: Params, rho: float) -> RelativeRadius:
    """What a radius is beside the L2 norms of the parameters and of the gradient there."""
    with torch.no_grad():
        gradient = autograd_gradient(loss, params)
        return RelativeRadius(rho / l2_norm(params).item(), rho * l2_norm(gradient).item())
