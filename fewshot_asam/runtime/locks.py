"""One process at a time in a run folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fewshot_asam.errors import FewShotError

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file that is locked where the file system cannot lock a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when the process ends, however it ends.

    The folder itself is locked, so that no file is made and removing one lets nobody in; network file systems that
    cannot do that lock `LOCK` in it. Raises `FewShotError` where another process holds the lock.
    """
    descriptor = _descriptor(folder)
    try:
        if descriptor is not None and _locked(descriptor, folder):
            yield
            return
    finally:
        if descriptor is not None:
            os.close(descriptor)
    with _file_locked(folder):
        yield


def _descriptor(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise FewShotError(f"the run folder {folder} cannot be opened ({error})") from error


def _locked(descriptor: int, folder: Path) -> bool:
    """Whether the folder is locked now, and not of a kind that cannot be."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _taken(folder) from error
    except OSError:
        return False
    return True


@contextmanager
def _file_locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise _taken(folder) from error
    except (OSError, NotImplementedError) as error:
        raise FewShotError(
            f"the run folder {folder} cannot be written ({error}); choose another --output-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _taken(folder: Path) -> FewShotError:
    return FewShotError(f"another process is training into {folder}; choose another folder")
