"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fewshot_asam.runtime.memory import group_folders


class Cores(NamedTuple):
    """How many, and what sets the limit."""

    number: int
    reason: str


def usable_cores(threads: int, root: Path = Path("/")) -> Cores:
    """The least of what the machine, the process's affinity, its container and its threads allow.

    **Arguments:**

    - `threads`: those that PyTorch uses: one a physical core, or as `OMP_NUM_THREADS` and `torch.set_num_threads` say.
    - `root`: below which control groups are read, of version 1 and 2.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Cores(affinity, _counted(affinity, "core"))]
    found += [Cores(max(1, math.floor(quota)), f"a CPU quota of {quota:g}") for quota in _quotas(root)]
    said = f"OMP_NUM_THREADS={threads}" if "OMP_NUM_THREADS" in os.environ else _counted(threads, "PyTorch thread")
    found.append(Cores(threads, said))
    return min(found, key=lambda cores: cores.number)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _quotas(root: Path) -> Iterator[float]:
    """CPU time that control groups allow, in cores."""
    for folder in group_folders(root, "cpu"):
        with suppress(OSError, ValueError):  # "max" is no limit
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)
