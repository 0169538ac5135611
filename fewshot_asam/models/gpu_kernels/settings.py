"""Which of the GPU's ways to run a block are in use; one choice for the process, as `torch.backends.cudnn` has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fewshot_asam.models.gpu_kernels.convolution import Convolution


@dataclass(frozen=True)
class Kernels:
    """How blocks run on a GPU.

    **Arguments:**

    - `convolution`: how tasks' convolutions are run, each with its own weights; see `Convolution`.
    - `triton`: whether norm, ReLU and pooling are one Triton kernel each way.
    - `cudnn_benchmark`: whether cuDNN tries its algorithms at the first convolution of each shape.
    """

    convolution: Convolution = "grouped"
    triton: bool = False
    cudnn_benchmark: bool = False

    @property
    def text(self) -> str:
        """In a word or several."""
        words = [self.convolution, *["triton"] * self.triton, *["cudnn_benchmark"] * self.cudnn_benchmark]
        return " ".join(words)


_current = Kernels()


def current() -> Kernels:
    """What is in use now."""
    return _current


def use(kernels: Kernels) -> None:
    """From now on, in all threads: a backward pass on a GPU runs in a thread of its own."""
    global _current
    if kernels != _current:
        torch.backends.cudnn.benchmark = kernels.cudnn_benchmark
    _current = kernels


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Within, blocks run so; afterwards as before."""
    before, benchmark = _current, torch.backends.cudnn.benchmark
    use(kernels)
    try:
        yield
    finally:
        use(before)
        torch.backends.cudnn.benchmark = benchmark
