"""How a GPU can run the tasks of a batch, and which of these ways is fastest by the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from fewshot_asam.engine.selection import Batching
from fewshot_asam.models import ConvBlock, gpu_kernels
from fewshot_asam.models.gpu_kernels import Convolution, Kernels

ALIKE = 0.95
"""The least cosine of a candidate's meta-gradient to the usual way's; one that computes something else is left."""


class Candidate(NamedTuple):
    """Tasks one by one or together, and how blocks run meanwhile."""

    batching: Batching
    kernels: Kernels = Kernels()

    @property
    def text(self) -> str:
        """In words, which `parsed` understands: `vmap`, or `vmap unfold triton cudnn_benchmark`."""
        return f"{self.batching} {self.kernels.text}".removesuffix(" grouped")


class Trial(NamedTuple):
    """What an iteration takes, in seconds, and its meta-gradient `[parameters]`."""

    seconds: float
    gradient: Tensor


class Fastest(NamedTuple):
    """The best candidate and, in words, what was measured."""

    candidate: Candidate
    reason: str


def parsed(text: str) -> Candidate | None:
    """The candidate of that `text`; nothing where there is none."""
    batching, *words = text.split() or [""]
    convolution = words.pop(0) if words and words[0] in get_args(Convolution) else "grouped"
    kernels = Kernels(convolution, "triton" in words, "cudnn_benchmark" in words)  # type: ignore[arg-type]
    found = Candidate(batching, kernels)  # type: ignore[arg-type]
    return found if batching in get_args(Batching) and found.text == text else None


def candidates(model: nn.Module, device: torch.device) -> list[Candidate]:
    """The usual way first; kernels for blocks where the model has some, and Triton's where they run."""
    found = [Candidate("vmap"), Candidate("loop")]
    if not any(isinstance(layer, ConvBlock) for layer in model.modules()):
        return found
    fused = [True] if gpu_kernels.runs_on(device) else []
    ways: tuple[Convolution, ...] = ("grouped", "channels_last", "unfold", "fastest")
    found += [Candidate("vmap", Kernels(way, triton)) for triton in (False, *fused) for way in ways][1:]
    return [*found, *(Candidate("loop", Kernels(triton=triton)) for triton in fused)]


def fastest(given: Sequence[Candidate], run: Callable[[Candidate], Trial]) -> Fastest:
    """The candidate that `run` finds fastest, with and without `cudnn_benchmark`; the first one is the usual way.

    A candidate that fails, or whose meta-gradient is another than that of the usual way, is left and named.
    """
    usual = given[0]
    expected = run(usual)
    taken = {usual: expected.seconds}
    left: list[str] = []

    def attempt(one: Candidate) -> None:
        try:
            trial = run(one)
        except Exception as error:  # whatever a compiler or a library makes of it
            left.append(f"{one.text} failed ({type(error).__name__})")
            return
        if alike(trial.gradient, expected.gradient):
            taken[one] = trial.seconds
        else:
            left.append(f"{one.text} computes something else")

    for one in given[1:]:
        attempt(one)
    best = min(taken, key=taken.__getitem__)
    attempt(best._replace(kernels=replace(best.kernels, cudnn_benchmark=True)))
    best = min(taken, key=taken.__getitem__)
    ranked = sorted(taken.items(), key=lambda item: item[1])
    times = ", ".join(f"{one.text} {1000 * seconds:.3g} ms" for one, seconds in ranked)
    return Fastest(best, "; ".join([f"measured, a meta-batch: {times}", *left]))


def alike(gradient: Tensor, expected: Tensor) -> bool:
    """Whether two meta-gradients agree up to rounding, of bfloat16 too."""
    cosine = torch.cosine_similarity(gradient.double(), expected.double(), dim=0)
    sizes = gradient.double().norm() / expected.double().norm()
    return bool(cosine > ALIKE and ALIKE < sizes < 1 / ALIKE) or torch.equal(gradient, expected)
