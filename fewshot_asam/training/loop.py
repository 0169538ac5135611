"""The meta-training loop: iterations, validation on fixed tasks, checkpoints, the final test."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from signal import Signals
from typing import Any

import torch
from tqdm import tqdm

from fewshot_asam.analysis.congruence import congruence
from fewshot_asam.data import Dataset
from fewshot_asam.engine.candidates import Candidate
from fewshot_asam.engine.precision import precision
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import gpu_kernels
from fewshot_asam.rules import rule_name
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.distributed import PeerLost
from fewshot_asam.runtime.signals import Stop, Stopped
from fewshot_asam.training import announcements, run_folder
from fewshot_asam.training.build import load_data, resolve_device, test_images
from fewshot_asam.training.checkpoint import weights
from fewshot_asam.training.config import TrainConfig, located, plain
from fewshot_asam.training.evaluation import Interval, evaluate, interval
from fewshot_asam.training.given import Factory, Given, layout, recorded
from fewshot_asam.training.identity import data_digests, require_same_everywhere, shared
from fewshot_asam.training.initial_weights import with_digest
from fewshot_asam.training.metrics import MetricsLog
from fewshot_asam.training.processes import sharing
from fewshot_asam.training.rehearsal import choose_engine, choose_processes, compile_engine
from fewshot_asam.training.state import TrainState, build
from fewshot_asam.training.trained import evaluation_sampler
from fewshot_asam.version import __version__

FORESEEN = 10
"""Iterations after which it is said what the rest will take."""
ROWS = 500
"""About as many lines of training metrics are kept of a run."""


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    config: TrainConfig,
    *,
    model: Factory | None = None,
    dataset: Dataset | None = None,
    learner: MetaLearner | None = None,
    resume: bool = False,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains, tests and writes the run folder; prints one line with the test accuracy.

    **Arguments:**

    - `model`: a function of the ways and the image shape `(C, H, W)` that returns an `nn.Module`, in place of the
      model that the settings name; it is called with PyTorch's generator seeded by `seed`.
    - `dataset`: in place of the one that the settings name.
    - `learner`: in place of the model, the rule and all else that the settings say of them. It is trained in place,
      from the weights that it has, and has the best ones in the end.
    - `resume`: goes on with the run in `output_dir`, to which the same things are to be given again. Settings that
      would alter it, other data and a folder without a run are refused before anything is written.
    - `stop`: SIGINT and SIGTERM end the iteration, save the state and raise `Stopped`, a `KeyboardInterrupt`; so does
      a request that reached `stop`, the caller's own, which is then in charge of the signals.

    **Returns:** what `summary.json` holds. Raises `FewShotError` for settings that cannot be run, for a loss that is
    not finite and where the run folder cannot be written; the last checkpoint stays.
    """
    given = Given(model, learner, dataset)
    config = distributed.all_succeed(lambda: with_digest(located(recorded(config, given)), resume))
    require_same_everywhere({"resume": resume, **shared(config)})
    if resume:
        distributed.all_succeed(lambda: run_folder.require_resumable(config) if distributed.is_first() else None)
    device = distributed.all_succeed(lambda: resolve_device(config.device))
    data = distributed.one_a_machine_first(lambda: load_data(config, device, dataset))
    tested = distributed.one_a_machine_first(lambda: test_images(config, data))
    with precision(config.precision, device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = distributed.all_succeed(lambda: build(config, data, device, given, tested))
        require_same_everywhere({"the learner's layout": layout(state.learner), **data_digests(state.identity)})
        if distributed.size() > 1:  # a learner that was given, or a model of somebody's own, may begin anywhere
            state.learner.load_state_dict(distributed.broadcast(weights(state.learner)))
        asked, first_order = state.learner.engine, state.learner.first_order
        try:
            with run_folder.opened(config, resume) as state.folder, gpu_kernels.using(gpu_kernels.current()):
                return _run(state, resume, stop)
        finally:
            state.learner.engine, state.learner.first_order = asked, first_order


def _run(state: TrainState, resume: bool, given: Stop | None) -> dict[str, Any]:
    """Trains and tests in the run's folder, which is open."""
    if resume:
        state.restore()
    processes = distributed.all_succeed(lambda: choose_processes(state))
    with sharing(state.learner, processes) as state.processes:
        return _go(state, given)


def _go(state: TrainState, given: Stop | None) -> dict[str, Any]:
    """What remains of `_run` once it is known which processes share the tasks."""
    choice = distributed.broadcast(choose_engine(state))  # before anything is written, as it may be refused
    distributed.all_succeed(lambda: run_folder.begin(state.folder, state.config))
    state.rewrite()
    gpu_kernels.use(choice.kernels or gpu_kernels.current())
    ways = choice.kernels is not None or state.device.type == "cuda"
    state.learner.engine = choice.name
    state.progress.engine = Candidate(choice.name, gpu_kernels.current()).text if ways else choice.name
    for line in announcements.opening(state, choice):
        distributed.print_rank0(line)
    if distributed.size() == 1:
        print(state.processes.text, flush=True)
    if state.learner.torch_compile and not state.finished:
        started = time.monotonic()
        distributed.print_rank0("compiling, a minute or two the first time ...", end="")
        compile_engine(state)
        distributed.print_rank0(f" done in {time.monotonic() - started:.0f} s")
    summary = _trained_and_tested(state, given)
    best, last = (Interval(summary[f"{kind}test_accuracy"], summary[f"{kind}test_ci95"]) for kind in ("", "last_"))
    distributed.print_rank0(announcements.conclusion(state, best, last))
    return summary


def _trained_and_tested(state: TrainState, given: Stop | None) -> dict[str, Any]:
    try:
        with nullcontext(given) if given else Stop() as stop:
            _fit(state, stop)
            return _test(state, stop)
    except Stopped as stopped:
        reason = f"stopped by {Signals(stopped.number).name}"
        raise Stopped(stopped.number, f"{reason}; {announcements.how_to_go_on(state)}") from stopped
    except PeerLost as error:
        raise PeerLost(f"{error}; {announcements.how_to_go_on(state)}") from error


def _fit(state: TrainState, stop: Stop) -> None:
    done, total = state.progress.iteration, state.config.iterations
    first = distributed.is_first()
    pause = 0.5 if sys.stderr.isatty() else 60  # a log file keeps every update
    bar = tqdm(
        total=total, initial=done, unit="it", desc="training", dynamic_ncols=True, mininterval=pause, disable=not first
    )
    with bar, MetricsLog(state.folder, state.progress.rows) if first else nullcontext() as log:
        try:
            if log is not None:
                state.progress.rows = log.rows
            _loop(state, stop, bar, log)
        except (Stopped, PeerLost) as error:
            if isinstance(error, Stopped) or state.device.type == "cpu":  # a GPU would wait for the lost process
                _save(state, log)
            raise


def _loop(state: TrainState, stop: Stop, bar: Any, log: MetricsLog | None) -> None:
    progress, config = state.progress, state.config
    every = max(1, config.iterations // ROWS)
    began, first = time.monotonic(), progress.iteration
    started = began - progress.seconds
    saved = (progress.iteration, progress.validated)
    while True:
        _read_clock(state)
        last = state.finished
        validation_due = last or progress.iteration % config.validate_every == 0
        if validation_due or progress.iteration % every == 0:
            _report(state, bar, log)
        if validation_due and progress.validated < progress.iteration:
            _validate(state, stop, log)
        reached = (progress.iteration, progress.validated)
        if (last or progress.iteration % config.checkpoint_every == 0) and saved != reached:
            _save(state, log)
            saved = reached
        if last:
            return
        stop.check()
        state.train_step()
        progress.seconds = time.monotonic() - started
        bar.update()
        if progress.iteration == first + FORESEEN:
            state.read()  # which waits for the device
            bar.write(announcements.foreseen(state, (time.monotonic() - began) / FORESEEN))


def _save(state: TrainState, log: MetricsLog | None) -> None:
    if log is not None:
        log.sync()
    state.save()


def _read_clock(state: TrainState) -> None:
    """Notes which part of the minutes is over, on the clock of any process; the learning rate follows it too."""
    if state.config.max_minutes is not None:
        state.spent = distributed.all_reduce_max(state.progress.seconds) / (60 * state.config.max_minutes)


def _report(state: TrainState, bar: Any, log: MetricsLog | None) -> None:
    progress, numbers = state.progress, state.read()
    if len(numbers) == 0:
        return
    loss, accuracy, _ = numbers.double().mean(0).tolist()
    state.unlogged = numbers[:0]
    progress.rows += 1
    if log is None:
        return
    log.add(progress.iteration, train_loss=loss, train_accuracy=accuracy, seconds=progress.seconds)
    rate = bar.format_dict["rate"] or progress.iteration / progress.seconds
    bar.set_postfix_str(announcements.latest(state, loss, accuracy, rate), refresh=False)


def _validate(state: TrainState, stop: Stop, log: MetricsLog | None) -> None:
    config, progress = state.config, state.progress
    sampler = evaluation_sampler(config, state.dataset.val)
    accuracies = evaluate(state.learner, sampler, config.validate_tasks, config.inner_steps, stop.check)
    result = interval(accuracies)
    if log is not None:
        log.add(progress.iteration, val_accuracy=result.mean, val_ci95=result.half_width, **_congruence(state))
    progress.validated = progress.iteration
    progress.rows += 1
    state.keep_snapshot()
    if result.mean > progress.best_accuracy:
        progress.best_accuracy, progress.best_iteration = result.mean, progress.iteration
        state.keep_best()


def _congruence(state: TrainState) -> dict[str, float]:
    """The mean cosines of training and validation gradients on the first validation tasks, where that is wanted."""
    config = state.config
    if config.congruence_tasks == 0:
        return {}
    sampler = evaluation_sampler(config, state.dataset.val)
    episodes = sampler.sample(config.congruence_tasks)
    before, after = congruence(state.learner, episodes, sampler.augmentation, config.rho).mean(0).tolist()
    return {"congruence_before": before, "congruence_after": after}


def _test(state: TrainState, stop: Stop) -> dict[str, Any]:
    """Tests the last weights, which published protocols test, and the best ones, on the same tasks."""
    config, progress, learner = state.config, state.progress, state.learner
    last = result = _tested(state, stop)
    if progress.best_iteration != progress.iteration:
        learner.load_state_dict(state.best)
        result = _tested(state, stop)
    summary = {
        **({} if "learner" not in config.from_python else _of_the_learner(learner)),
        **plain(config),
        **({"rho": getattr(config.rule, "rho", None)} if config.inner_settings else {}),
        "test_accuracy": result.mean,
        "test_ci95": result.half_width,
        "last_test_accuracy": last.mean,
        "last_test_ci95": last.half_width,
        "iterations": progress.iteration,
        "best_iteration": progress.best_iteration,
        "engine": progress.engine,
        "val_accuracy": progress.best_accuracy,
        "device": announcements.device_name(state.device),
        "processes": distributed.size() * state.processes.number,
        "wall_seconds": round(progress.seconds, 1),
        "package_version": __version__,
    }
    if distributed.is_first():
        run_folder.write_summary(state.folder, summary)
        run_folder.draw_curves(state.folder, config.title, result)
    return summary


def _tested(state: TrainState, stop: Stop) -> Interval:
    config = state.config
    sampler = evaluation_sampler(config, state.test_images)
    return interval(evaluate(state.learner, sampler, config.test_tasks, config.inner_steps, stop.check))


def _of_the_learner(learner: MetaLearner) -> dict[str, Any]:
    """What a summary says in any case, of a learner that was given in Python."""
    return {"inner": rule_name(learner.rule), "rho": getattr(learner.rule, "rho", None), "norm": learner.norm}
