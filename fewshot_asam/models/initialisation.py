"""Initial weights of convolutions and linear layers."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from fewshot_asam.errors import require_one_of

Init = Literal["pytorch", "xavier", "truncated_normal"]
HeadInit = Literal["default", "zeros"]


def initialise(model: nn.Module, init: Init) -> None:
    """Draws the weights of all convolutions and linear layers anew, by PyTorch's global generator.

    **Arguments:**

    - `init`: `pytorch` (the layers' own `reset_parameters`), `xavier` (Glorot's uniform distribution) or
      `truncated_normal` (standard deviation 0.02, cut off at 0.04, as in haebeom-lee/maml). With the latter two, biases
      are 0.
    """
    require_one_of("init", init, get_args(Init))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            _draw(layer, init)


def initialise_head(head: nn.Module, head_init: HeadInit) -> None:
    """Sets the parameters of the head to 0 with `zeros` (Kao et al., 2022); with `default` they stay as drawn."""
    require_one_of("head_init", head_init, get_args(HeadInit))
    if head_init == "zeros":
        for value in head.parameters():
            nn.init.zeros_(value)


def _draw(layer: nn.Conv2d | nn.Linear, init: Init) -> None:
    if init == "pytorch":
        layer.reset_parameters()
        return
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
