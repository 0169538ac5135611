"""What is tried on a GPU before a run begins: every way to run its iterations, timed as the run will have them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fewshot_asam.engine import Batch
from fewshot_asam.engine.candidates import Candidate, Fastest, Trial, candidates, fastest
from fewshot_asam.engine.cuda_graph import WARM_UP, CudaGraphed, CudaGraphs, Recorder
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import gpu_kernels
from fewshot_asam.training.meta_step import trained
from fewshot_asam.training.state import TrainState

REPEATS = 3
Clock = Callable[[], float]


def device_clock() -> float:
    """Seconds, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest_on_gpu(
    state: TrainState, batch: Batch, clock: Clock = device_clock, recorder: Recorder | None = None
) -> Fastest:
    """The fastest way to run the iterations of a training, recorded as they will be if it records them.

    **Arguments:**

    - `batch`: this process's share of a meta-batch.
    - `clock`, `recorder`: in place of the GPU's own, in tests.
    """
    recorder = recorder or (CudaGraphs() if state.config.cuda_graph else None)

    def run(candidate: Candidate) -> Trial:
        engine = state.learner.engine
        state.learner.engine = candidate.batching
        try:
            with gpu_kernels.using(candidate.kernels):
                return timed(state.learner, batch, state.config.inner_steps, clock, recorder)
        finally:
            state.learner.engine = engine
            state.learner.zero_grad()
            if state.device.type == "cuda":
                torch.cuda.empty_cache()

    return fastest(candidates(state.learner.model, state.device), run)


def timed(
    learner: MetaLearner, batch: Batch, steps: int, clock: Clock = device_clock, recorder: Recorder | None = None
) -> Trial:
    """The least time of a few meta-gradients, after those that choose and compile kernels; recorded if wanted."""
    parameters = trained(learner)

    def gradient(batch: Batch) -> Tensor:
        learner.zero_grad()
        learner.batch_backward(batch, steps)
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])

    iterate = CudaGraphed(gradient, recorder) if recorder else gradient
    for _ in range(WARM_UP + 1):
        found = iterate(batch).clone()
    times = []
    for _ in range(REPEATS):
        started = clock()
        iterate(batch)
        times.append(clock() - started)
    return Trial(min(times), found)
