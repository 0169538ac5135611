"""Runs that are stopped in every way end bit for bit like the run that never was."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import faults
from fewshot_asam.training.checkpoint import STATES, decode, latest_state, read_state

KILLS = int(os.environ.get("FEWSHOT_ASAM_KILLS", "100"))
"""Runs are killed at random moments until there were so many kills."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data-root", str(faults.write_images(tmp_path_factory.mktemp("images")))]


@pytest.fixture(scope="module")
def whole(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, printed = faults.finish(folder, *data)
    assert status == 0, printed
    return folder


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, Any]:
    return faults.outcome(whole)


def test_a_run_is_the_same_each_time(whole: Path, expected: dict[str, Any], data: list[str], tmp_path: Path) -> None:
    assert faults.finish(tmp_path / "run", *data)[0] == 0
    assert faults.differences(faults.outcome(tmp_path / "run"), expected) == []
    assert [row["iteration"] for row in expected["rows"] if "train_loss" in row] == list(range(1, 9))
    assert faults.differences(expected, {**expected, "state": {}})


def test_killed_at_random_moments(data: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    """Some lives end by SIGTERM instead, so that runs go on from any iteration and from within a validation."""
    started = time.monotonic()
    assert faults.finish(tmp_path / "timed", *data)[0] == 0
    length, moments = time.monotonic() - started, random.Random(0)
    ends: Counter[int] = Counter()
    torn = 0
    while ends[-signal.SIGKILL] < KILLS:
        folder = tmp_path / str(ends[0])
        process = faults.start(folder, *data)
        process.join(moments.uniform(0.0, length))
        if moments.random() < 0.2:
            process.terminate()
            process.join(10)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), faults.log(folder)
        ends[process.exitcode] += 1
        torn += any(folder.rglob(".*.tmp"))
        if process.exitcode == 0:
            assert faults.differences(faults.outcome(folder), expected) == []
    if (folder / "config.yaml").exists():
        assert faults.finish(folder, *data)[0] == 0
        assert faults.differences(faults.outcome(folder), expected) == []
    print(f"\n{dict(ends)} by exit status, {torn} while a file was being written")


def test_killed_at_every_access_to_a_file(data: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    """One life after another dies when it opens, renames or removes its first, second, third ... file of the run."""
    folder, deaths = tmp_path / "run", 0
    while (life := faults.finish(folder, *data, prepare=partial(faults.die_at_event, deaths + 1)))[0] != 0:
        assert life[0] == -signal.SIGKILL, life[1]
        deaths += 1
    print(f"\n{deaths} deaths")
    assert deaths > 20
    assert faults.differences(faults.outcome(folder), expected) == []


@pytest.mark.parametrize("size", [0, 50, 700, 3000, 9000, 20_000])
def test_killed_in_the_middle_of_writing_a_file(
    data: list[str], expected: dict[str, Any], tmp_path: Path, size: int
) -> None:
    folder = tmp_path / "run"
    status, printed = faults.finish(folder, *data, prepare=partial(faults.limit_file_size, size, True))
    assert status == -signal.SIGXFSZ, printed
    assert any(tmp_path.rglob(".*.tmp"))
    assert faults.finish(folder, *data)[0] == 0
    assert faults.differences(faults.outcome(folder), expected) == []


@pytest.mark.parametrize("size", [0, 50, 700, 3000, 9000, 20_000])
def test_a_full_disk_is_reported_and_what_stood_there_is_intact(
    data: list[str], expected: dict[str, Any], tmp_path: Path, size: int
) -> None:
    """A limit on the size of files stands for the disk: what does not fit cannot be written."""
    folder = tmp_path / "run"
    status, printed = faults.finish(folder, *data, prepare=partial(faults.limit_file_size, size, False))
    assert status == 2
    if size > 50:  # else what is printed, to a file too, cannot be written either
        assert_one_line(printed, "cannot be written")
    assert not any(tmp_path.rglob(".*.tmp"))
    assert faults.finish(folder, *data)[0] == 0
    assert faults.differences(faults.outcome(folder), expected) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_iteration_and_saves(
    data: list[str], expected: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = faults.start(folder, *data, "--checkpoint-every", "1000")
    faults.wait_for_text(folder / "metrics.jsonl", '"iteration": 2,')
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    printed = faults.log(folder).read_text()
    assert "Traceback" not in printed
    assert f"stopped by {number.name}; train_maml --resume --output-dir {folder} goes on after iteration" in printed
    newest = latest_state(folder)
    assert newest is not None
    assert int(newest.stem) >= 2
    assert faults.finish(folder, *data)[0] == 0
    found = faults.outcome(folder)
    assert found["rows"] == expected["rows"]
    assert faults.differences(found["weights"], expected["weights"]) == []


def test_a_validation_that_is_broken_off_is_done_on_resume_and_logged_once(data: list[str], tmp_path: Path) -> None:
    settings = [*data, "--validate-tasks", "200", "--checkpoint-every", "1000"]
    assert faults.finish(tmp_path / "whole", *settings)[0] == 0
    folder = tmp_path / "run"
    process = faults.start(folder, *settings)
    faults.wait_for_text(folder / "metrics.jsonl", '"iteration": 4,')
    process.terminate()
    process.join(60)
    progress = decode(*read_state(folder))["progress"]
    assert (progress["iteration"], progress["validated"], progress["rows"]) == (4, 0, 4)
    process = faults.start(folder, *settings)
    faults.wait_for_text(folder / "metrics.jsonl", "val_accuracy")
    process.kill()
    process.join()
    assert faults.finish(folder, *settings)[0] == 0
    assert faults.differences(faults.outcome(folder)["rows"], faults.outcome(tmp_path / "whole")["rows"]) == []


def test_a_signal_during_the_test_is_heard_at_once(data: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = faults.start(folder, *data, "--test-tasks", "1000000")
    faults.wait_for(folder / STATES / "0000000008.ckpt")
    time.sleep(0.3)
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "after iteration 8 of 8" in faults.log(folder).read_text()
    assert not (folder / "summary.json").exists()


def test_a_second_signal_leaves_at_once(data: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = faults.start(folder, *data, "--meta-batch-size", "3000")
    faults.wait_for(folder / "metrics.jsonl")
    time.sleep(0.5)
    process.terminate()
    time.sleep(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(5)
    assert process.exitcode == -signal.SIGTERM


def assert_one_line(printed: str, message: str) -> None:
    """One line of error after whatever progress was shown."""
    assert "Traceback" not in printed, printed
    error = printed[printed.rindex("error: ") :]
    assert len(error.splitlines()) == 1, printed
    assert message in error


@pytest.mark.parametrize("damaged", ["newest", "both"])
def test_a_damaged_checkpoint(whole: Path, data: list[str], expected: dict[str, Any], tmp_path: Path, damaged: str):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    stored = sorted((folder / STATES).iterdir())
    assert [path.name for path in stored] == ["0000000006.ckpt", "0000000008.ckpt"]
    for path in stored[damaged == "newest" :]:
        path.write_bytes(path.read_bytes()[:-1])
    (folder / "best.safetensors").write_bytes(b"damaged")
    status, printed = faults.finish(folder, *data, "--output-dir", folder)
    if damaged == "both":
        assert status == 2
        assert_one_line(printed, "no checkpoint is left to go on from")
        return
    assert status == 0
    assert re.search(r"warning: .*0000000008\.ckpt is damaged .*going on from the one before it, .*0006\.ckpt", printed)
    assert faults.differences(faults.outcome(folder), expected) == []


def test_two_processes_may_not_train_into_one_folder(data: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = faults.start(folder, *data, "--test-tasks", "1000000")
    faults.wait_for_text(folder / "metrics.jsonl", '"iteration": 1,')
    second = faults.start_logged(tmp_path / "second.log", folder, *data, "--test-tasks", "1000000")
    second.join(60)
    first.terminate()
    first.join(60)
    assert (first.exitcode, second.exitcode) == (128 + signal.SIGTERM, 2)
    assert_one_line((tmp_path / "second.log").read_text(), "another process is training into")
