"""What is tried before a run begins: which engine is faster, and an iteration that compiles."""

from __future__ import annotations

from fewshot_asam import engine
from fewshot_asam.engine.candidates import parsed
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.runtime import distributed
from fewshot_asam.training.gpu_rehearsal import fastest_on_gpu
from fewshot_asam.training.state import TrainState


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
    sampler, episodes = _share_of_a_batch(state)
    if (
        choice.name == "vmap"
        and learner.execution_mode(learner.batch(episodes, sampler.augmentation)).batching == "loop"
    ):
        return engine.Choice("loop", "the model cannot be vectorised")
    if not timed:
        return choice
    if state.device.type == "cuda":
        found = fastest_on_gpu(state, learner.batch(episodes, sampler.augmentation))
        return engine.Choice(found.candidate.batching, found.reason, found.candidate.kernels)

    def iterate(name: engine.Batching) -> None:
        learner.engine = name
        _iterate(state, sampler, episodes)

    try:
        return engine.measured(choice, iterate)
    finally:
        learner.engine = "auto"


def compile_engine(state: TrainState) -> None:
    """An iteration that is thrown away, so that compiling takes no training time."""
    _iterate(state, *_share_of_a_batch(state))


def _iterate(state: TrainState, sampler: EpisodeSampler, episodes: Episodes) -> None:
    state.learner.meta_backward(episodes, state.config.inner_steps, sampler.augmentation)
    state.learner.zero_grad()


def _share_of_a_batch(state: TrainState) -> tuple[EpisodeSampler, Episodes]:
    """A meta-batch to try things on, as large as this process's share, which leaves the run's own stream of tasks."""
    config = state.config
    sampler = EpisodeSampler(state.dataset.train, config.ways, config.shots, config.queries)
    return sampler, sampler.sample(config.meta_batch_size)[distributed.share(config.meta_batch_size)]
