"""Opening files that other people name: only what is a file is opened, so that no pipe or device is waited for."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file at `path`, opened for reading bytes.

    Raises `OSError` where it cannot be opened, and at once where it is a folder, a named pipe, a socket or a device.
    """
    return open(path, "rb", opener=_open)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raises `OSError` as `open_regular` does; for files that a library opens by their names."""
    with open_regular(path):
        pass


def _open(path: str, flags: int) -> int:
    _require_file(os.stat(path))
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _require_file(os.fstat(descriptor))  # it may have become a pipe since
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_file(status: os.stat_result) -> None:
    """Raises for what may never end; a folder is refused by `open` itself."""
    if kind := _KINDS.get(stat.S_IFMT(status.st_mode)):
        raise OSError(f"it is {kind}, not a file")
