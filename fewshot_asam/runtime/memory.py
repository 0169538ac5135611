"""How much memory there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this machine has, or that the container which the process is in may use, if that is less.

    Control groups are read below `root`, of version 1 and 2.
    """
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit, _ in _groups(root))])


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that nobody uses, or only to cache files: the machine's or the container's, whichever is less.

    Raises `OSError` where the system does not say.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is None:
        raise OSError("/proc/meminfo does not say what is available")
    return max(0, min([free, *(limit - used for limit, used in _groups(root))]))


def growth(work: Callable[[], object], process: Path = Path("/proc/self")) -> int:
    """Bytes by which this process was at most larger than before while `work` ran; 0 where that cannot be told."""
    before = None
    with suppress(OSError):
        (process / "clear_refs").write_text("5")  # forgets how large it has been
        before = _status(process, "VmRSS")
    work()
    return 0 if before is None else max(0, _status(process, "VmHWM") - before)


def _status(process: Path, field: str) -> int:
    """A field of Linux's account of a process, in bytes."""
    lines = (process / "status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the control groups that the process is in for `controller`, of version 1 and 2."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / (controllers and controller)
        group = Path(path.lstrip("/"))
        # those above it limit it too, and in a container its own name is not there
        yield from (folder / part for part in (group, *group.parents))


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of memory of each control group that has a limit, in bytes."""
    for folder in group_folders(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / limit).read_text()), _in_use(folder, used)


def _in_use(folder: Path, name: str) -> int:
    """What a group holds, without the files that it would give up."""
    used = 0
    with suppress(OSError, ValueError):
        used = int((folder / name).read_text())
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        cached = {key: int(value) for key, value in lines}
        used -= cached.get("total_inactive_file", cached.get("inactive_file", 0))
    return used
