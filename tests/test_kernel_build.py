"""The compiled block's cache and compiler: what is wrong ends in one line, nothing foreign or damaged is loaded."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewshot_asam.models import cpu_kernels
from fewshot_asam.models.cpu_kernels import build, private_files

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")

CONV4 = (
    "import torch; from fewshot_asam.models import build_model; m = build_model('conv4', 3, (1, 16, 16), 4, 0); "
    "print(m(torch.ones(2, 1, 16, 16)).shape)"
)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library as the real compiler makes it."""
    path = tmp_path_factory.mktemp("genuine") / "blocks.so"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    path.write_bytes(private_files.read(build.cache_dir() / "fused" / build._name(compiler)))
    return path


@pytest.fixture
def stub(genuine: Path, tmp_path: Path) -> Path:
    """A library that loads and has none of the functions."""
    path = tmp_path / "stub.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-o", str(path)], check=True)
    return path


class Compiler:
    """A shell script in the place of the compiler, which counts how often it was started."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "compiler", folder / "log"

    def becomes(self, script: str) -> None:
        self.path.write_text(f"#!/bin/sh\necho >> {self.log}\nfor out; do :; done\n{script}\n")
        self.path.chmod(0o755)
        self.forget()

    def forget(self) -> None:
        self.log.write_text("")

    @property
    def runs(self) -> int:
        return len(self.log.read_text())


@pytest.fixture
def compiler(genuine: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """One that gives out the genuine library."""
    made = Compiler(tmp_path)
    made.becomes(f'cp {genuine} "$out"')
    monkeypatch.setenv("CXX", str(made.path))
    return made


@pytest.fixture
def stored(compiler: Compiler, own_cache: Path) -> Path:
    """The library in a cache of the test's own."""
    assert build.find()[1] == ""
    (path,) = (own_cache / "fused").iterdir()
    return path


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    os.chown(path, 12345, -1, follow_symlinks=False)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, 5000), "is damaged"),
    "one byte short": (lambda path: os.truncate(path, path.stat().st_size - 1), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "flipped": (lambda path: path.write_bytes(path.read_bytes().replace(b"tail", b"tall", 1)), "is damaged"),
    "garbage": (lambda path: path.write_bytes(os.urandom(10_000)), "is damaged"),
    "of another name": (
        lambda path: (private_files.write(path.with_name("other"), b"x"), path.with_name("other").rename(path)),
        "is damaged",
    ),
    "a link": (link, "symbolic links"),
    "a pipe": (lambda path: replace(path, os.mkfifo), "is not a file"),
    "open to the group": (lambda path: path.chmod(0o664), "other users can write to .*chmod go-w"),
    "open to all": (lambda path: path.chmod(0o646), "other users can write to .*chmod go-w"),
    "a stranger's": (give_away, "belongs to another user"),
    "without functions": (
        lambda path: private_files.write(path, (path.parents[2] / "stub.so").read_bytes()),
        "no function",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_library_that_is_wrong_is_compiled_anew_once(stub: Path, stored: Path, compiler: Compiler, name: str) -> None:
    spoil, reason = SPOILS[name]
    spoil(stored)
    compiler.forget()
    library, warning = build.find()
    assert library is not None
    assert warning.startswith("convolutional blocks were compiled anew: ")
    assert re.search(reason, warning)
    assert build.find()[1] == ""
    assert compiler.runs == 1
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]


def test_a_stored_library_needs_no_compiler(stored: Path, compiler: Compiler) -> None:
    compiler.becomes("exit 1")
    library, warning = build.find()
    assert library is not None
    assert warning == ""
    assert compiler.runs == 0


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the folder is open to all": (lambda cache: (cache / "fused").chmod(0o777), "other users can write"),
    "the folder is open to the group": (lambda cache: (cache / "fused").chmod(0o770), "other users can write"),
    "the cache is open to all": (lambda cache: cache.chmod(0o777), "other users can write"),
    "the cache is open to all, sticky": (lambda cache: cache.chmod(0o1777), "other users can write"),
    "the folder is a stranger's": (lambda cache: give_away(cache / "fused"), "belongs to another user"),
    "the cache is a stranger's": (give_away, "belongs to another user"),
    "the folder is a link": (lambda cache: link(cache / "fused"), "fused"),
    "the folder is a file": (
        lambda cache: ((cache / "fused").rename(cache.parent / "old"), (cache / "fused").touch()),
        "Not a directory",
    ),
    "the cache is a file": (lambda cache: (cache.rename(cache.parent / "old"), cache.touch()), "File exists"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_is_loaded_from_a_folder_of_others_nor_written_there(
    stored: Path, own_cache: Path, compiler: Compiler, name: str
) -> None:
    spoil, reason = FOLDERS[name]
    spoil(own_cache)
    before = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")}
    compiler.forget()
    library, warning = build.find()
    assert library is not None
    assert "compiled for this process alone" in warning
    assert reason in warning
    assert compiler.runs == 1
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*")} == before


def test_a_cache_that_is_a_link_of_ours_is_used(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    monkeypatch.setenv("FEWSHOT_ASAM_CACHE", str(tmp_path / "link"))
    assert [build.find()[1], build.find()[1]] == ["", ""]
    assert compiler.runs == 1


def test_a_full_disk_costs_the_storing_alone(
    compiler: Compiler, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    library, warning = build.find()
    assert library is not None
    assert "No space left" in warning
    assert not any((own_cache / "fused").iterdir())


def test_nothing_is_compiled_where_others_can_exchange_it(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    library, warning = build.find()
    assert library is None
    assert "set TMPDIR" in warning
    assert compiler.runs == 0
    tmp_path.chmod(0o1777)
    assert build.find()[1] == ""


def test_other_systems_load_a_file(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without `/proc`."""
    genuine = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) != "/proc/self/fd" and genuine(path))
    monkeypatch.delattr(os, "memfd_create")
    library, warning = build.find()
    assert library is not None
    assert warning == ""


COMPILERS = {
    "fails": ("echo no such flag >&2; exit 3", "no such flag"),
    "prints binary": (r"printf '\377\376\033[31m\000bad\n' >&2; exit 1", "bad"),
    "is killed": ("kill -9 $$", "failed with status -9"),
    "writes nothing": ("exit 0", "wrote no library"),
    "writes a folder": ('mkdir "$out"', "wrote no library"),
    "writes a pipe": ('mkfifo "$out"', "wrote no library"),
    "writes garbage": ('echo garbage > "$out"', "does not run here"),
    "writes nothing into a file": (': > "$out"', "does not run here"),
    "writes half of it": ('head -c 5000 {genuine} > "$out"', "does not run here"),
    "leaves the functions out": ('cp {stub} "$out"', "does not run here"),
    "hangs": ("sleep 1000 & echo $! > {pid}; wait", "did not end within 0.5 seconds"),
    "leaves a process behind": ("sleep 1000 & echo $! > {pid}; exit 1", "failed with status 1"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_bad_compiler_costs_the_fused_block_and_one_line(
    compiler: Compiler, genuine: Path, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(build, "SECONDS", 0.5 if name == "hangs" else 30)
    script, reason = COMPILERS[name]
    compiler.becomes(script.format(genuine=genuine, stub=stub, pid=tmp_path / "pid"))
    library, warning = build.find()
    assert library is None
    assert warning.startswith("convolutional blocks run unfused, which is slower: ")
    assert reason in warning
    if name == "hangs":
        assert compiler.runs == 1
    if "{pid}" in script:
        assert ended(int((tmp_path / "pid").read_text()))
    compiler.becomes(f'cp {genuine} "$out"')
    library, warning = build.find()
    assert library is not None
    assert warning == ""


def test_what_a_compiler_prints_without_end_fills_no_disk(compiler: Compiler, genuine: Path, tmp_path: Path) -> None:
    compiler.becomes(
        f'head -c 3000000 /dev/zero; exec 3>&1; stat -L -c %s /dev/fd/3 > {tmp_path / "kept"}; cp {genuine} "$out"'
    )
    library, warning = build.find()
    assert library is not None
    assert warning == ""
    assert int((tmp_path / "kept").read_text()) == 0


def ended(pid: int) -> bool:
    """Whether a process is gone, or will be in a moment."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no-such-compiler", "No such file"),
        ("/", "Permission denied"),
        ("'unbalanced", "No closing quotation"),
        ("/dev/null", "Permission denied"),
    ],
)
def test_what_is_no_compiler_is_named(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", value)
    library, warning = build.find()
    assert library is None
    assert reason in warning


@pytest.mark.parametrize("value", ["{} -O1", "env A=1 {}", "'{}'", "  {}  "])
def test_the_compiler_may_have_flags(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CXX", value.format(compiler.path))
    library, warning = build.find()
    assert library is not None
    assert warning == ""
    assert compiler.runs == 1


def test_flags_that_give_a_broken_library_are_left_out(compiler: Compiler, genuine: Path) -> None:
    compiler.becomes(f'case "$*" in *native*) echo garbage > "$out";; *) cp {genuine} "$out";; esac')
    library, warning = build.find()
    assert library is not None
    assert warning == ""
    assert compiler.runs == 3


def run(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cpu_kernels.__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_damaged_library_ends_no_process(stored: Path) -> None:
    os.truncate(stored, 5000)
    process = run(CONV4)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "torch.Size([2, 3])" in out
    assert errors.count("compiled anew") == 1
    assert "unfused" not in errors


def test_a_library_in_use_may_be_cut_short(stored: Path) -> None:
    code = f"{CONV4}; import os; os.truncate({str(stored)!r}, 0); print(m(torch.ones(2, 1, 16, 16)).shape)"
    process = run(code)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert out.count("torch.Size([2, 3])") == 2


def test_two_processes_compile_at_once(compiler: Compiler, genuine: Path, own_cache: Path) -> None:
    compiler.becomes(f'sleep 1; cp {genuine} "$out"')
    code = "from fewshot_asam.models.cpu_kernels import build; print(build.find())"
    processes = [run(code), run(code)]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "CDLL" in out
        assert out.rstrip().endswith("'')")
    assert len(list((own_cache / "fused").iterdir())) == 1
    assert build.find()[1] == ""


def test_the_compiler_works_while_something_else_is_done(
    compiler: Compiler, genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    monkeypatch.setattr(build, "library", lambda: found.append(build.find()[0]))
    go_on = tmp_path / "go on"
    compiler.becomes(f'while [ ! -e {go_on} ]; do sleep 0.01; done; cp {genuine} "$out"')
    with build.begun():
        while not compiler.runs:
            time.sleep(0.01)
        assert found == []
        go_on.touch()
    assert len(found) == 1
    assert found[0] is not None


@pytest.mark.parametrize("delay", [0.0, 1.5])
def test_what_interrupts_ends_the_compiler_too(
    delay: float, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it is being started, which takes long on a busy machine."""

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            time.sleep(delay)

    monkeypatch.setattr(build.subprocess, "Popen", Started)
    monkeypatch.setattr(build, "library", build.find)
    pid = tmp_path / "pid"
    compiler.becomes(f"echo $$ > {pid}; sleep 60")

    def interrupted() -> None:
        with build.begun():
            while not pid.exists() or not pid.read_text():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert compiler.runs == 1  # no other flags are tried
    assert ended(int(pid.read_text()))
