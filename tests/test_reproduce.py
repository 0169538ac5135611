"""The queue that runs plans: what a cell leaves, stopping anywhere, going on, and the estimate before a cell."""

# ruff: noqa: F401, F811  fixtures are taken by their names
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import faults
from fewshot_asam.cli import eval_maml, reproduce_maml
from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.estimate import estimate
from fewshot_asam.reproduce.plan import cells, read_plan
from fewshot_asam.training.evaluation import Interval, interval
from fewshot_asam.training.run_folder import read_summary
from fewshot_asam.training.state import TrainState
from tiny_plan import TINY, assert_one_line, done, images, invented, records, tiny, words


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fewshot_asam.cli.reproduce_maml", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def outcome(folder: Path) -> dict[str, dict[str, Any]]:
    """What the ledger says, except times and whose code it was."""
    found = records(folder)
    for record in found.values():
        record.pop("wall_seconds")
        record.pop("commit")  # of the installed package in some processes, of the working tree in others
        record["validation"].pop("seconds")
        for test in record["tests"]:
            test.pop("seconds")
    return found


def test_a_cell_leaves_all_that_was_asked_for(done: Path, tiny: Path) -> None:
    found = records(done)
    assert list(found) == [cell.name for cell in cells([read_plan(tiny)])]
    record = list(found.values())[1]
    assert (record["seed"], record["settings"]["inner"], record["settings"]["rho"]) == (0, "agnostic_sam", 0.05)
    assert not {"data_root", "output_dir"} & record["settings"].keys()
    assert record["validation"]["iteration"] == [10, 20, 30]
    assert record["best_iteration"] in record["validation"]["iteration"]
    assert record["val_accuracy"] == pytest.approx(max(record["validation"]["accuracy"]), abs=1e-5)
    assert all(-1 <= cosine <= 1 for cosine in record["validation"]["congruence_after"])
    assert 0 < record["validation"]["seconds"][0] < record["validation"]["seconds"][-1] < record["wall_seconds"] + 0.1
    own, plain_maml, plain_maml_of_one_step, last = record["tests"]
    assert [test["weights"] for test in record["tests"]] == ["best", "best", "best", "last"]
    assert (last["inner"], last["tasks"]) == ("agnostic_sam", 20)
    assert (
        last["command"] == "eval_maml RUN --inner agnostic_sam --inner-steps 1 --inner-lr 0.4 --weights last --tasks 20"
    )
    assert (own["inner"], own["inner_steps"], own["tasks"]) == ("agnostic_sam", 1, 640)
    assert (plain_maml["inner"], plain_maml["inner_steps"], plain_maml["tasks"]) == ("maml", 3, 40)
    assert (plain_maml_of_one_step["inner_steps"], plain_maml_of_one_step["tasks"]) == (1, 20)
    accuracies = ledger.accuracies(own)
    assert tuple(own["of_640"].values()) == pytest.approx(interval(accuracies), abs=1e-6)
    assert own["of_600"]["mean"] == pytest.approx(accuracies[:600].mean().item(), abs=1e-6)


def test_the_first_tasks_are_those_of_the_run_s_own_test(done: Path) -> None:
    for name, record in records(done).items():
        summary = read_summary(done / "runs" / name)
        first = interval(ledger.accuracies(record["tests"][0], 20))
        assert first == pytest.approx((summary["test_accuracy"], summary["test_ci95"]), abs=1e-6)
        last = interval(ledger.accuracies(record["tests"][-1]))
        assert last == pytest.approx((summary["last_test_accuracy"], summary["last_test_ci95"]), abs=1e-6)
    assert any(record["best_iteration"] < 30 for record in records(done).values()), "last and best weights differ"


def test_eval_maml_tests_the_last_weights(done: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(name for name, record in records(done).items() if record["best_iteration"] < 30)
    summary = read_summary(done / "runs" / name)
    for weights, prefix, text in (("best", "", ""), ("last", "last_", "of the last weights ")):
        run = str(done / "runs" / name)
        assert eval_maml.main([run, "--tasks", "20", "--weights", weights, "--data-root", str(images)]) == 0
        expected = Interval(summary[f"{prefix}test_accuracy"], summary[f"{prefix}test_ci95"])
        assert f"test accuracy {text}{expected} (20 tasks" in capsys.readouterr().out


def test_what_is_done_is_not_done_again(
    done: Path, tiny: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "results" / ledger.FILE).read_bytes()
    assert reproduce_maml.main(words(tiny, images, done)) == 0
    assert capsys.readouterr().out == "4 of 4 cells are done\n"
    assert (done / "results" / ledger.FILE).read_bytes() == before


def test_killed_and_stopped_at_many_moments(done: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    """By SIGKILL, SIGTERM and the end of its minutes in turn, until the plan is done."""
    ends: list[int] = []
    for number in range(100):
        limit = ["--max-minutes", 0.02] if number % 3 == 2 else []
        process = start(*words(tiny, images, tmp_path, *limit))
        if not limit and number < 12:
            time.sleep(3 + 0.4 * number)
            process.send_signal((signal.SIGKILL, signal.SIGTERM)[number % 2])
        printed, problem = process.communicate(timeout=120)
        ends.append(process.returncode)
        assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 143), problem
        assert "Traceback" not in problem
        if "4 of 4 cells are done" in printed:
            break
    assert {0, -signal.SIGKILL} <= set(ends)
    assert faults.differences(outcome(tmp_path), outcome(done)) == []


def test_a_deadline_trains_without_testing(tiny: Path, images: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    long.write_text(
        TINY.replace("iterations: 30", "iterations: 100000").replace("validate_every: 10", "validate_every: 99999")
    )
    process = start(*words(long, images, tmp_path, "--max-minutes", 0.5))
    printed, problem = process.communicate(timeout=120)
    assert process.returncode == 0, problem
    (line,) = (line for line in printed.splitlines() if line.startswith("cell 1 of 4"))
    assert re.search(r" a test task\): \d+ pieces of 0\.5 minutes$", line)
    assert printed.splitlines()[-1] == "0 of 4 cells are done; the same command goes on"
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert not (run / "summary.json").exists()
    assert not any("val_accuracy" in line for line in (run / "metrics.jsonl").read_text().splitlines())
    assert list((run / "checkpoints").iterdir())


def test_a_cell_of_another_process_is_left_to_it(
    done: Path, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = list(records(done).values())
    for record in kept[1:]:
        ledger.append(tmp_path / "results" / ledger.FILE, record)
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / f"{kept[0]['cell']}.lock"):
        assert reproduce_maml.main(words(tiny, images, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "another process is at it" in printed
    assert "3 of 4 cells are done" in printed


def test_a_test_that_is_added_later_costs_no_training(done: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    more = tmp_path / "tiny.yaml"
    more.write_text(TINY.replace("rules:", "  more steps: {tasks: 10, inner_steps: 2}\nrules:"))
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, copy], check=True)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    assert reproduce_maml.main(words(more, images, copy)) == 0
    assert [len(record["tests"]) for record in records(copy).values()] == [4, 5, 4, 5]
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}


def test_a_run_that_diverges_is_an_outcome(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("  hidden: 4", "  hidden: 4\n  meta_lr: 1.0e+18"))
    assert reproduce_maml.main(words(file, images, tmp_path)) == 0
    assert all("not finite" in r["diverged"] or "likely cause" in r["diverged"] for r in records(tmp_path).values())
    assert reproduce_maml.main([str(file), "--render", "--results", str(tmp_path / "results")]) == 0
    assert "Diverged, so without an accuracy: MAML, seed 1" in (tmp_path / "results" / "tiny.md").read_text()


@pytest.mark.parametrize("tail", [b'{"cell": "half', b"17", b"\xff"])
def test_a_broken_line_is_said_and_left_out(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger.append(file, {"cell": "ä"})
    with file.open("ab") as end:
        end.write(tail)
    with pytest.warns(UserWarning, match="line 2 is broken"):
        assert ledger.read(file) == [{"cell": "ä"}]
    ledger.append(file, {"cell": "c"})
    with pytest.warns(UserWarning, match="line 2 is broken"):
        assert ledger.read(file) == [{"cell": "ä"}, {"cell": "c"}]


def test_accuracies_come_back_exactly() -> None:
    right = torch.randint(0, 76, (6000,), generator=torch.Generator().manual_seed(0))
    accuracies = (right / 75).float()
    record = {"right": ledger.pack(accuracies, 75), "query_images": 75, "tasks": 6000}
    assert torch.equal(ledger.accuracies(record), right.double() / 75)
    assert torch.equal(ledger.accuracies(record, 10), right[:10].double() / 75)
    assert len(record["right"]) < 9000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml does not exist"),
        ([], "plans"),
        (["PLAN", "--max-minutes", "0"], "max_minutes is 0"),
        (["PLAN", "--rnuds", "x"], "rnuds"),
        (["PLAN", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce_maml.main([str(tiny) if word == "PLAN" else word for word in arguments]) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "results").exists()


def test_several_processes_are_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert reproduce_maml.main([str(tiny)]) == 2
    assert_one_line(capsys, "expected one")


def test_what_a_cell_will_take_is_measured_before_it_starts(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations that take 0.3 seconds more: 100 of them take 30 seconds more."""
    (long,) = cells([read_plan(tiny)])[:1]
    config = replace(long.config, iterations=100, data_root=images, output_dir=tmp_path / "run", device="cpu")
    usual = estimate(long, config, {})
    step = TrainState.train_step
    monkeypatch.setattr(TrainState, "train_step", lambda self: (time.sleep(0.3), step(self)))
    slow = estimate(long, config, {})
    assert slow.training - usual.training == pytest.approx(30, abs=10)
    assert re.fullmatch(
        r"about 0:00:\d\d of training and 0:00:\d\d of tests "
        r"\(measured: [\d.e-]+ s an iteration, [\d.e-]+ s a test task\)",
        str(slow),
    )
    assert not (tmp_path / "run").exists()


def test_another_seed_of_the_same_cell_says_what_a_cell_will_take(tiny: Path, images: Path, tmp_path: Path) -> None:
    first, second = cells([read_plan(tiny)])[:3:2]
    assert (first.config.seed, second.config.seed) == (0, 1)
    record = invented(first, {}) | {"wall_seconds": 123.0, "threads": torch.get_num_threads()}
    record["tests"] = [test | {"seconds": test["tasks"] / 10} for test in record["tests"]]
    config = replace(second.config, data_root=images, output_dir=tmp_path, device="cpu")
    tasks = sum(test.tasks for test in second.tests)
    assert estimate(second, config, {first.name: record}) == (
        123.0,
        pytest.approx(tasks / 10),
        "as seed 0 on this device",
    )
    for otherwise in ({"device": "NVIDIA H100"}, {"threads": 1000}, {"diverged": "the loss is not finite"}):
        assert estimate(second, config, {first.name: record | otherwise}).source.startswith("measured")


def test_a_run_that_goes_on_says_what_is_left(done: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    cell = cells([read_plan(tiny)])[0]
    config = replace(cell.config, data_root=images, output_dir=done / "runs" / cell.name, iterations=90)
    found = estimate(cell, config, {})
    spent = records(done)[cell.name]["wall_seconds"]
    assert found.source == "as its first 30 iterations"
    assert found.training == pytest.approx(2 * spent, abs=0.3 * spent + 0.2)
    assert found.tests is None
