"""How many processes share the tasks: cores, quotas, tasks, memory, the length of the work."""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path

import pytest
import torch

import faults
from fewshot_asam import FewShotError
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.runtime.cores import usable_cores
from fewshot_asam.runtime.memory import available_memory, growth
from fewshot_asam.training import processes
from fewshot_asam.training.processes import Processes, choose

CPU = torch.device("cpu")


def groups(root: Path, lines: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("", {}, (8, "8 cores")),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, (2, "a CPU quota of 2.5")),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, (8, "8 cores")),
        ("0::/gone\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, (1, "a CPU quota of 0.5")),
        (
            "5:memory:/m\n4:cpu,cpuacct:/job\n",
            {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"},
            (3, "a CPU quota of 3"),
        ),
        (
            "4:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            (8, "8 cores"),
        ),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "torn"}, (8, "8 cores")),
    ],
)
def test_the_cores_that_may_be_used(
    lines: str, files: dict[str, str], expected: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores(16, groups(tmp_path, lines, files)) == expected


def test_threads_that_were_asked_for_are_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores(1, tmp_path) == (1, "1 PyTorch thread")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert usable_cores(1, tmp_path) == (1, "OMP_NUM_THREADS=1")


def test_the_memory_that_is_available(tmp_path: Path) -> None:
    groups(tmp_path, "0::/a\n", {"proc/meminfo": "MemFree: 1 kB\nMemAvailable: 1000 kB\n"})
    assert available_memory(tmp_path) == 1000 * 1024
    limits = {"memory.max": "900000", "memory.current": "500000", "memory.stat": "anon 1\ninactive_file 100000\n"}
    groups(tmp_path, "0::/a\n", {f"sys/fs/cgroup/a/{name}": text for name, text in limits.items()})
    assert available_memory(tmp_path) == 900_000 - 400_000
    (tmp_path / "sys/fs/cgroup/a/memory.current").write_text("2000000")
    assert available_memory(tmp_path) == 0
    assert 0 < available_memory() < 1 << 50


def test_what_work_takes_at_its_height() -> None:
    size = 64 << 20

    def work() -> None:  # in new pages, as the allocator may have kept some that others freed
        memory = mmap.mmap(-1, size)
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1

    assert 0.9 * size < growth(work) < 1.5 * size


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores, and a process that has no thread but those of the test."""
    others, found = set(threading.enumerate()) - {threading.current_thread()}, threading.enumerate
    monkeypatch.setattr(threading, "enumerate", lambda: [one for one in found() if one not in others])
    monkeypatch.setattr(processes, "usable_cores", lambda _: (8, "8 cores"))


def chosen(at_once: int = 100, total: int = 10**6, seconds: float = 1e-3) -> Processes:
    return choose("auto", CPU, at_once, total, False, lambda: time.sleep(seconds))


def test_the_number_goes_by_all_of_these(eight: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == (8, "8 cores")
    assert chosen(at_once=4) == (4, "4 tasks in a batch")
    assert chosen(total=10) == (1, "all tasks take about 0.0 s")
    for there, expected in ((0, 1), (250, 3), (10**6, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(processes, "growth", lambda work: 100)
            patch.setattr(processes, "available_memory", lambda there=there: there)
            assert chosen().number == expected
    assert choose("auto", torch.device("cuda"), 8, 10**6, False, pytest.fail).reason == "the tasks are on a GPU"
    assert choose("auto", CPU, 8, 10**6, True, pytest.fail).number == 1
    assert choose(5, CPU, 8, 1, True, pytest.fail) == (5, "as asked")
    monkeypatch.setattr(processes, "AVAILABLE", False)
    assert chosen() == (1, "processes share tasks on Linux alone")


def test_a_program_with_threads_of_its_own_is_not_forked(eight: None) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert chosen() == (1, "this program has other threads, so it is not forked unless told to")
    finally:
        done.set()
        thread.join()
    assert chosen().number == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--processes", "0"), "processes is 0; expected auto, or 1 to 1,024"),
        (("--processes", "few"), "processes"),
        (("--processes", "3", "--meta-batch-size", "2"), "processes is 3, but there are 2 tasks in a batch"),
    ],
)
def test_numbers_that_cannot_be(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = faults.write_images(tmp_path / "images")
    argv = [*faults.RUN, "--data-root", str(images), "--output-dir", str(tmp_path / "run"), *words]
    assert train_maml.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_job_or_a_gpu_has_no_processes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewShotError, match="the device is cuda"):
        choose(2, torch.device("cuda"), 8, 1, False, pytest.fail)
    monkeypatch.setattr("fewshot_asam.runtime.distributed.size", lambda: 2)
    with pytest.raises(FewShotError, match="one process of a job already"):
        choose(2, CPU, 8, 1, False, pytest.fail)
    assert choose("auto", CPU, 8, 10**6, False, pytest.fail).number == 1


def test_a_test_by_several_processes_is_that_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = faults.write_images(tmp_path / "images")
    words = [*faults.RUN, "--data-root", str(images), "--keep-snapshots", "true", "--output-dir", str(tmp_path / "run")]
    assert train_maml.main(words) == 0
    run = [str(tmp_path / "run"), "--tasks", "21", "--ensemble", "2", "--permutations", "2"]
    said = []
    for number in ("1", "2"):
        capsys.readouterr()
        assert eval_maml.main([*run, "--processes", number]) == 0
        said.append(capsys.readouterr())
    assert said[1].err == "2 processes of 1 thread share the tasks: as asked\n"
    assert "test accuracy" in said[0].out
    assert said[0].out == said[1].out
