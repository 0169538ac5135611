"""What a run says of itself, in words; nothing here prints or changes anything."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import torch

from fewshot_asam.engine import Choice
from fewshot_asam.models import MODELS, Adapted, cpu_kernels, fuses
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.allocator import peak_memory
from fewshot_asam.training.checkpoint import latest_state
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import Interval
from fewshot_asam.training.state import TrainState


def opening(state: TrainState, choice: Choice) -> Iterator[str]:
    """What is going to be trained, on what, and how."""
    config, learner, dataset = state.config, state.learner, state.dataset
    size = sum(p.numel() for p in learner.parameters())
    processes = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    yield (
        f"{config.title} in {state.folder}: {config.model} of {size:,} parameters on {state.device}{processes}, "
        f"{learner.norm} norm"
    )
    used = (state.train_tasks.images, dataset.val, state.test_images)
    classes = " / ".join(str(len(images.names)) for images in used)
    elsewhere = f", the last of {config.test_dataset}" if config.test_dataset else ""
    yield f"{config.dataset}: {classes} classes for training / validation / test{elsewhere}"
    if learner.adapt != "all":
        yield f"adapt {_wanted(learner.adapt)}: the inner loop changes {_layers(learner.adapted)}"
    if learner.zero_head and config.model not in MODELS:
        yield f"every task starts with zeros in {_layers(learner.inner_loop.zeroed)}"
    yield f"engine {state.progress.engine}{_options(state)}: {choice.reason}"
    if config.precision == "bfloat16" and state.device.type == "cpu" and fuses(learner.model):
        yield f"precision bfloat16: {_bfloat16()}"
    if state.progress.iteration >= config.iterations:
        yield f"all {config.iterations} iterations are done; raise --iterations to go on"
    elif state.finished:
        yield f"all {config.max_minutes:g} minutes are spent; raise --max-minutes to go on"


def _bfloat16() -> str:
    """What it means on this CPU."""
    if cpu_kernels.multiplies_bfloat16():
        return "convolutions alone, in fused blocks; all else is float32"
    return "this CPU has no instructions for it, so blocks run unfused and slower than in float32"


def _wanted(adapt: Adapted) -> str:
    if isinstance(adapt, str):
        return adapt
    return getattr(adapt, "__qualname__", "a function") if callable(adapt) else ", ".join(adapt)


def _layers(parameters: tuple[str, ...]) -> str:
    """The layers of some parameters, in their order; a parameter of the model itself by its own name."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in parameters))


def _options(state: TrainState) -> str:
    """How the engine runs beyond its name."""
    config, learner = state.config, state.learner
    graphed = config.cuda_graph and state.device.type == "cuda"
    wanted = {"compiled": learner.torch_compile, "recomputing": learner.recompute, "recorded": graphed}
    wanted[config.precision] = config.precision != "float32"
    return "".join(f", {name}" for name, chosen in wanted.items() if chosen)


def foreseen(state: TrainState, pace: float) -> str:
    """What the rest of the run will take, at a pace of so many seconds an iteration."""
    config = state.config
    left = pace * (config.iterations - state.progress.iteration)
    if config.max_minutes is not None:
        left = min(left, 60 * config.max_minutes - state.progress.seconds)
    return (
        f"{pace:.2g} s an iteration, so about {timedelta(seconds=round(left))} of training are to come, validation and "
        f"test besides; {peak_memory(state.device) / 1e9:.1f} GB of memory so far"
    )


def latest(state: TrainState, loss: float, accuracy: float, rate: float) -> str:
    """The last numbers, at so many iterations a second, beside the progress bar."""
    progress = state.progress
    best = f"{100 * progress.best_accuracy:.1f} %" if progress.best_iteration else "none yet"
    tasks = f"{rate * state.config.meta_batch_size:.0f} tasks/s"
    return f"loss {loss:.3f}, accuracy {100 * accuracy:.1f} %, best validation {best}, {tasks}"


def how_to_go_on(state: TrainState) -> str:
    """What to do after the run was stopped."""
    saved, given = latest_state(state.folder), state.config.from_python
    start = f"after iteration {int(saved.stem)} of {state.config.iterations}" if saved else "from the start"
    again = "".join(f", {part}=..." for part in given)
    how = f"train(config{again}, resume=True)" if given else f"train_maml --resume --output-dir {state.folder}"
    return f"{how} goes on {start}"


def result_text(config: TrainConfig, accuracy: Interval, tasks: int) -> str:
    """An accuracy with everything it must not be quoted without."""
    steps = f"{config.inner_steps} step{'s' if config.inner_steps > 1 else ''}"
    adaptation = f"{config.norm} norm, {config.rule_text}, {steps} of {config.inner_lr:g}"
    if "learner" in config.from_python:
        adaptation = f"{config.rule_text}, {steps}"
    return (
        f"{accuracy} ({tasks} tasks, {config.ways}-way {config.shots}-shot, {config.queries} queries a class, "
        f"{adaptation})"
    )


def conclusion(state: TrainState, best: Interval, last: Interval) -> str:
    """The test's result."""
    return (
        f"test accuracy {result_text(state.config, best, state.config.test_tasks)}; of the last weights {last}; see "
        f"{state.folder / 'curves.png'}"
    )


def device_name(device: torch.device) -> str:
    """The device as people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
