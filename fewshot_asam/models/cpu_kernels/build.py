"""Compiles the C++ files of this folder with the system's C++ compiler, once a machine, and loads what came out.

What the cache holds is code: it is loaded only from files of our own, whole, and as a copy in memory that nothing can
change afterwards. Whatever goes wrong ends in one warning, and is tried again by the next process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from fewshot_asam.models.cpu_kernels import private_files
from fewshot_asam.models.cpu_kernels.signatures import declare
from fewshot_asam.runtime.cache_folder import cache_dir

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("winograd.cpp", "norm_relu_pool.cpp", "input_block.cpp"))
FLAGS = ("-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fPIC", "-shared")
TUNED = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-fopenmp",),
    (),
)
"""Tried in this order: not every compiler knows every flag."""
SECONDS = 120
LAST_MOMENTS = 50
"""Tenths of a second that a compiler has to end in when nobody waits for it any more."""
PROBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
shape, padded, found = (ctypes.c_int64 * 6)(1, 4, 4, 1, 1, 1), (ctypes.c_double * 36)(), (ctypes.c_double * 144)()
library.first_moments_1_double(shape, padded, found)
"""
"""Run in a process of its own: a broken library, or one for another processor, ends the process that loads it."""

_one_at_a_time = threading.Lock()
_running: list[subprocess.Popen[bytes]] = []
_given_up = threading.Event()


class _GivenUp(Exception):
    """Nobody waits for the compiler any more."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, with a warning, where they cannot be built or loaded."""
    with _one_at_a_time:
        return _library()


@cache
def winograd_is_fast() -> bool:
    """Whether the compiled convolutions are, which they are with the processor's vectors alone."""
    found = library()
    return found is not None and bool(ctypes.c_int.in_dll(found, "winograd_is_fast").value)


@contextmanager
def begun() -> Iterator[None]:
    """Compiles, if that has to be done, while the `with` block does something else, and has ended when that ends."""

    def work() -> None:
        with suppress(Exception):  # a warning that is an error is met again where the functions are needed
            library()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
        thread.join()
    except BaseException:
        _given_up.set()
        for _ in range(LAST_MOMENTS):
            for process in list(_running):  # one may only now have been started
                _end(process)
            thread.join(0.1)
            if not thread.is_alive():
                break
        _given_up.clear()
        raise


@cache
def _library() -> ctypes.CDLL | None:
    found, warning = find()
    if warning:
        warnings.warn(_line(warning), stacklevel=3)
    return found


def find() -> tuple[ctypes.CDLL | None, str]:
    """The functions from the cache, else freshly compiled, else None; and what has to be said about that."""
    try:
        if os.name != "posix":
            raise OSError("they need a POSIX system")
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        path = cache_dir() / "fused" / _name(compiler)
        try:
            return _loaded(private_files.read(path)), ""
        except FileNotFoundError:
            warning = ""
        except OSError as error:
            warning = f"convolutional blocks were compiled anew: {error}"
        content, found = _compiled(compiler)
    except (OSError, ValueError) as error:
        return None, f"convolutional blocks run unfused, which is slower: {error}"
    try:
        private_files.write(path, content)
    except OSError as error:
        warning = f"convolutional blocks were compiled for this process alone, which takes a while each time: {error}"
    return found, warning


def _line(text: str) -> str:
    """One line that every terminal can show, whatever a compiler printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _name(compiler: list[str]) -> str:
    code = [path.read_bytes() for path in (*SOURCES, *sorted(HERE.glob("*.h")))]
    key = repr((code, FLAGS, TUNED, PROBE, compiler, _processor()))
    return f"blocks-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _loaded(content: bytes) -> ctypes.CDLL:
    """The library from a copy of our own, which nobody can write to or cut short while it is in use."""
    if Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create("fewshot_asam")  # stays open: the loader knows libraries by their paths
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        return declare(ctypes.CDLL(f"/proc/{os.getpid()}/fd/{descriptor}"))
    with private_files.temporary_folder() as folder:
        path = folder / "blocks.so"
        path.write_bytes(content)
        return declare(ctypes.CDLL(str(path)))


def _compiled(compiler: list[str]) -> tuple[bytes, ctypes.CDLL]:
    """The library's content, and the library."""
    failure = OSError()
    for flags in TUNED:
        try:
            content = _output([*compiler, *FLAGS, *flags, *map(str, SOURCES)])
            return content, _loaded(content)
        except TimeoutError:
            raise
        except OSError as error:
            failure = error
    raise failure


def _output(command: list[str]) -> bytes:
    """The library that a command makes, once it was seen to run."""
    with private_files.temporary_folder() as folder:
        target = folder / "blocks.so"
        status, printed = _run([*command, "-o", str(target)])
        if status:
            raise OSError(f"{command[0]} failed with status {status}: {printed[:200]}")
        if not target.is_file():
            raise OSError(f"{command[0]} wrote no library")
        status, _ = _run([sys.executable, "-I", "-c", PROBE, str(target)])
        if status:
            raise OSError(f"what {command[0]} wrote does not run here")
        return target.read_bytes()


def _run(command: list[str]) -> tuple[int, str]:
    """The exit status and the start of what was printed; when it has ended, or our patience has, its children end."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    _running.append(process)
    printed = bytearray()
    reader = threading.Thread(target=_read, args=(process.stdout, printed), daemon=True)
    reader.start()
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} did not end within {SECONDS} seconds") from None
    finally:
        _end(process)
        process.wait()
        _running.remove(process)
        reader.join(1)  # what left the group could keep the pipe open
    if _given_up.is_set():
        raise _GivenUp
    return status, printed.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(stream: Any, start: bytearray) -> None:
    """Puts the start of a stream into `start` and drops the rest, so that it fills neither memory nor disk."""
    with stream:
        while part := stream.read1(65536):
            start += part[: 1000 - len(start)]


def _processor() -> str:
    """What `-march=native` depends on, for caches that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
