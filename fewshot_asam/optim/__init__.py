"""Sharpness-aware optimizers for any training loop, of the same equations as the rules of the inner loop."""

from __future__ import annotations

from fewshot_asam.optim.agnostic_sam import AgnosticSAM
from fewshot_asam.optim.friendly_sam import FriendlySAM
from fewshot_asam.optim.sam import SAM

__all__ = ["SAM", "AgnosticSAM", "FriendlySAM"]
