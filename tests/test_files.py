"""What is no file is refused at once: nothing waits for a writer that never comes, or reads a device for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fewshot_asam.runtime.files import open_regular, require_regular


def make(path: Path, kind: str) -> Path:
    """Something of that kind at `path`; a device is one that is there already."""
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_what_may_never_end_is_refused(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "x", kind)
    for function in (open_regular, require_regular):
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            function(path)


def test_what_becomes_a_pipe_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    stat = os.stat
    renamed = {tmp_path / "pipe": tmp_path / "file"}
    monkeypatch.setattr(os, "stat", lambda path, **options: stat(renamed.get(path, path), **options))
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(OSError, match="named pipe"):
        open_regular(tmp_path / "pipe")
    assert before is None or set(os.listdir("/proc/self/fd")) == before


def test_a_file_is_read_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        require_regular(tmp_path / name)
        with open_regular(str(tmp_path / name)) as file:
            assert file.read() == b"content"


def test_folders_and_missing_files_are_as_ever(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        require_regular(tmp_path / "none")
