"""Loss surfaces and paths: the loss on a plane through the parameters, and between two points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewshot_asam.engine.gradients import Loss
from fewshot_asam.rules.perturbations import Params


def filter_normalised_direction(params: Params, generator: torch.Generator) -> Params:
    """A random direction whose every filter is as long as that of the parameters (Li et al., 2018, section 4).

    **Arguments:**

    - `params`: by name; a filter is what has one index along the first dimension, as of a convolution's or a linear
      layer's weight. Tensors of one dimension, biases and norm weights, get a direction of zeros, as in that paper.
    - `generator`: on the CPU.

    The rescaling takes away the network's invariance to the scale of a filter that a norm follows: a step of 1 is as
    long as the filter itself.
    """
    return {name: _like_filters(value, generator) for name, value in params.items()}


def loss_plane(
    loss: Loss, centre: Params, directions: tuple[Params, Params], first: Sequence[float], second: Sequence[float]
) -> Tensor:
    """The loss at `centre + a * directions[0] + b * directions[1]`: float64 `[len(first), len(second)]`, on the CPU.

    **Arguments:**

    - `first`, `second`: the values of `a` and `b`.
    """
    rows = [[_value(loss, _moved(centre, (directions[0], a), (directions[1], b))) for b in second] for a in first]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def loss_path(loss: Loss, start: Params, end: Params, positions: Sequence[float]) -> Tensor:
    """The loss at `start + t * (end - start)` for each `t` of `positions`: float64 `[len(positions)]`, on the CPU."""
    way = {name: end[name] - value for name, value in start.items()}
    return torch.tensor([_value(loss, _moved(start, (way, t))) for t in positions], dtype=torch.float64, device="cpu")


def _like_filters(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.ndim < 2:
        return torch.zeros_like(value)
    drawn: Tensor = torch.randn(value.shape, generator=generator).to(value)
    scale: Tensor = value.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
    return drawn * scale.view(-1, *[1] * (value.ndim - 1))


def _moved(params: Params, *steps: tuple[Params, float]) -> Params:
    moved = dict(params)
    for direction, size in steps:
        moved = {name: value + size * direction[name] for name, value in moved.items()}
    return moved


def _value(loss: Loss, params: Params) -> float:
    with torch.no_grad():
        return float(loss(params).item())
