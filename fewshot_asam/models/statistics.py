"""Predictions whose norm layers use the statistics of one set of images or another."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.models.adapted import takes_support

Statistics = Literal["each", "support", "together"]
"""Whose statistics the norm layers use for an image: its own and the support set's (each), the support set's alone
(support), or those of all images that are predicted (together)."""


def logits(model: nn.Module, images: Tensor, support: Tensor, statistics: Statistics) -> Tensor:
    """What an adapted model says of images `[n, C, H, W]`: `[n, N]`; with `together` alone it depends on the others.

    **Arguments:**

    - `support`: the images that the model was adapted to, `[S, C, H, W]`.

    Raises `FewShotError` for statistics of the support set where the model's `forward` takes none.
    """
    require_one_of("statistics", statistics, get_args(Statistics))
    if statistics == "together" or _independent(model, images[:1]):
        return model(images)  # type: ignore[no-any-return]
    if statistics == "each":
        return torch.cat([model(torch.cat([support, image]))[-1:] for image in torch.split(images, 1)])
    if not takes_support(model):
        raise FewShotError(
            f"{type(model).__name__}.forward takes no `support`, the number of images that give the statistics, which "
            "statistics 'support' need; use 'each'"
        )
    return model(torch.cat([support, images]), support=len(support))[len(support) :]  # type: ignore[no-any-return]


def _independent(model: nn.Module, image: Tensor) -> bool:
    """Whether the model says the same of an image `[1, C, H, W]` beside its negative, so that no norm mixes the two."""
    both = model(torch.cat([image, 1 - image]))
    return torch.allclose(both[:1], model(image), rtol=1e-4, atol=1e-4)
