"""How much memory there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this machine has, or that the container which the process is in may use, if that is less.

    Control groups are read below `root`, of version 1 and 2.
    """
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_group_limits(root)])


def _group_limits(root: Path) -> Iterator[int]:
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(","):
            folder, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif not controllers:
            folder, name = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        group = Path(path.lstrip("/"))
        for part in (
            group,
            *group.parents,
        ):  # those above it limit it too, and in a container its own name is not there
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / part / name).read_text())
