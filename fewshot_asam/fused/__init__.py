"""A convolutional block for CPUs whose gradients, first and second, are written by hand."""

from fewshot_asam.fused.block import applies, available, conv_block, disabled

__all__ = ["applies", "available", "conv_block", "disabled"]
