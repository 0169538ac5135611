"""Several processes of one job, as `torchrun` starts them. With one process all of this does nothing.

`add`, `largest`, `from_first`, `agreed` and `one_a_machine_first` must be called by all processes, in one order.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fewshot_asam.errors import FewShotError

Result = TypeVar("Result")
_joined = False
was_joined = False
"""Whether this process has been one of several: gloo's threads may go on, and abort an interpreter that ends."""
LONGEST_WAIT = 300.0
"""Seconds until a process gives up the others: they are started together, but may read their files from a slow disk."""
LAST_WORDS = 10.0
"""Seconds that the end of a job may take."""


class PeerLost(FewShotError):
    """Another process of the job has ended, so that this one cannot go on."""


@contextmanager
def joined() -> Iterator[None]:
    """Within, this is one process of the job that the environment speaks of (`RANK`, `WORLD_SIZE`), if there is one.

    Processes talk by gloo about what is on the CPU and by NCCL about what is on GPUs. Outside there is one process,
    even if a program of one's own uses `torch.distributed`. Raises `FewShotError` where the others are not found.
    """
    global _joined, was_joined
    if announced() < 2:
        yield
        return
    _join()
    _joined = was_joined = True
    try:
        yield
    finally:
        _joined = False
        _leave()


def announced() -> int:
    """How many processes the environment speaks of, joined or not; raises `FewShotError` where it makes no sense."""
    count = _number("WORLD_SIZE", "1", 1)
    if count > 1:
        _number("RANK", "", 0, count - 1)
        _number("LOCAL_RANK", "0", 0, count - 1)
    return count


def _number(name: str, default: str, least: int, most: int = 100_000) -> int:
    given = os.environ.get(name, default)
    if re.fullmatch("[0-9]{1,10}", given) and least <= int(given) <= most:
        return int(given)
    found = f"is {given!r}" if name in os.environ else "is not set"
    raise FewShotError(
        f"the environment variable {name} {found}; expected a whole number from {least} to {most:,}: start several "
        "processes with torchrun, or unset WORLD_SIZE for one"
    )


def _join() -> None:
    port = _number("MASTER_PORT", "", 1, 65535)

    def meet() -> None:
        if os.environ["RANK"] != "0":
            _await_first(os.environ.get("MASTER_ADDR", ""), port)
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=LONGEST_WAIT)))
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size)

    try:
        _within(LONGEST_WAIT + LAST_WORDS, meet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FewShotError(f"the processes of this job do not find each other ({reason}); use torchrun") from error


def _await_first(address: str, port: int) -> None:
    """Returns when the first process listens; raises `OSError` where it does not. PyTorch's own wait is a noisy one."""
    end = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            socket.create_connection((address, port), timeout=LONGEST_WAIT).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _leave() -> None:
    """Leaves the group. Where a process failed, NCCL may wait for an answer that never comes; it is left to itself."""
    with suppress(TimeoutError):
        _within(LAST_WORDS, dist.destroy_process_group)


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Does something that may never end; raises `TimeoutError` where it has not ended by then."""
    problems: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    for problem in problems:
        raise problem


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


def print_rank0(text: str, end: str = "\n") -> None:
    """Prints, in the first process."""
    if is_first():
        print(text, end=end, flush=True)


def share(count: int) -> slice:
    """This process's part of `count` things: consecutive, and as even as can be."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def all_reduce_sum(values: Tensor) -> None:
    """Puts the sum over all processes into `values`."""
    if size() > 1:
        _together(lambda: dist.all_reduce(values))


def all_reduce_max(value: float) -> float:
    """The largest of the processes' values, without waiting for a GPU."""
    if size() == 1:
        return value
    values = torch.tensor(value, dtype=torch.float64, device="cpu")
    _together(lambda: dist.all_reduce(values, dist.ReduceOp.MAX))
    return values.item()


def broadcast(value: Result) -> Result:
    """The first process's value, in every process."""
    if size() == 1:
        return value
    values: list[Any] = [value]
    _together(lambda: dist.broadcast_object_list(values))
    return values[0]  # type: ignore[no-any-return]


def all_succeed(work: Callable[[], Result]) -> Result:
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
    early = all_succeed(lambda: [work()] if local_rank() == 0 else [])
    return all_succeed(lambda: early[0] if early else work())


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).partition(". ")[0]
        raise PeerLost(f"another process of this job ended ({reason})") from error
