"""What stands around a command: standard streams that are closed, full, ASCII or left by their reader, and Ctrl-C."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fewshot_asam.cli import stand_ins

COMMANDS = (*sorted(path.stem for path in Path(__file__).parent.glob("*_maml.py")), "train_classifier")
"""Each is a module of this room with a function `main`."""
QUESTIONS = ("-h", "--help", "--version")
"""What a command answers without computing anything."""
PLAIN = {"±": "+-", "–": "-", "−": "-", "×": "x", "…": "..."}
"""How the characters of results look where only ASCII can be written."""


@contextmanager
def importing() -> Iterator[None]:
    """Within, a command imports what it needs: Ctrl-C or a failure ends it in one line. Others are left alone.

    A command that is only asked what it can do imports stand-ins for the large libraries.
    """
    name = os.path.basename(sys.argv[0]).removesuffix(".py")
    main_thread = threading.current_thread() is threading.main_thread()
    if name not in COMMANDS:
        yield
        return
    heeded = main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    if _is_asked(sys.argv[1:]):
        stand_ins.install()
    try:
        os.getcwd()  # without which PyTorch does not find its own libraries
        yield
    except FileNotFoundError as error:
        _refuse(f"the current folder or a part of the installation is missing ({error}); go to a folder that exists")
    except Exception as error:  # of libraries that read the environment: MPLBACKEND, TORCH_LOGS, TQDM_...
        _refuse(f"a library cannot be imported ({type(error).__name__}: {error}); look at the environment variables")
    finally:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_asked(words: Sequence[str]) -> bool:
    """Whether a command is to say what it can do: to a person, or to a shell that completes a line."""
    question = len(words) == 1 and words[0] in QUESTIONS
    completed = {"_ARGCOMPLETE", "COMP_LINE"} <= os.environ.keys() and find_spec("argcomplete") is not None
    return (question or completed) and "WORLD_SIZE" not in os.environ


def _refuse(message: str) -> NoReturn:
    line = f"error: {' '.join(message.split())}\n"
    with suppress(OSError):
        os.write(2, line.encode("utf-8", "backslashreplace"))
    raise SystemExit(2)


def _leave(*_: object) -> None:
    """Ends this process at once: libraries that are half imported swallow exceptions."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within, nothing that is printed can fail; what cannot be written is dropped."""
    before = sys.stdout, sys.stderr
    _occupy()
    codecs.register_error("plain", _plain)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def lost() -> str:
    """Why something printed to standard output was lost; nothing where all was written, or its reader went away."""
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    return str(error) if error is not None and error.errno != errno.EPIPE else ""


class _Lasting(io.FileIO):
    """A file that takes whatever is written to it; `lost` is the first error."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def end_process(status: int) -> NoReturn:
    """Ends the process with what it has written, but without the interpreter's own end, which may abort it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    os._exit(status)


def _lasting(stream: Any, number: int) -> Any:
    """The same stream, but lasting; one that is not the process's own is as it was."""
    if stream is None:
        file, encoding = _Lasting(os.devnull, "w"), "utf-8"
    elif stream in (sys.__stdout__, sys.__stderr__):
        file, encoding = _Lasting(number, "w", closefd=False), stream.encoding
    else:
        return stream
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, "plain", line_buffering=True)


def _occupy() -> None:
    """Opens the standard descriptors that are closed, which files would get and messages would then be written into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a stream cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(PLAIN.get(one, one.encode("ascii", "backslashreplace").decode()) for one in found), error.end
