"""A convolutional block for CPUs whose gradients, first and second, are written by hand."""

from fewshot_asam.models.cpu_kernels.block import (
    applies,
    available,
    conv_block,
    disabled,
    float32_after,
    multiplies_bfloat16,
)
from fewshot_asam.models.cpu_kernels.build import begun

__all__ = ["applies", "available", "begun", "conv_block", "disabled", "float32_after", "multiplies_bfloat16"]
