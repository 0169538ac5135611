"""Batch norm, ReLU and 2x2 max-pooling as autograd functions whose work `norm_relu_pool_triton.py` does.

As on a CPU it is a pair, the function and its gradient, whose own gradient is written out as well. Both take the
channels of one task or of several side by side: under `vmap` those of all tasks go through one call.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fewshot_asam.errors import FewShotError
from fewshot_asam.models.cpu_kernels.reference import gradient_of_gradient, plain_tail
from fewshot_asam.models.gpu_kernels.tasks import over_tasks

TILE = 512
"""Windows times channels that a program has in registers at a time."""
CHANNELS = 32
"""Of a tile of channels-last images, which are read along the channels."""
LARGEST = 2**31
"""Numbers in a tensor, whose places the kernels count in 32 bits."""
PROGRAMS = 1024
"""About as many programs share a tensor: several for each of a large GPU's multiprocessors."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Of the compiler."""


def norm_relu_pool(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Batch norm on batch statistics, ReLU and 2x2 max-pooling.

    **Arguments:**

    - `y`: `[n, C, H, W]` with sides of at least 2; `gamma`, `beta`: the norm's weight and bias `[C]`.

    **Returns:** `[n, C, H // 2, W // 2]`, of the type and the memory format of `y`.
    """
    return _Tail.apply(y, gamma, beta, eps)[0]  # type: ignore[no-any-return]


class Plan(NamedTuple):
    """How a tensor is shared out: `programs` of `tiles` tiles each, for each of `channel_tiles` groups of channels."""

    channel_tiles: int
    programs: int
    tiles: int
    block_c: int
    block_w: int


def plan(y: Tensor) -> Plan:
    """Depends on shape and memory format alone, so that sums are added in the same order in every run."""
    n, channels, height, width = y.shape
    block_c = min(CHANNELS, _power_of_two(channels)) if _channels_last(y) else 1
    block_w = TILE // block_c
    all_tiles = -(-n * ((height + 1) // 2) * ((width + 1) // 2) // block_w)
    channel_tiles = -(-channels // block_c)
    tiles = -(-all_tiles // max(1, PROGRAMS // channel_tiles))
    return Plan(channel_tiles, -(-all_tiles // tiles), tiles, block_c, block_w)


def _power_of_two(number: int) -> int:
    """The smallest that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _channels_last(y: Tensor) -> bool:
    return y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def _dense(y: Tensor) -> Tensor:
    return y if _channels_last(y) else y.contiguous()


def _like(value: Tensor, y: Tensor) -> Tensor:
    """The same numbers in the memory format of `y`."""
    return value.contiguous(memory_format=torch.channels_last if _channels_last(y) else torch.contiguous_format)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Pass:
    """The kernels on tensors shaped like `y` and like what pooling leaves of it."""

    def __init__(self, y: Tensor, pooled: Tensor) -> None:
        from fewshot_asam.models.gpu_kernels import norm_relu_pool_triton as kernels

        if y.numel() >= LARGEST:
            raise FewShotError(
                f"the Triton block was given a tensor {list(y.shape)}; expected fewer than 2**31 numbers; use smaller "
                "meta-batches, or fewshot_asam.models.gpu_kernels.use(Kernels()), which runs the block in PyTorch"
            )
        self.kernels, self.plan, self.real = kernels, plan(y), _precise(y.dtype)
        n, self.channels, height, width = y.shape
        self.new = partial(torch.empty, dtype=self.real, device=y.device)
        self.sizes = (n, self.channels, self.plan.tiles)
        self.dense, self.pooled = y.stride(), pooled.stride()
        self.constants = {
            **{"H": height, "W": width, "PROGRAMS": self.plan.programs},
            **{"BLOCK_C": self.plan.block_c, "BLOCK_W": self.plan.block_w},
            "real": kernels.double if self.real == torch.float64 else kernels.single,
        }
        self.padded = _power_of_two(self.plan.programs)

    def partial(self, sums: int) -> Tensor:
        """Room for the partial sums of each program."""
        return self.new(sums, self.plan.programs, self.channels)

    def __call__(self, name: str, tensors: tuple[Tensor, ...], *strides: tuple[int, ...], **constants: Any) -> None:
        grid = (self.plan.channel_tiles, self.plan.programs)
        numbers = (*self.sizes, *(number for one in strides for number in one))
        getattr(self.kernels, name)[grid](*tensors, *numbers, **self.constants, **constants, **OPTIONS)


class _Tail(Function):
    """`(y, gamma, beta, eps) -> (out, best, place, statistics)`, of which the first alone is differentiated."""

    @staticmethod
    def forward(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Any:
        y = _dense(y)
        n, channels, height, width = y.shape
        best = _like(y.new_empty(n, channels, height // 2, width // 2), y)
        out, place = torch.empty_like(best), torch.empty_like(best, dtype=torch.uint8)
        run = _Pass(y, best)
        found, statistics = run.partial(3), run.new(2, channels)
        gamma, beta = gamma.contiguous(), beta.contiguous()
        run("choose", (y, gamma, best, place, found), run.dense, run.pooled)
        written = (gamma, beta, found, best, place, out, statistics)
        run("normalise", written, run.pooled, EPS=eps, PADDED=run.padded)
        return out, best, place, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        y, gamma, beta, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(y, gamma, beta, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *others: Any) -> Any:
        return *_TailBackward.apply(g, *ctx.saved_tensors, ctx.eps)[:3], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return over_tasks(_Tail, info, in_dims, *arguments)


class _TailBackward(Function):
    """`(g, y, gamma, beta, ...) -> (gy, ggamma, gbeta, sums)`, of which the first three are differentiated."""

    @staticmethod
    def forward(
        g: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, best: Tensor, place: Tensor, statistics: Tensor, eps: float
    ) -> Any:
        y = _dense(y)
        g, best, place = (_like(value, y) for value in (g, best, place))
        run = _Pass(y, g)
        gy, found, sums = torch.empty_like(y), run.partial(2), torch.empty_like(statistics)
        run("gather", (g, place, best, statistics, found), run.pooled)
        written = (g, place, y, gamma.contiguous(), statistics, found, gy, sums)
        run("spread", written, run.dense, run.pooled, PADDED=run.padded)
        gbeta, ggamma = sums.to(gamma.dtype).clone()
        return gy, ggamma, gbeta, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *given, ctx.eps = inputs
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(*given, output[3])

    @staticmethod
    def backward(ctx: Any, hy: Tensor, hgamma: Tensor, hbeta: Tensor, *others: Any) -> Any:
        g, y, gamma, beta, best, place, statistics, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            tail = partial(plain_tail, eps=ctx.eps, place=place)
            return *gradient_of_gradient(tail, (hy, hgamma, hbeta), g, y, gamma, beta), None, None, None, None
        y = _dense(y)
        hy, g, best, place = (_like(value, y) for value in (hy, g, best, place))
        run = _Pass(y, g)
        gg, ggamma, gy, found = torch.empty_like(g), torch.empty_like(gamma), torch.empty_like(y), run.partial(3)
        run("project", (hy, y, g, place, statistics, found), run.dense, run.pooled)
        given = (hy, hgamma.contiguous(), hbeta.contiguous(), y, g, place, best, gamma.contiguous(), statistics, sums)
        run("spread_again", (*given, found, gg, ggamma, gy), run.dense, run.pooled, PADDED=run.padded)
        return gg, gy, ggamma, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return over_tasks(_TailBackward, info, in_dims, *arguments)
