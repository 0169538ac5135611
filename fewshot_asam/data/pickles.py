"""Reading pickles of plain data and numpy arrays without giving the file a way to run code, or to run for ever."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from fewshot_asam.data.pickle_machine import MOST, Machine
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.files import open_regular

PLAIN = "only numpy arrays, dict, list, tuple, str, bytes, int, float, bool and None"
DEEPEST = 50
"""Levels of lists, tuples and dicts in one another."""
_SCALARS = (np.ndarray, np.generic, str, bytes, int, float, type(None))


def load_plain(path: Path) -> object:
    """The content of a pickle, of any protocol and of Python 2 or 3, that holds plain data and numpy arrays.

    Every name that the pickle asks for is refused, except those that arrays are made of; and those do not give it
    numpy's own functions, but stand-ins that check what they are given. The `str` of Python 2 is read as latin1.
    Arrays are read-only; keys of a dict are `str`, `bytes` or `int`.

    Raises `FewShotError` where the file asks for anything else, is truncated or damaged, claims sizes that it does
    not hold, holds itself or more than anyone could go through, or cannot be opened.
    """
    with _named(path), open_regular(path) as file:
        return _content(file, os.fstat(file.fileno()).st_size)


def parse_plain(pickle: bytes, name: str) -> object:
    """The same of a pickle in memory; `name` is what an error calls it."""
    with _named(name):
        return _content(io.BytesIO(pickle), len(pickle))


def stream_plain(path: Path) -> Iterator[object]:
    """The parts of the list that a pickle is, one after the other, of which it keeps none.

    A part that is given again, as a reference to an earlier one, is refused as well. Raises as `load_plain` does, when
    the pickle is gone through.
    """
    with _named(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        for part in Machine(size).parts(_bounded(file, size)):
            _require_plain(part)
            yield part


@contextmanager
def _named(origin: object) -> Iterator[None]:
    """Within, whatever goes wrong is said of `origin` in one line."""
    try:
        yield
    # What a damaged pickle raises is open-ended: any of its opcodes may meet any object.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FewShotError(
            f"{origin} cannot be read as plain data ({reason}); expected a complete pickle of {PLAIN}"
        ) from error


def _content(file: BinaryIO, size: int) -> object:
    content = Machine(size).run(_bounded(file, size))
    _require_plain(content)
    return content


def _bounded(file: BinaryIO, size: int) -> Any:
    """The file as `pickletools` reads it; without the bound, what a text claims to have is allocated at first."""
    return SimpleNamespace(read=lambda count: file.read(min(count, size)), readline=file.readline)


def _require_plain(content: object) -> None:
    """Raises unless `content` is plain to its last part, and small enough to be gone through part by part."""
    level = [content]
    for _ in range(DEEPEST):
        level = list(islice(chain.from_iterable(map(_parts, level)), MOST + 1))
        if not level:
            return
        if len(level) > MOST:
            raise UnpicklingError(f"it holds more than {MOST:,} parts")
    raise UnpicklingError(f"it is nested more than {DEEPEST} deep")


def _parts(value: object) -> list[object] | tuple[object, ...]:
    if type(value) in (list, tuple):
        return value  # type: ignore[return-value]
    if type(value) is dict:
        return [*value, *value.values()]
    if isinstance(value, _SCALARS):
        return ()
    raise UnpicklingError(f"it holds a {type(value).__name__.strip('_')}")
