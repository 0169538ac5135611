"""Blocks and images in float64, and the fused block's derivatives compared with the plain one's."""

from __future__ import annotations

import torch
from torch import Tensor

from fewshot_asam.models import ConvBlock, cpu_kernels

FILTERS = [5, 16]
"""Of a first block with its convolution apart, and of one in one piece."""


def make_block(channels: int, filters: int) -> ConvBlock:
    torch.manual_seed(0)
    block = ConvBlock(channels, filters).double()
    with torch.no_grad():
        block.norm.weight.copy_(torch.linspace(-1, 2, filters))
        block.norm.bias.normal_()
    return block


def make_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def derivatives(block: ConvBlock, x: Tensor, last_graph: bool = False) -> list[Tensor]:
    """The output and both orders of gradients, each of a random projection of all that it follows."""
    generator = torch.Generator().manual_seed(2)
    values = [*([x] if x.requires_grad else []), *block.parameters()]
    found: list[Tensor] = [block(x)]
    latest = found
    for order in (1, 2):
        projection = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in latest)
        latest = list(
            torch.autograd.grad(
                projection, values, create_graph=order < 2 or last_graph, allow_unused=True, materialize_grads=True
            )
        )
        found += latest
    return found


def agree(block: ConvBlock, x: Tensor, last_graph: bool = False) -> None:
    assert cpu_kernels.applies(x, *block.parameters())
    ours = derivatives(block, x, last_graph)
    with cpu_kernels.disabled():
        theirs = derivatives(block, x, last_graph)
    for mine, expected in zip(ours, theirs, strict=True):
        scale = expected.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9 * (1e-3 + scale), equal_nan=True)
