"""Commands whose standard streams, environment and signals are not as usual: they say so or go on, and lose nothing."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import faults
from fewshot_asam.cli import surroundings
from fewshot_asam.cli.surroundings import lasting_streams
from fewshot_asam.runtime.cache_folder import cache_dir
from fewshot_asam.runtime.signals import ECHO, Stop, Stopped
from fewshot_asam.training.checkpoint import decode, read_state

COMMANDS = ["train_maml", "eval_maml", "predict_maml", "reproduce_maml"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data-root", str(faults.write_images(tmp_path_factory.mktemp("images")))]


@pytest.fixture(scope="module")
def expected(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    assert faults.finish(folder, *data)[0] == 0
    return faults.outcome(folder)


def shell(redirections: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python with a shell's redirections."""
    line = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("redirections", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_neither_stop_a_run_nor_let_messages_into_its_files(
    redirections: str, data: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    words = [*faults.RUN, *data, "--output-dir", tmp_path / "run"]
    done = shell(redirections, "-m", "fewshot_asam.cli.train_maml", *words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert ("test accuracy" in done.stdout) == ("1" not in redirections.replace("2>&-", "").replace(">&-", "1"))
    assert faults.differences(faults.outcome(tmp_path / "run"), expected) == []


def leave_the_reader() -> None:
    """Standard output and error are a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def fill_the_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_a_reader_that_goes_away_changes_nothing(data: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    assert faults.finish(tmp_path / "run", *data, prepare=leave_the_reader)[0] == 0
    assert faults.differences(faults.outcome(tmp_path / "run"), expected) == []


def test_a_result_that_cannot_be_written_is_said_after_the_run(
    data: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    status, printed = faults.finish(tmp_path / "run", *data, prepare=fill_the_disk)
    assert status == 2
    assert printed.splitlines()[-1].startswith("error: standard output cannot be written")
    assert "No space left" in printed
    assert faults.differences(faults.outcome(tmp_path / "run"), expected) == []


ODD = """
from fewshot_asam.cli.surroundings import lasting_streams
with lasting_streams():
    print("42 % ± 1, 3 − 2 – × ü \\udcff")
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"42 % +- 1, 3 - 2 - x \\xfc \\udcff\n"),
        ("latin-1", b"42 % \xb1 1, 3 - 2 - \xd7 \xfc \\udcff\n"),
        ("utf-8", "42 % ± 1, 3 − 2 – × ü ".encode() + b"\\udcff\n"),
    ],
)
def test_what_a_terminal_cannot_show_is_written_otherwise(encoding: str, shown: bytes) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    assert subprocess.run([sys.executable, "-c", ODD], capture_output=True, env=environment).stdout == shown


def test_streams_are_restored_and_those_of_others_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with lasting_streams():
        assert (sys.stdout, sys.stderr) == before
        print("±")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "±\n"


CTRL_C = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (CTRL_C, 130, "interrupted\n"),
        ("raise ValueError('Key backend:\\n garbage')", 2, "(ValueError: Key backend: garbage)"),
        ("import torch.nothing", 2, "(ModuleNotFoundError: No module named 'torch.nothing')"),
    ],
    ids=["Ctrl-C", "a bad variable", "a broken installation"],
)
def test_what_happens_while_a_command_imports(command: str, code: str, status: int, said: str, tmp_path: Path) -> None:
    """With a stand-in for PyTorch, the first library to be imported; it may swallow exceptions."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    root = Path(surroundings.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    words = [sys.executable, "-m", f"fewshot_asam.cli.{command}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f'cd {gone} && rmdir {gone} && exec "$0" -m fewshot_asam.cli.eval_maml run'
    environment = {**os.environ, "PYTHONPATH": str(Path(surroundings.__file__).parents[2])}
    done = subprocess.run(
        ["sh", "-c", line, sys.executable], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the current folder")
    assert len(done.stderr.splitlines()) == 1


def test_importing_a_command_elsewhere_leaves_ctrl_c_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    with surroundings.importing():
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_or_a_scheduler_s_warning_saves(
    number: signal.Signals, data: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = faults.start(folder, *data, "--iterations", 1000, "--checkpoint-every", 1000)
    faults.wait_for_text(folder / "metrics.jsonl", '"iteration": 2,')
    assert process.pid is not None
    os.kill(process.pid, number)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert f"stopped by {number.name}" in faults.log(folder).read_text()
    assert decode(*read_state(folder))["progress"]["iteration"] >= 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_what_was_ignored_stays_so(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(number)
            stop.check()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_the_echo_of_a_signal_is_the_same_request_and_a_later_one_leaves() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        time.sleep(ECHO + 0.05)
        with pytest.raises(KeyboardInterrupt) as left:
            signal.raise_signal(signal.SIGINT)
        assert not isinstance(left.value, Stopped)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.number == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "FEWSHOT_ASAM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_dir() == tmp_path / f"fewshot_asam-{os.getuid()}"
