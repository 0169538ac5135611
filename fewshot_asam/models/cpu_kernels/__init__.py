"""A convolutional block for CPUs whose gradients, first and second, are written by hand."""

from fewshot_asam.models.cpu_kernels.block import (
    applies,
    available,
    conv_block,
    disabled,
    float32_after,
    multiplies_bfloat16,
)

__all__ = ["applies", "available", "conv_block", "disabled", "float32_after", "multiplies_bfloat16"]
