"""Several processes of one job, as `torchrun` starts them. With one process all of this does nothing.

`add`, `largest`, `from_first`, `agreed` and `one_a_machine_first` must be called by all processes, in one order.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewshot_asam.errors import FewShotError

Result = TypeVar("Result")
_joined = False
LAST_WORDS = 0.1
"""Seconds for gloo's threads to let go of Python objects. Up to 2.7, PyTorch waits for these threads while it holds the
lock that they need for that (https://github.com/pytorch/pytorch/pull/154976)."""


class PeerLost(FewShotError):
    """Another process of the job has ended, so that this one cannot go on."""


@contextmanager
def joined() -> Iterator[None]:
    """Within, this is one process of the job that the environment speaks of (`RANK`, `WORLD_SIZE`), if there is one.

    Processes talk by gloo about what is on the CPU and by NCCL about what is on GPUs. Outside there is one process,
    even if a program of one's own uses `torch.distributed`. Raises `FewShotError` where the others are not found.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield
        return
    try:
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FewShotError(f"the processes of this job do not find each other ({reason}); use torchrun") from error
    _joined = True
    yield
    _joined = False
    time.sleep(LAST_WORDS)
    dist.destroy_process_group()  # not where something failed: the others may never answer


def rank() -> int:
    """The number of this process in the job, from 0."""
    return dist.get_rank() if _joined else 0


def size() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if _joined else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _joined else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def say(text: str, end: str = "\n") -> None:
    """Prints, in the first process."""
    if is_first():
        print(text, end=end, flush=True)


def share(count: int) -> slice:
    """This process's part of `count` things: consecutive, and as even as can be."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def add(values: Tensor) -> None:
    """Puts the sum over all processes into `values`."""
    if size() > 1:
        _together(lambda: dist.all_reduce(values))


def largest(value: float) -> float:
    """The largest of the processes' values, without waiting for a GPU."""
    if size() == 1:
        return value
    values = torch.tensor(value, dtype=torch.float64)
    _together(lambda: dist.all_reduce(values, dist.ReduceOp.MAX))
    return values.item()


def from_first(value: Result) -> Result:
    """The first process's value, in every process."""
    if size() == 1:
        return value
    values: list[Any] = [value]
    _together(lambda: dist.broadcast_object_list(values))
    return values[0]  # type: ignore[no-any-return]


def agreed(work: Callable[[], Result]) -> Result:
    """What `work` returns; where it fails in any process, all of them leave, and the first one says why.

    Raises `FewShotError` in the first process and `SystemExit` in the others.
    """
    if size() == 1:
        return work()
    try:
        result, problem = work(), None
    except (FewShotError, OSError) as error:
        problem = str(error)
    problems: list[Any] = [None] * size()
    _together(lambda: dist.all_gather_object(problems, problem))
    failed = [number for number in range(size()) if problems[number] is not None]
    if not failed:
        return result
    if not is_first():
        raise SystemExit(2)
    where = "" if failed[0] == 0 else f"process {failed[0]}: "
    raise FewShotError(where + problems[failed[0]])


def one_a_machine_first(work: Callable[[], Result]) -> Result:
    """What `work` returns, called by one process of each machine before the others, for work that fills a cache."""
    early = agreed(lambda: [work()] if local_rank() == 0 else [])
    return agreed(lambda: early[0] if early else work())


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).partition(". ")[0]
        raise PeerLost(f"another process of this job ended ({reason})") from error
