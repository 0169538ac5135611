"""How exactly convolutions and matrix products are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from fewshot_asam.errors import require_one_of

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def precision(name: Precision, device: torch.device) -> Iterator[None]:
    """Within, float32 tensors are multiplied so.

    - `float32`: as they are; PyTorch by itself would take TF32 for convolutions on a GPU.
    - `tf32`: with 10 bits of mantissa on a GPU that has it; nothing changes on a CPU.
    - `bfloat16`: with 8 bits, by autocast; norms, the loss and all parameters stay float32. On a CPU that multiplies
      bfloat16, fused blocks stay fused, and their convolutions alone are less precise.
    """
    require_one_of("precision", name, get_args(Precision))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
