"""A whole iteration recorded as one CUDA graph: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewshot_asam.engine.inner_loop import Batch

Body = Callable[[Batch], Tensor]
WARM_UP = 3
"""Iterations that run as they are before one is recorded, for lazily made state and the choice of kernels."""


class Recorder(Protocol):
    """What records work on a device and replays it."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs `work` as recording needs it to have been run."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Records `work`, without running it, and returns what runs it on the same memory."""


class CudaGraphs:
    """Records with `torch.cuda.graph`."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs `work` on a stream of its own."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = work()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Records `work` in a graph with a memory pool of its own."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CudaGraphed:
    """`body`, replayed from a recording for batches shaped like the recorded one and run as it is for others.

    Each call is one real iteration, also those that warm up: nothing is computed for nothing and no state is reset.
    """

    def __init__(self, body: Body, recorder: Recorder) -> None:
        self.body, self.recorder = body, recorder
        self.calls = 0
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """One iteration; the result is a tensor of its own."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.recorder.warm_up(lambda: self.body(batch))
        leaves, structure = pytree.tree_flatten(batch)
        if self.replay is None:
            self.inputs = [leaf.clone() for leaf in leaves]
            recorded = pytree.tree_unflatten(self.inputs, structure)
            self.replay = self.recorder.record(lambda: self.body(recorded))
        if [leaf.shape for leaf in leaves] != [held.shape for held in self.inputs]:
            return self.body(batch)
        for held, leaf in zip(self.inputs, leaves, strict=True):
            held.copy_(leaf)
        return self.replay().clone()
