"""What is tried before a run begins: a task, which engine is faster, and an iteration that compiles."""

from __future__ import annotations

from fewshot_asam import engine
from fewshot_asam.engine import Batch
from fewshot_asam.engine.candidates import parsed
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.runtime import distributed
from fewshot_asam.training.gpu_rehearsal import fastest_on_gpu
from fewshot_asam.training.processes import Processes, choose
from fewshot_asam.training.state import TrainState


def choose_processes(state: TrainState) -> Processes:
    """How many processes are to share the tasks of what is left of the run."""
    config, learner = state.config, state.learner
    total = (config.iterations - state.progress.iteration) * config.meta_batch_size

    def task() -> None:
        _iterate(state, _batch(state, 2).part(slice(1)))  # of two, as a validation set may be of another task

    return choose(config.processes, state.device, config.meta_batch_size, total, learner.torch_compile, task)


def choose_engine(state: TrainState) -> engine.Choice:
    """The engine by rule, or by the clock where several can run; a resumed run keeps its own.

    A model that cannot be vectorised, which is tried here, runs task by task.
    """
    learner = state.learner
    choice = engine.choose(learner.engine, learner.model, state.device, state.dataset.train.shape[-1])
    if learner.engine != "auto":
        return choice
    timed = state.device.type in ("cpu", "cuda") and not learner.torch_compile
    if timed and (before := parsed(state.progress.engine)):
        return engine.Choice(before.batching, "as before", before.kernels)
    batch = _share_of_a_batch(state)
    if choice.name == "vmap" and learner.execution_mode(batch).batching == "loop":
        return engine.Choice("loop", "the model cannot be vectorised")
    if not timed:
        return choice
    if state.device.type == "cuda":
        found = fastest_on_gpu(state, batch)
        return engine.Choice(found.candidate.batching, found.reason, found.candidate.kernels)

    def iterate(name: engine.Batching) -> None:
        learner.engine = name
        _iterate(state, batch)

    try:
        return engine.measured(choice, iterate)
    finally:
        learner.engine = "auto"


def compile_engine(state: TrainState) -> None:
    """An iteration that is thrown away, so that compiling takes no training time."""
    _iterate(state, _share_of_a_batch(state))


def _iterate(state: TrainState, batch: Batch) -> None:
    state.learner.batch_backward(batch, state.config.inner_steps)
    state.learner.zero_grad()


def _share_of_a_batch(state: TrainState) -> Batch:
    """A meta-batch to try things on, as large as this process's share."""
    size = state.config.meta_batch_size
    return _batch(state, size).part(distributed.share(size))


def _batch(state: TrainState, num_tasks: int) -> Batch:
    """Tasks like those of the run, but not of its own stream of them."""
    config = state.config
    sampler = EpisodeSampler(state.dataset.train, config.ways, config.shots, config.queries)
    return state.learner.batch(sampler.sample(num_tasks), sampler.augmentation)
