"""A process that builds contestants and runs them when told: orders on stdin, answers on stdout, one JSON line each.

- `{"do": "build", "factory": "module:function", "arguments": {...}, "device": "cpu", "keep_freed_memory": true}` builds
  a function of no arguments, which is numbered from 0; answers `{"seconds": ...}` since the process was started.
- `{"do": "run", "index": 0}` calls it; answers `{"seconds": ..., **what it returned}`, the device's work included.
- `{"do": "memory"}` answers `{"peak_bytes": ...}`: the largest use since the last `build`, above the use at that time.

A contestant that fails is answered with `{"error": ...}`. What the peers print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class Worker:
    """The contestants that were built, and the memory in use after that."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.contestants: list[Callable[[], Answer]] = []
        self.device = "cpu"
        self.baseline = 0

    def build(self, factory: str, arguments: dict[str, Any], device: str, keep_freed_memory: bool = False) -> Answer:
        if keep_freed_memory:
            _keep_freed_memory()
        self.device = device
        module, _, name = factory.partition(":")
        self.contestants.append(getattr(import_module(module), name)(**arguments))
        _synchronise(self.device)
        seconds = time.perf_counter() - self.started
        self.baseline = _reset_peak(self.device)
        return {"seconds": seconds}

    def run(self, index: int) -> Answer:
        _synchronise(self.device)
        started = time.perf_counter()
        answer = self.contestants[index]()
        _synchronise(self.device)
        return {"seconds": time.perf_counter() - started, **answer}

    def memory(self) -> Answer:
        return {"peak_bytes": max(0, _peak(self.device) - self.baseline)}


def _keep_freed_memory() -> None:
    from fewshot_asam.runtime.allocator import keep_freed_memory

    keep_freed_memory()


def _synchronise(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _status(field: str) -> int | None:
    """A field of this process's memory in Linux's own account, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{field}:")]
    return int(found[0][1]) * 1024 if found else None


def _peak(device: str) -> int:
    """The most memory that was in use.

    On Linux not `resource.getrusage`: its maximum is inherited from the process that started this one.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    if (resident := _status("VmHWM")) is not None:
        return resident
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak(device: str) -> int:
    """Forget the peak so far, where that is possible; returns the memory now in use."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak(device)
    return _status("VmRSS") or _peak(device)


def main() -> None:
    """Answer orders until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order.pop("do"))(**order)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
