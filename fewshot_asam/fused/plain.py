"""The block as PyTorch would write it, for derivatives beyond the second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_tail(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """What `_Tail` computes, as PyTorch would write it."""
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0, keepdim=True)
    normal = (y - mean) * torch.rsqrt(var + eps)
    return F.max_pool2d(F.relu(normal * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)), 2)
