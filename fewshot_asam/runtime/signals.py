"""Stopping at a good moment: the first signal is a request, one that comes later leaves at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.distributed import PeerLost

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
"""Requests to stop: Ctrl-C, a scheduler, a lost terminal, SLURM's `--signal=USR1@60`, the end of a queue's minutes."""
ECHO = 0.4
"""Seconds in which a signal is the same request once more, as torchrun, a shell and a terminal each send theirs."""


class Stopped(KeyboardInterrupt):
    """A run ended by a signal after its state was saved; `number` is the signal's, the message for the user."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class Stop:
    """Within its `with` block the first signal is remembered and `check` raises `Stopped` where it suits.

    A moment later signals do what they did before the block. Those that were ignored stay so. Signals reach the main
    thread only: in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        self._came = 0.0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if not _is_ignored(number)]
            self._before = {number: signal.signal(number, self._request) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(error, PeerLost):  # what started the job sends a signal then, which must not cut the message
            self._restore()

    def check(self) -> None:
        """Raises `Stopped` if a signal came; with several processes in all of them, if it came to any."""
        if number := int(distributed.all_reduce_max(self.number)):
            raise Stopped(number)

    def _request(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._came = number, time.monotonic()
        elif time.monotonic() > self._came + ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def _is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process wants it to go on, as `nohup` does; the clock is our own."""
    return number != signal.SIGALRM and signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def deadline(minutes: float | None) -> Iterator[None]:
    """Sends this process SIGALRM after so many minutes, if it has not left the `with` block by then."""
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
