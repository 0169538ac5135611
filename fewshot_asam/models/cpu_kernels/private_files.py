"""Files in the cache folder that nobody but their owner can have written, whole or damaged: then it is said."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DIGEST = hashlib.sha256().digest_size
OTHERS = stat.S_IWOTH
OTHERS_OR_GROUP = stat.S_IWOTH | stat.S_IWGRP


def read(path: Path) -> bytes:
    """What `write` wrote; an `OSError` where somebody else can have, or where the file is damaged.

    The folder and the file are opened once, then looked at and read: they cannot be exchanged in between.
    """
    with _opened(path.parent) as folder:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # neither a link nor a pipe that waits for a writer
        file = os.open(path.name, flags, dir_fd=folder)
    try:
        status = os.fstat(file)
        _require_ours(path, status, OTHERS_OR_GROUP)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a file")
        with open(file, "rb", closefd=False) as stream:
            content = stream.read()
    finally:
        os.close(file)
    body, digest = content[:-DIGEST], content[-DIGEST:]
    if digest != _digest(path.name, body):
        raise OSError(f"{path} is damaged")
    return body


def write(path: Path, body: bytes) -> None:
    """Writes `body` and its digest, whole or not at all, into a folder that nobody else can write into."""
    path.parent.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o755)
    with _opened(path.parent) as folder:
        temporary = f"{path.name}.{secrets.token_hex(8)}"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)
        try:
            with open(file, "wb") as stream:
                stream.write(body + _digest(path.name, body))
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new one, where nobody can put another in its place."""
    parent = Path(tempfile.gettempdir())
    mode = parent.stat().st_mode
    if mode & OTHERS and not mode & stat.S_ISVTX:
        raise OSError(f"other users can exchange what is in {parent}; set TMPDIR to a folder of your own")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _digest(name: str, body: bytes) -> bytes:
    """The name is part of it, so that no file passes for another."""
    return hashlib.sha256(name.encode() + b"\0" + body).digest()


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder that is ours, in a cache folder that is.

    A group may write into the cache folder, as with a umask of 002: who exchanges the folder within it, which is opened
    here and looked at afterwards, cannot make it ours.
    """
    _require_ours(folder.parent, os.stat(folder.parent), OTHERS)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _require_ours(folder, os.fstat(descriptor), OTHERS_OR_GROUP)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_ours(path: Path, status: os.stat_result, forbidden: int) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & forbidden:
        raise OSError(f"other users can write to {path}; chmod go-w it")
