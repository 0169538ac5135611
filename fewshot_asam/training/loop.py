"""The meta-training loop: iterations, validation on fixed tasks, checkpoints, the final test."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from signal import Signals
from typing import Any

import torch
from tqdm import tqdm

from fewshot_asam import engine
from fewshot_asam.analysis.congruence import congruence
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.allocator import peak_memory
from fewshot_asam.runtime.distributed import PeerLost
from fewshot_asam.runtime.signals import Stop, Stopped
from fewshot_asam.training import run_folder
from fewshot_asam.training.build import load_data, resolve_device
from fewshot_asam.training.checkpoint import latest_state
from fewshot_asam.training.config import TrainConfig, located, plain
from fewshot_asam.training.evaluation import Interval, evaluate, interval
from fewshot_asam.training.identity import data, require_same_everywhere, shared
from fewshot_asam.training.metrics import MetricsLog
from fewshot_asam.training.state import TrainState, build, evaluation_sampler
from fewshot_asam.version import __version__

FORESEEN = 10
"""Iterations after which it is said what the rest will take."""
ROWS = 500
"""About as many lines of training metrics are kept of a run."""


@torch.inference_mode(False)
@torch.enable_grad()
def train(config: TrainConfig, resume: bool = False, stop: Stop | None = None) -> dict[str, Any]:
    """Trains, tests and writes the run folder; prints one line with the test accuracy.

    `resume` goes on with the run in `output_dir`. Settings that would alter it, other data and a folder without a run
    are refused before anything is written.

    SIGINT and SIGTERM end the iteration, save the state and raise `Stopped`, a `KeyboardInterrupt`; so does a request
    that reached `stop`, the caller's own, which is then in charge of the signals.

    **Returns:** what `summary.json` holds. Raises `FewShotError` for settings that cannot be run, for a loss that is
    not finite and where the run folder cannot be written; the last checkpoint stays.
    """
    config = located(config)
    require_same_everywhere({"resume": resume, **shared(config)})
    if resume:
        distributed.all_succeed(lambda: run_folder.require_resumable(config) if distributed.is_first() else None)
    device = distributed.all_succeed(lambda: resolve_device(config.device))
    dataset = distributed.one_a_machine_first(lambda: load_data(config, device))
    with precision(config.precision, device):
        training = distributed.all_succeed(lambda: build(config, dataset, device))
        require_same_everywhere(data(training.identity))
        with run_folder.opened(config, resume) as training.folder:
            if resume:
                training.restore()
            distributed.all_succeed(lambda: run_folder.begin(training.folder, config))
            training.rewrite()
            _announce(training)
            if config.torch_compile and not _finished(training):
                _compile(training)
            summary = _trained_and_tested(training, stop)
    best, last = (Interval(summary[f"{kind}test_accuracy"], summary[f"{kind}test_ci95"]) for kind in ("", "last_"))
    distributed.print_rank0(
        f"test accuracy {result_text(config, best, config.test_tasks)}; of the last weights {last}; see "
        f"{training.folder / 'curves.png'}"
    )
    return summary


def result_text(config: TrainConfig, accuracy: Interval, tasks: int) -> str:
    """An accuracy with everything it must not be quoted without."""
    steps = f"{config.inner_steps} step{'s' if config.inner_steps > 1 else ''} of {config.inner_lr:g}"
    return (
        f"{accuracy} ({tasks} tasks, {config.ways}-way {config.shots}-shot, {config.queries} queries a class, "
        f"{config.norm} norm, {config.rule_text}, {steps})"
    )


def _announce(training: TrainState) -> None:
    config, dataset = training.config, training.dataset
    classes = " / ".join(str(len(images.names)) for images in (dataset.train, dataset.val, dataset.test))
    size = sum(p.numel() for p in training.learner.parameters())
    processes = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    distributed.print_rank0(
        f"{config.title} in {training.folder}: {config.model} of {size:,} parameters on {training.device}{processes}, "
        f"{config.norm} norm"
    )
    distributed.print_rank0(f"{config.dataset}: {classes} classes for training / validation / test")
    if config.adapt != "all":
        layers = dict.fromkeys(name.rpartition(".")[0] for name in training.learner.adapted)
        distributed.print_rank0(f"adapt {config.adapt}: the inner loop changes {', '.join(layers)}")
    choice = distributed.broadcast(_engine(training))
    training.learner.engine = training.progress.engine = choice.name
    distributed.print_rank0(f"engine {choice.name}{_options(training)}: {choice.reason}")
    if training.progress.iteration >= config.iterations:
        distributed.print_rank0(f"all {config.iterations} iterations are done; raise --iterations to go on")
    elif _out_of_time(training):
        distributed.print_rank0(f"all {config.max_minutes:g} minutes are spent; raise --max-minutes to go on")


def _engine(training: TrainState) -> engine.Choice:
    """The engine by rule, or by the clock on a CPU where both can run; a resumed run keeps its own."""
    config, learner = training.config, training.learner
    choice = engine.choose(config.engine, learner.model, training.device, training.dataset.train.shape[-1])
    if config.engine != "auto" or training.device.type != "cpu" or config.torch_compile:
        return choice
    if training.progress.engine:
        return engine.Choice("vmap" if training.progress.engine == "vmap" else "loop", "as before")
    sampler, episodes = _trial(training)

    def iterate(name: engine.Batching) -> None:
        learner.engine = name
        learner.meta_backward(episodes, config.inner_steps, sampler.augmentation)
        learner.zero_grad()

    return engine.measured(choice, iterate)


def _trial(training: TrainState) -> tuple[EpisodeSampler, Episodes]:
    """A meta-batch to try things on, as large as this process's share, which leaves the run's own stream of tasks."""
    config = training.config
    sampler = EpisodeSampler(training.dataset.train, config.ways, config.shots, config.queries)
    return sampler, sampler.sample(config.meta_batch_size)[distributed.share(config.meta_batch_size)]


def _options(training: TrainState) -> str:
    """How the engine runs beyond its name."""
    config = training.config
    captured = config.cuda_graph and training.device.type == "cuda"
    wanted = {"compiled": config.torch_compile, "recomputing": config.recompute, "recorded": captured}
    wanted[config.precision] = config.precision != "float32"
    return "".join(f", {name}" for name, chosen in wanted.items() if chosen)


def _compile(training: TrainState) -> None:
    """Compiles by an iteration that is thrown away, so that it takes no training time."""
    started = time.monotonic()
    distributed.print_rank0("compiling, a minute or two the first time ...", end="")
    sampler, episodes = _trial(training)
    training.learner.meta_backward(episodes, training.config.inner_steps, sampler.augmentation)
    training.learner.zero_grad()
    distributed.print_rank0(f" done in {time.monotonic() - started:.0f} s")


def _trained_and_tested(training: TrainState, given: Stop | None) -> dict[str, Any]:
    try:
        with nullcontext(given) if given else Stop() as stop:
            _fit(training, stop)
            return _test(training, stop)
    except Stopped as stopped:
        reason = f"stopped by {Signals(stopped.number).name}"
        raise Stopped(stopped.number, f"{reason}; {_how_to_go_on(training)}") from stopped
    except PeerLost as error:
        raise PeerLost(f"{error}; {_how_to_go_on(training)}") from error


def _how_to_go_on(training: TrainState) -> str:
    state = latest_state(training.folder)
    start = f"after iteration {int(state.stem)} of {training.config.iterations}" if state else "from the start"
    return f"train_maml --resume --output-dir {training.folder} goes on {start}"


def _fit(training: TrainState, stop: Stop) -> None:
    done, total = training.progress.iteration, training.config.iterations
    first = distributed.is_first()
    pause = 0.5 if sys.stderr.isatty() else 60  # a log file keeps every update
    bar = tqdm(
        total=total, initial=done, unit="it", desc="training", dynamic_ncols=True, mininterval=pause, disable=not first
    )
    with bar, MetricsLog(training.folder, training.progress.rows) if first else nullcontext() as log:
        try:
            if log is not None:
                training.progress.rows = log.rows
            _loop(training, stop, bar, log)
        except (Stopped, PeerLost) as error:
            if isinstance(error, Stopped) or training.device.type == "cpu":  # a GPU would wait for the lost process
                _save(training, log)
            raise


def _loop(training: TrainState, stop: Stop, bar: Any, log: MetricsLog | None) -> None:
    progress, config = training.progress, training.config
    every = max(1, config.iterations // ROWS)
    began, first = time.monotonic(), progress.iteration
    started = began - progress.seconds
    saved = (progress.iteration, progress.validated)
    while True:
        last = _finished(training)
        validation_due = last or progress.iteration % config.validate_every == 0
        if validation_due or progress.iteration % every == 0:
            _report(training, bar, log)
        if validation_due and progress.validated < progress.iteration:
            _validate(training, stop, log)
        reached = (progress.iteration, progress.validated)
        if (last or progress.iteration % config.checkpoint_every == 0) and saved != reached:
            _save(training, log)
            saved = reached
        if last:
            return
        stop.check()
        training.train_step()
        progress.seconds = time.monotonic() - started
        bar.update()
        if progress.iteration == first + FORESEEN:
            training.read()  # which waits for the device
            bar.write(_foreseen(training, (time.monotonic() - began) / FORESEEN))


def _foreseen(training: TrainState, pace: float) -> str:
    """What the rest of the run will take, at a pace of so many seconds an iteration."""
    config = training.config
    left = pace * (config.iterations - training.progress.iteration)
    if config.max_minutes is not None:
        left = min(left, 60 * config.max_minutes - training.progress.seconds)
    return (
        f"{pace:.2g} s an iteration, so about {timedelta(seconds=round(left))} of training are to come, validation and "
        f"test besides; {peak_memory(training.device) / 1e9:.1f} GB of memory so far"
    )


def _save(training: TrainState, log: MetricsLog | None) -> None:
    if log is not None:
        log.sync()
    training.save()


def _finished(training: TrainState) -> bool:
    return training.progress.iteration >= training.config.iterations or _out_of_time(training)


def _out_of_time(training: TrainState) -> bool:
    """Whether the minutes are over, on the clock of any process; the learning rate follows the same clock."""
    if training.config.max_minutes is None:
        return False
    training.spent = distributed.all_reduce_max(training.progress.seconds) / (60 * training.config.max_minutes)
    return training.spent >= 1


def _report(training: TrainState, bar: Any, log: MetricsLog | None) -> None:
    progress, numbers = training.progress, training.read()
    if len(numbers) == 0:
        return
    loss, accuracy, _ = numbers.double().mean(0).tolist()
    training.unlogged = numbers[:0]
    progress.rows += 1
    if log is None:
        return
    log.add(progress.iteration, train_loss=loss, train_accuracy=accuracy, seconds=progress.seconds)
    rate = bar.format_dict["rate"] or progress.iteration / progress.seconds
    tasks = f"{rate * training.config.meta_batch_size:.0f} tasks/s"
    best = f"{100 * progress.best_accuracy:.1f} %" if progress.best_iteration else "none yet"
    text = f"loss {loss:.3f}, accuracy {100 * accuracy:.1f} %, best validation {best}, {tasks}"
    bar.set_postfix_str(text, refresh=False)


def _validate(training: TrainState, stop: Stop, log: MetricsLog | None) -> None:
    config, progress = training.config, training.progress
    sampler = evaluation_sampler(config, training.dataset.val)
    accuracies = evaluate(training.learner, sampler, config.validate_tasks, config.inner_steps, stop.check)
    result = interval(accuracies)
    if log is not None:
        log.add(progress.iteration, val_accuracy=result.mean, val_ci95=result.half_width, **_congruence(training))
    progress.validated = progress.iteration
    progress.rows += 1
    if result.mean > progress.best_accuracy:
        progress.best_accuracy, progress.best_iteration = result.mean, progress.iteration
        training.keep_best()


def _congruence(training: TrainState) -> dict[str, float]:
    """The mean cosines of training and validation gradients on the first validation tasks, where that is wanted."""
    config = training.config
    if config.congruence_tasks == 0:
        return {}
    sampler = evaluation_sampler(config, training.dataset.val)
    episodes = sampler.sample(config.congruence_tasks)
    before, after = congruence(training.learner, episodes, sampler.augmentation, training.config.rho).mean(0).tolist()
    return {"congruence_before": before, "congruence_after": after}


def _test(training: TrainState, stop: Stop) -> dict[str, Any]:
    """Tests the last weights, which published protocols test, and the best ones, on the same tasks."""
    config, progress, device = training.config, training.progress, training.device
    last = result = _tested(training, stop)
    if progress.best_iteration != progress.iteration:
        training.learner.model.load_state_dict(training.best)
        result = _tested(training, stop)
    summary = {
        **plain(config),
        "test_accuracy": result.mean,
        "test_ci95": result.half_width,
        "last_test_accuracy": last.mean,
        "last_test_ci95": last.half_width,
        "iterations": progress.iteration,
        "best_iteration": progress.best_iteration,
        "engine": progress.engine,
        "val_accuracy": progress.best_accuracy,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": distributed.size(),
        "wall_seconds": round(progress.seconds, 1),
        "package_version": __version__,
    }
    if distributed.is_first():
        run_folder.write_summary(training.folder, summary)
        run_folder.draw_curves(training.folder, config.title, result)
    return summary


def _tested(training: TrainState, stop: Stop) -> Interval:
    config = training.config
    sampler = evaluation_sampler(config, training.dataset.test)
    return interval(evaluate(training.learner, sampler, config.test_tasks, config.inner_steps, stop.check))
