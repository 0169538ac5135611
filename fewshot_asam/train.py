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

from fewshot_asam import __version__, distributed, engine, runs
from fewshot_asam.analysis.congruence import congruence
from fewshot_asam.checkpoint import latest_state
from fewshot_asam.config import TrainConfig, located, plain
from fewshot_asam.distributed import PeerLost
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.evaluate import Interval, evaluate, interval
from fewshot_asam.identity import data, require_same_everywhere, shared
from fewshot_asam.memory import peak_memory
from fewshot_asam.metrics import MetricsLog
from fewshot_asam.prepare import load_data, resolve_device
from fewshot_asam.stop import Stop, Stopped
from fewshot_asam.trainer import Trainer, build, evaluation_sampler

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
        distributed.agreed(lambda: runs.require_resumable(config) if distributed.is_first() else None)
    device = distributed.agreed(lambda: resolve_device(config.device))
    dataset = distributed.one_a_machine_first(lambda: load_data(config, device))
    with precision(config.precision, device):
        trainer = distributed.agreed(lambda: build(config, dataset, device))
        require_same_everywhere(data(trainer.identity))
        with runs.opened(config, resume) as trainer.folder:
            if resume:
                trainer.restore()
            distributed.agreed(lambda: runs.begin(trainer.folder, config))
            trainer.rewrite()
            _announce(trainer)
            if config.compiled and not _finished(trainer):
                _compile(trainer)
            summary = _trained_and_tested(trainer, stop)
    best, last = (Interval(summary[f"{kind}test_accuracy"], summary[f"{kind}test_ci95"]) for kind in ("", "last_"))
    distributed.say(
        f"test accuracy {result_text(config, best, config.test_tasks)}; of the last weights {last}; see "
        f"{trainer.folder / 'curves.png'}"
    )
    return summary


def result_text(config: TrainConfig, accuracy: Interval, tasks: int) -> str:
    """An accuracy with everything it must not be quoted without."""
    steps = f"{config.inner_steps} step{'s' if config.inner_steps > 1 else ''} of {config.inner_lr:g}"
    return (
        f"{accuracy} ({tasks} tasks, {config.ways}-way {config.shots}-shot, {config.queries} queries a class, "
        f"{config.norm} norm, {config.rule_text}, {steps})"
    )


def _announce(trainer: Trainer) -> None:
    config, dataset = trainer.config, trainer.dataset
    classes = " / ".join(str(len(images.names)) for images in (dataset.train, dataset.val, dataset.test))
    size = sum(p.numel() for p in trainer.learner.parameters())
    processes = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    distributed.say(
        f"{config.title} in {trainer.folder}: {config.model} of {size:,} parameters on {trainer.device}{processes}, "
        f"{config.norm} norm"
    )
    distributed.say(f"{config.dataset}: {classes} classes for training / validation / test")
    if config.adapt != "all":
        layers = dict.fromkeys(name.rpartition(".")[0] for name in trainer.learner.adapted)
        distributed.say(f"adapt {config.adapt}: the inner loop changes {', '.join(layers)}")
    choice = distributed.from_first(_engine(trainer))
    trainer.learner.engine = trainer.progress.engine = choice.name
    distributed.say(f"engine {choice.name}{_options(trainer)}: {choice.reason}")
    if trainer.progress.iteration >= config.iterations:
        distributed.say(f"all {config.iterations} iterations are done; raise --iterations to go on")
    elif _out_of_time(trainer):
        distributed.say(f"all {config.max_minutes:g} minutes are spent; raise --max-minutes to go on")


def _engine(trainer: Trainer) -> engine.Choice:
    """The engine by rule, or by the clock on a CPU where both can run; a resumed run keeps its own."""
    config, learner = trainer.config, trainer.learner
    choice = engine.choose(config.engine, learner.model, trainer.device, trainer.dataset.train.shape[-1])
    if config.engine != "auto" or trainer.device.type != "cpu" or config.compiled:
        return choice
    if trainer.progress.engine:
        return engine.Choice("vmap" if trainer.progress.engine == "vmap" else "loop", "as before")
    sampler, episodes = _trial(trainer)

    def iterate(name: engine.Tasks) -> None:
        learner.engine = name
        learner.meta_backward(episodes, config.inner_steps, sampler.augmentation)
        learner.zero_grad()

    return engine.measured(choice, iterate)


def _trial(trainer: Trainer) -> tuple[EpisodeSampler, Episodes]:
    """A meta-batch to try things on, as large as this process's share, which leaves the run's own stream of tasks."""
    config = trainer.config
    sampler = EpisodeSampler(trainer.dataset.train, config.ways, config.shots, config.queries)
    return sampler, sampler.sample(config.meta_batch_size)[distributed.share(config.meta_batch_size)]


def _options(trainer: Trainer) -> str:
    """How the engine runs beyond its name."""
    config = trainer.config
    captured = config.cuda_graph and trainer.device.type == "cuda"
    wanted = {"compiled": config.compiled, "recomputing": config.recompute, "recorded": captured}
    wanted[config.precision] = config.precision != "float32"
    return "".join(f", {name}" for name, chosen in wanted.items() if chosen)


def _compile(trainer: Trainer) -> None:
    """Compiles by an iteration that is thrown away, so that it takes no training time."""
    started = time.monotonic()
    distributed.say("compiling, a minute or two the first time ...", end="")
    sampler, episodes = _trial(trainer)
    trainer.learner.meta_backward(episodes, trainer.config.inner_steps, sampler.augmentation)
    trainer.learner.zero_grad()
    distributed.say(f" done in {time.monotonic() - started:.0f} s")


def _trained_and_tested(trainer: Trainer, given: Stop | None) -> dict[str, Any]:
    try:
        with nullcontext(given) if given else Stop() as stop:
            _fit(trainer, stop)
            return _test(trainer, stop)
    except Stopped as stopped:
        reason = f"stopped by {Signals(stopped.number).name}"
        raise Stopped(stopped.number, f"{reason}; {_how_to_go_on(trainer)}") from stopped
    except PeerLost as error:
        raise PeerLost(f"{error}; {_how_to_go_on(trainer)}") from error


def _how_to_go_on(trainer: Trainer) -> str:
    state = latest_state(trainer.folder)
    start = f"after iteration {int(state.stem)} of {trainer.config.iterations}" if state else "from the start"
    return f"train_maml --resume --output-dir {trainer.folder} goes on {start}"


def _fit(trainer: Trainer, stop: Stop) -> None:
    done, total = trainer.progress.iteration, trainer.config.iterations
    first = distributed.is_first()
    pause = 0.5 if sys.stderr.isatty() else 60  # a log file keeps every update
    bar = tqdm(
        total=total, initial=done, unit="it", desc="training", dynamic_ncols=True, mininterval=pause, disable=not first
    )
    with bar, MetricsLog(trainer.folder, trainer.progress.rows) if first else nullcontext() as log:
        try:
            if log is not None:
                trainer.progress.rows = log.rows
            _loop(trainer, stop, bar, log)
        except (Stopped, PeerLost) as error:
            if isinstance(error, Stopped) or trainer.device.type == "cpu":  # a GPU would wait for the lost process
                _save(trainer, log)
            raise


def _loop(trainer: Trainer, stop: Stop, bar: Any, log: MetricsLog | None) -> None:
    progress, config = trainer.progress, trainer.config
    every = max(1, config.iterations // ROWS)
    began, first = time.monotonic(), progress.iteration
    started = began - progress.seconds
    saved = (progress.iteration, progress.validated)
    while True:
        last = _finished(trainer)
        validation_due = last or progress.iteration % config.validate_every == 0
        if validation_due or progress.iteration % every == 0:
            _report(trainer, bar, log)
        if validation_due and progress.validated < progress.iteration:
            _validate(trainer, stop, log)
        reached = (progress.iteration, progress.validated)
        if (last or progress.iteration % config.checkpoint_every == 0) and saved != reached:
            _save(trainer, log)
            saved = reached
        if last:
            return
        stop.check()
        trainer.advance()
        progress.seconds = time.monotonic() - started
        bar.update()
        if progress.iteration == first + FORESEEN:
            trainer.read()  # which waits for the device
            bar.write(_foreseen(trainer, (time.monotonic() - began) / FORESEEN))


def _foreseen(trainer: Trainer, pace: float) -> str:
    """What the rest of the run will take, at a pace of so many seconds an iteration."""
    config = trainer.config
    left = pace * (config.iterations - trainer.progress.iteration)
    if config.max_minutes is not None:
        left = min(left, 60 * config.max_minutes - trainer.progress.seconds)
    return (
        f"{pace:.2g} s an iteration, so about {timedelta(seconds=round(left))} of training are to come, validation and "
        f"test besides; {peak_memory(trainer.device) / 1e9:.1f} GB of memory so far"
    )


def _save(trainer: Trainer, log: MetricsLog | None) -> None:
    if log is not None:
        log.sync()
    trainer.save()


def _finished(trainer: Trainer) -> bool:
    return trainer.progress.iteration >= trainer.config.iterations or _out_of_time(trainer)


def _out_of_time(trainer: Trainer) -> bool:
    """Whether the minutes are over, on the clock of any process; the learning rate follows the same clock."""
    if trainer.config.max_minutes is None:
        return False
    trainer.spent = distributed.largest(trainer.progress.seconds) / (60 * trainer.config.max_minutes)
    return trainer.spent >= 1


def _report(trainer: Trainer, bar: Any, log: MetricsLog | None) -> None:
    progress, numbers = trainer.progress, trainer.read()
    if len(numbers) == 0:
        return
    loss, accuracy, _ = numbers.double().mean(0).tolist()
    trainer.unlogged = numbers[:0]
    progress.rows += 1
    if log is None:
        return
    log.add(progress.iteration, train_loss=loss, train_accuracy=accuracy, seconds=progress.seconds)
    rate = bar.format_dict["rate"] or progress.iteration / progress.seconds
    tasks = f"{rate * trainer.config.meta_batch_size:.0f} tasks/s"
    best = f"{100 * progress.best_accuracy:.1f} %" if progress.best_iteration else "none yet"
    text = f"loss {loss:.3f}, accuracy {100 * accuracy:.1f} %, best validation {best}, {tasks}"
    bar.set_postfix_str(text, refresh=False)


def _validate(trainer: Trainer, stop: Stop, log: MetricsLog | None) -> None:
    config, progress = trainer.config, trainer.progress
    sampler = evaluation_sampler(config, trainer.dataset.val)
    accuracies = evaluate(trainer.learner, sampler, config.validate_tasks, config.inner_steps, stop.check)
    result = interval(accuracies)
    if log is not None:
        log.add(progress.iteration, val_accuracy=result.mean, val_ci95=result.half_width, **_congruence(trainer))
    progress.validated = progress.iteration
    progress.rows += 1
    if result.mean > progress.best_accuracy:
        progress.best_accuracy, progress.best_iteration = result.mean, progress.iteration
        trainer.keep_best()


def _congruence(trainer: Trainer) -> dict[str, float]:
    """The mean cosines of training and validation gradients on the first validation tasks, where that is wanted."""
    config = trainer.config
    if config.congruence_tasks == 0:
        return {}
    sampler = evaluation_sampler(config, trainer.dataset.val)
    episodes = sampler.sample(config.congruence_tasks)
    before, after = congruence(trainer.learner, episodes, sampler.augmentation).mean(0).tolist()
    return {"congruence_before": before, "congruence_after": after}


def _test(trainer: Trainer, stop: Stop) -> dict[str, Any]:
    """Tests the last weights, which published protocols test, and the best ones, on the same tasks."""
    config, progress, device = trainer.config, trainer.progress, trainer.device
    last = result = _tested(trainer, stop)
    if progress.best_iteration != progress.iteration:
        trainer.learner.model.load_state_dict(trainer.best)
        result = _tested(trainer, stop)
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
        runs.write_summary(trainer.folder, summary)
        runs.draw_curves(trainer.folder, config.title, result)
    return summary


def _tested(trainer: Trainer, stop: Stop) -> Interval:
    config = trainer.config
    sampler = evaluation_sampler(config, trainer.dataset.test)
    return interval(evaluate(trainer.learner, sampler, config.test_tasks, config.inner_steps, stop.check))
