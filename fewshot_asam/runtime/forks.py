"""Forks of this process that answer requests: each has all that this process had when it was made.

They compute and nothing else. Signals are this process's business, no file of it stays open in them, and none outlives
it. What goes to and fro in numbers lies in memory that all share. Linux alone.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from fewshot_asam.runtime.signals import SIGNALS

AVAILABLE = sys.platform == "linux"
LARGEST = 1 << 36
"""Bytes of address space that is shared; memory is taken for what is written alone."""
LONGEST_START = 20.0
"""Seconds in which a fork has to answer for the first time."""
ALIGNMENT = 64
PR_SET_PDEATHSIG = 1
MAP_NORESERVE = 0x4000
Place = tuple[int, torch.dtype, tuple[int, ...]]
"""Where a tensor lies in the shared memory: its first byte, type and shape."""


class SharedMemory:
    """Memory that this process and its later forks have in common; raises `OSError` where there is none."""

    def __init__(self) -> None:
        if not AVAILABLE:
            raise OSError(f"memory is not shared with forks on {sys.platform}")
        self._map = mmap.mmap(-1, LARGEST, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._end = 0

    def clear(self) -> None:
        """Forgets all places."""
        self._end = 0

    def place(self, dtype: torch.dtype, shape: Sequence[int]) -> Place:
        """Room for a tensor; raises `MemoryError` where none is left."""
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._end = start + dtype.itemsize * torch.Size(shape).numel()
        if self._end > LARGEST:
            raise MemoryError("the shared memory is full")
        return start, dtype, tuple(shape)

    def put(self, value: Tensor) -> Place:
        """A copy of a tensor, and where it lies."""
        place = self.place(value.dtype, value.shape)
        self.at(place).copy_(value.detach())
        return place

    def at(self, place: Place) -> Tensor:
        """The tensor that lies there; no copy."""
        start, dtype, shape = place
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)


class Fork:
    """One of them. `ask` gives it a request, `answer` waits for what `serve` made of it."""

    def __init__(self, serve: Callable[[Any], Any]) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        parent = os.getpid()
        with warnings.catch_warnings():  # Python 3.12 warns of C libraries' threads too, which a fork does without
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _live(parent, theirs, serve)
        theirs.close()

    def ask(self, request: Any) -> None:
        """Raises `OSError` where it has ended."""
        self._ours.send_bytes(pickle.dumps(request))

    def answer(self, seconds: float | None = None) -> Any:
        """Waits for the answer, at most so long; raises `EOFError` or `OSError` where none will come."""
        if not self._ours.poll(seconds):
            raise TimeoutError(f"no answer within {seconds:g} s")
        return pickle.loads(self._ours.recv_bytes())

    def end(self, patience: float = 0.0) -> int:
        """Ends it. **Returns:** the number of the signal that had ended it before, or 0.

        **Arguments:**

        - `patience`: seconds in which it may end by itself: its pipe is closed before the system says how it ended.
        """
        status, latest = 0, time.monotonic() + patience
        with suppress(OSError):
            self._ours.close()
        with suppress(OSError):  # reaped by somebody else
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            while not ended and time.monotonic() < latest:
                time.sleep(0.001)
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            if not ended:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        return status & 0x7F


def forks(count: int, serve: Callable[[Any], Any]) -> list[Fork]:
    """So many of them, each of which has answered `None`; raises `OSError` where the system has none to give."""
    made: list[Fork] = []
    try:
        for _ in range(count):
            made.append(Fork(serve))
        for one in made:
            one.ask(None)
        for one in made:
            one.answer(LONGEST_START)
    except BaseException as error:
        for one in made:
            one.end()
        if isinstance(error, EOFError):
            raise OSError("a process ended as soon as it was started") from error
        raise
    return made


def _live(parent: int, pipe: Connection, serve: Callable[[Any], Any]) -> None:
    """What a fork does; it never returns."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            return
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor != pipe.fileno():
                with suppress(OSError):
                    os.close(descriptor)
        warnings.simplefilter("ignore")  # the same are given in the first process
        torch.set_num_threads(1)
        while True:
            pipe.send_bytes(pickle.dumps(serve(pickle.loads(pipe.recv_bytes()))))
    except BaseException:
        return
    finally:
        os._exit(0)
