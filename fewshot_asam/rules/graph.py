"""Graph or no graph is PyTorch's grad mode: both gradient functions of the engine obey it."""

from __future__ import annotations

import torch


def graph(wanted: bool) -> torch.set_grad_enabled:
    """Within, a graph is recorded where it is `wanted` and was recorded outside."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())
