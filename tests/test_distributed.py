"""Several processes of one job compute what one does, and none of them can spoil the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import faults
import own_parts
from fewshot_asam import FewShotError
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.cli.parsing import run
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.runtime import distributed
from fewshot_asam.training import meta_step
from fewshot_asam.training.checkpoint import decode, read_state
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import TASKS_AT_ONCE, evaluate
from fewshot_asam.training.loop import train as train_python
from fewshot_asam.training.run_folder import read_metrics
from own_parts import RegisteredTwice, own_dataset
from problems import SHAPE, deviation, episodes, made_learner, make_images

TASKS = 5
"""Of a meta-batch: not divisible by the numbers of processes."""


def joined(work: Any, out: Path, *arguments: Any) -> int:
    """Runs `work` as one process of the job and stores what it returns."""
    torch.set_default_dtype(torch.float64)
    with distributed.joined():
        torch.save(work(*arguments), out / f"{distributed.rank()}.pt")
    return 0


def results(tmp_path: Path, count: int, work: Any, *arguments: Any) -> list[Any]:
    """What `work` returns in each of `count` processes of one job, in float64."""
    out = tmp_path / f"{count}"
    ended(faults.start_job(out, count, joined, work, out, *arguments))
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(count)]


def ended(job: list[BaseProcess], statuses: set[int] | None = None) -> None:
    for process in job:
        process.join(120)
        assert process.exitcode in (statuses or {0}), process


def build(rule: str, validation: str) -> MetaLearner:
    model = build_model("conv4", 3, SHAPE, 4, seed=0).double()
    return made_learner(model, 0.1, rule, validation=validation, engine="loop")


def trained(rule: str, validation: str, outer_rho: float) -> tuple[Tensor, Tensor]:
    """The numbers of some iterations and the parameters after them."""
    config = TrainConfig(meta_lr=1e-2, inner_steps=2, clip_grad=0.5, ways=3, meta_batch_size=TASKS, outer_rho=outer_rho)
    learner = build(rule, validation)
    adam = meta_step.optimizer(learner, config)
    rates, iterate = meta_step.schedule(adam, config), meta_step.iteration(learner, adam, config)
    generator, numbers = torch.Generator().manual_seed(0), []
    for index in range(4):
        batch = learner.batch(episodes(tasks=TASKS, seed=index), generator, [0.4, 0.6] if outer_rho else None)
        numbers.append(iterate(batch))
        rates.step()
    return torch.stack(numbers), nn.utils.parameters_to_vector(learner.parameters()).detach()


@pytest.mark.parametrize(
    ("rule", "validation", "outer_rho"),
    [("maml", "duplicate", 0.0), ("agnostic_sam", "augment", 0.0), ("agnostic_sam", "augment", 0.1)],
)
def test_processes_take_the_steps_of_one(tmp_path: Path, rule: str, validation: str, outer_rho: float) -> None:
    (expected,) = results(tmp_path, 1, trained, rule, validation, outer_rho)
    for count in (2,) if outer_rho else (2, 3):
        found = results(tmp_path, count, trained, rule, validation, outer_rho)
        for value in found:
            assert deviation(value[0], expected[0]) < 1e-12
            assert deviation(value[1], expected[1]) < 1e-12
        assert all(torch.equal(value[1], found[0][1]) for value in found)
        assert not torch.equal(found[0][1], expected[1])  # summed in another order: the work was shared
        worst = max(deviation(value[index], expected[index]) for value in found for index in (0, 1))
        print(f"\n{rule}, {count} processes: largest deviation {worst:.1e}")


def accuracies() -> Tensor:
    learner = build("agnostic_sam", "augment")
    counted: list[int] = []
    sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0), 3, 2, 2, seed=1)
    found = evaluate(learner, sampler, TASKS_AT_ONCE + 1, 2, lambda: counted.append(1))
    assert len(counted) == 2
    return found


def test_the_test_tasks_are_shared_and_the_same(tmp_path: Path) -> None:
    (expected,) = results(tmp_path, 1, accuracies)
    assert len(expected.unique()) > 1
    for count in (2, 3):
        assert all(torch.equal(found, expected) for found in results(tmp_path, count, accuracies))


def parts(count: int) -> tuple[list[int], list[float]]:
    values = torch.zeros(count)
    values[distributed.share(count)] = 1.0
    own = int(values.sum())
    distributed.all_reduce_sum(values)
    return [own, int(distributed.all_reduce_max(own)), distributed.broadcast(own)], values.tolist()


def test_shares_cover_everything_once_and_evenly(tmp_path: Path) -> None:
    found = results(tmp_path, 3, parts, 7)
    assert sorted(own for (own, _, _), _ in found) == [2, 2, 3]
    assert {largest for (_, largest, _), _ in found} == {3}
    assert {first for (_, _, first), _ in found} == {found[0][0][0]}
    assert all(values == [1.0] * 7 for _, values in found)


def alone() -> list[float]:
    """In a job that is not the package's own, but the caller's."""
    torch.distributed.init_process_group("gloo")
    found = [distributed.size(), distributed.rank(), distributed.all_reduce_max(7.0), len(accuracies())]
    torch.distributed.destroy_process_group()
    return found


def unjoined(out: Path) -> int:
    torch.set_default_dtype(torch.float64)
    if os.environ["RANK"] == "0":
        torch.save(alone(), out / "0.pt")
    else:
        torch.distributed.init_process_group("gloo")
    return 0


def test_another_program_of_several_processes_is_left_alone(tmp_path: Path) -> None:
    """One of its processes may evaluate by itself; it would wait for the others for ever if the tasks were shared."""
    ended(faults.start_job(tmp_path, 2, unjoined, tmp_path))
    assert torch.load(tmp_path / "0.pt", weights_only=True) == [1, 0, 7.0, TASKS_AT_ONCE + 1]


def failing() -> str:
    def work() -> None:
        if distributed.rank() == 1:
            raise FewShotError("no such file")

    try:
        distributed.all_succeed(work)
    except FewShotError as error:
        return str(error)
    except SystemExit as error:
        return f"exit {error.code}"
    return "nothing"


def test_what_fails_in_one_process_is_said_once_and_ends_all(tmp_path: Path) -> None:
    assert results(tmp_path, 3, failing) == ["process 1: no such file", "exit 2", "exit 2"]


def left_behind() -> bool:
    """Whether a group is left after a failure."""
    with suppress(FewShotError), distributed.joined():
        distributed.all_reduce_max(1.0)
        raise FewShotError("no such file")
    return torch.distributed.is_initialized()


def run_unjoined(work: Any, out: Path) -> int:
    torch.save(work(), out / f"{os.environ['RANK']}.pt")
    return 0


def test_a_process_that_fails_leaves_the_job(tmp_path: Path) -> None:
    """The threads of one that does not abort the interpreter when it ends (about one in five)."""
    ended(faults.start_job(tmp_path, 2, run_unjoined, left_behind, tmp_path))
    assert [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)] == [False, False]


FAILING = """
import sys
from fewshot_asam import FewShotError
from fewshot_asam.runtime import distributed
from fewshot_asam.cli.parsing import run

def command(argv):
    distributed.all_reduce_max(1.0)
    if distributed.rank() == int(argv[0]):
        raise FewShotError("alone") if argv[1] == "error" else KeyboardInterrupt
    for _ in range(100):
        distributed.all_reduce_max(1.0)

sys.exit(run(command, sys.argv[1:]))
"""


@pytest.mark.parametrize(("count", "failing", "how"), [(3, 1, "error"), (2, 1, "signal")])
def test_every_process_of_a_job_that_fails_ends_with_a_status(count: int, failing: int, how: str) -> None:
    """In processes that end as a user's do, their interpreter taken down."""
    environments = faults.environments(count)
    words = [sys.executable, "-c", FAILING, str(failing), how]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
    job = [subprocess.Popen(words, env={**os.environ, **own}, **options) for own in environments]
    said = [process.communicate(timeout=120)[1] for process in job]
    assert [process.returncode for process in job] == [
        130 if rank == failing and how == "signal" else 2 for rank in range(count)
    ], said
    assert all(len(text.splitlines()) <= 1 for text in said), said


JOB = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "5"}, "RANK is '5'; expected a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "no.such.host.invalid", "RANK": "1"}, "do not find each other"),
        ({"RANK": "1"}, "refused"),
        ({}, "1/2 clients joined"),
        ({"MASTER_PORT": "taken"}, "EADDRINUSE"),
        ({"MASTER_PORT": "taken", "RANK": "1"}, "no answer within"),
    ],
)
def test_a_job_that_cannot_be_is_refused_in_one_line(
    given: dict[str, str | None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(distributed, "LONGEST_WAIT", 0.5)
    monkeypatch.setattr(distributed, "LAST_WORDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in {**JOB, **given}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "taken" else value)
        assert run(lambda _: pytest.fail("it was started"), []) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data-root", str(faults.write_images(tmp_path_factory.mktemp("images")))]


def train(tmp_path: Path, count: int, *arguments: object) -> list[BaseProcess]:
    """Starts or resumes the run in `tmp_path/run` as a job of `count` processes."""
    folder = tmp_path / "run"
    words = ["--resume"] if (folder / "config.yaml").exists() else []
    argv = [*faults.RUN, "--meta-batch-size", "4", *words, "--output-dir", str(folder), *map(str, arguments)]
    return faults.start_job(tmp_path, count, train_maml.main, argv)


def printed(tmp_path: Path, count: int) -> list[str]:
    return [(tmp_path / f"{rank}.log").read_text() for rank in range(count)]


def last_losses(folder: Path) -> Tensor:
    return torch.tensor([row["train_loss"] for row in faults.outcome(folder)["rows"] if "train_loss" in row])


def test_a_run_goes_on_with_another_number_of_processes(data: list[str], tmp_path: Path) -> None:
    ended(train(tmp_path / "one", 1, *data))
    expected = last_losses(tmp_path / "one" / "run")
    parts = tmp_path / "parts"
    for count, iterations in ((2, 3), (3, 6), (1, 8)):
        ended(train(parts, count, *data, "--iterations", iterations, "--schedule", "constant"))
    ended(train(tmp_path / "constant", 1, *data, "--schedule", "constant"))
    found, expected = last_losses(parts / "run"), last_losses(tmp_path / "constant" / "run")
    assert len(found) == 8
    assert deviation(found, expected) < 1e-4  # float32
    assert list(parts.joinpath("run").glob("events.out.tfevents.*"))


def test_only_one_process_speaks_and_writes(data: list[str], tmp_path: Path) -> None:
    ended(train(tmp_path, 2, *data))
    first, second = printed(tmp_path, 2)
    assert "in each of 2 processes" in first
    assert "test accuracy" in first
    assert second == ""
    ended(faults.start_job(tmp_path / "tested", 2, eval_maml.main, [str(tmp_path / "run"), "--tasks", "4"]))
    first, second = printed(tmp_path / "tested", 2)
    summary = faults.outcome(tmp_path / "run")["summary"]
    assert f"test accuracy {100 * summary['test_accuracy']:.1f} %" in first
    assert second == ""
    assert summary["processes"] == 2


def test_bad_settings_are_said_once(data: list[str], tmp_path: Path) -> None:
    ended(train(tmp_path, 3, *data, "--meta-batch-size", 2), {2})
    first, *others = printed(tmp_path, 3)
    assert first.startswith("error: ")
    assert "leaves some of the 3 processes without a task" in first
    assert len(first.splitlines()) == 1
    assert others == ["", ""]
    assert not (tmp_path / "run").exists()


def wait_for_iteration(folder: Path, iteration: int) -> None:
    faults.wait_for_text(folder / "metrics.jsonl", f'"iteration": {iteration},')


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_process_stops_all_and_saves(data: list[str], tmp_path: Path, number: signal.Signals) -> None:
    job = train(tmp_path, 2, *data, "--iterations", 1000, "--checkpoint-every", 1000)
    wait_for_iteration(tmp_path / "run", 2)
    assert job[1].pid is not None
    os.kill(job[1].pid, number)
    ended(job, {128 + number})
    first, second = printed(tmp_path, 2)
    assert f"stopped by {number.name}" in first
    assert second == ""
    assert decode(*read_state(tmp_path / "run"))["progress"]["iteration"] >= 2


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_the_job(data: list[str], tmp_path: Path, dead: int) -> None:
    """Where the first one survives it saves the last whole iteration; else the last checkpoint is left."""
    job = train(tmp_path, 2, *data, "--iterations", 1000, "--checkpoint-every", 3 if dead == 0 else 1000)
    wait_for_iteration(tmp_path / "run", 6)
    job[dead].kill()
    ended(job[1 - dead : 2 - dead], {2})
    message = printed(tmp_path, 2)[1 - dead]
    assert "another process of this job ended" in message
    assert "Traceback" not in message
    iteration = decode(*read_state(tmp_path / "run"))["progress"]["iteration"]
    assert iteration >= (3 if dead == 0 else 6)
    assert f"goes on after iteration {iteration} of 1000" in message
    reached = max(row["iteration"] for row in read_metrics(tmp_path / "run"))
    job = train(tmp_path, 2, *data, "--iterations", 1000, "--checkpoint-every", 1000)
    wait_for_iteration(tmp_path / "run", reached + 2)
    for process in job:
        process.terminate()
    ended(job, {143})


def trained_from_elsewhere(folder: Path) -> Tensor:
    """The weights after a run of a learner that begins with other ones in each process."""
    torch.manual_seed(distributed.rank())
    learner = MetaLearner(RegisteredTwice(3, own_parts.SHAPE), 0.2, MAMLRule(), engine="loop")
    config = TrainConfig(ways=3, queries=2, iterations=2, validate_tasks=2, test_tasks=2, output_dir=folder)
    train_python(config, learner=learner, dataset=own_dataset())
    return nn.utils.parameters_to_vector(learner.parameters()).detach()


def test_processes_that_begin_with_other_weights_take_those_of_the_first(tmp_path: Path) -> None:
    first, second = results(tmp_path, 2, trained_from_elsewhere, tmp_path / "run")
    assert torch.equal(first, second)


OWN = """
from torch import nn

def net(ways, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 8), nn.ReLU(), nn.Linear(8, ways))
"""


def test_torchrun(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model of the current folder, by its name; one process takes the same steps."""
    (tmp_path / "net_by_torchrun.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [*faults.RUN, *data, "--model", "net_by_torchrun:net", "--output-dir"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fewshot_asam.cli.train_maml"]
    done = subprocess.run(
        [sys.executable, *launch, *words, "run"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "in each of 2 processes" in done.stdout
    assert "net_by_torchrun:net of" in done.stdout
    assert done.stdout.count("test accuracy") == 1
    assert train_maml.main([*words, "alone"]) == 0
    assert deviation(last_losses(tmp_path / "run"), last_losses(tmp_path / "alone")) < 1e-4  # float32
    assert eval_maml.main(["run", "--tasks", "4"]) == 0
    assert "run: test accuracy" in capsys.readouterr().out
