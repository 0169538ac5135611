"""Short runs of `train_maml` in processes of their own, to be killed, starved of disk and resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tqdm import tqdm

from conftest import make_images
from fewshot_asam.cli import train_maml
from fewshot_asam.models import cpu_kernels
from fewshot_asam.training.checkpoint import decode, latest_state

RUN = [
    *("--dataset", "folder", "--image-size", "16", "--ways", "3", "--shots", "1", "--queries", "2", "--hidden", "4"),
    *("--iterations", "8", "--meta-batch-size", "2", "--checkpoint-every", "3", "--validate-every", "4"),
    *("--validate-tasks", "4", "--test-tasks", "4", "--engine", "loop", "--validation", "augment", "--inner", "maml"),
]
"""A run of a second or so; augmentation has a random stream of its own, which must go on too."""

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["faults", "matplotlib.backends.backend_agg", "torch._dynamo"])
"""Each run is a fork of a process that has imported everything, which saves seconds a run."""


def write_images(root: Path) -> Path:
    """20 classes of 6 small pictures each."""
    drawn = make_images(20, 6, (1, 16, 16), 0)
    for index, image in enumerate(drawn.images):
        folder = root / drawn.names[index // 6]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image[0])).save(folder / f"{index % 6}.png")
    return root


def start(folder: Path, *arguments: object, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """Starts or resumes the run in `folder`; what it prints goes to `log(folder)`."""
    return start_logged(log(folder), folder, *arguments, prepare=prepare)


def start_logged(
    printed: Path, folder: Path, *arguments: object, prepare: Callable[[], object] | None = None
) -> BaseProcess:
    """The same; what it prints goes to `printed`."""
    words = ["--resume"] if (folder / "config.yaml").exists() else []
    argv = [*RUN, *words, "--output-dir", str(folder), *map(str, arguments)]
    process = processes.Process(target=_train, args=(argv, printed, prepare))
    process.start()
    return process


def finish(folder: Path, *arguments: object, prepare: Callable[[], object] | None = None) -> tuple[int, str]:
    """Starts or resumes the run and waits for it: its exit status (negative: the signal) and what it printed."""
    process = start(folder, *arguments, prepare=prepare)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, log(folder).read_text()


def log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, except times and which iteration the older checkpoint is of.

    A run that is asked to stop saves wherever it is, so the checkpoint before its last may be any.
    """
    newest = latest_state(folder)
    assert newest is not None
    state = decode(newest.read_bytes(), str(newest))
    state["progress"].pop("seconds")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for timed in [*rows, summary]:
        for name in ("seconds", "wall_seconds", "output_dir"):
            timed.pop(name, None)
    weights = {name: (folder / f"{name}.safetensors").read_bytes() for name in ("last", "best")}
    states = [path.relative_to(folder) for path in folder.rglob("*.ckpt") if path != newest]
    others = {path.relative_to(folder) for path in folder.rglob("*") if "tfevents" not in path.name}
    files = [len(states), *sorted(map(str, others.difference(states)))]
    return {"state": state, "rows": rows, "summary": summary, "weights": weights, "events": events(folder)} | {
        "files": files
    }


def events(folder: Path) -> list[tuple[int, str, float]]:
    """The numbers that TensorBoard would read."""
    (file,) = folder.glob("events.out.tfevents.*")
    read = EventFileLoader(str(file)).Load()
    return [(e.step, v.tag, v.tensor.float_val[0]) for e in read for v in e.summary.value if v.tag != "seconds"]


def differences(first: Any, second: Any, at: str = "") -> list[str]:
    """Where two outcomes are not the same bit for bit."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) and first.dtype == second.dtype else [at]
    if isinstance(first, dict) and first.keys() == second.keys():
        return [found for key in first for found in differences(first[key], second[key], f"{at}/{key}")]
    if isinstance(first, list | tuple) and len(first) == len(second):
        return [found for i in range(len(first)) for found in differences(first[i], second[i], f"{at}/{i}")]
    return [] if first == second else [f"{at}: {first} is not {second}"[:300]]


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} does not appear")


def wait_for_text(path: Path, text: str) -> None:
    wait_for(path)
    for _ in range(3000):
        if text in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} does not get {text}")


def limit_file_size(size: int, fatal: bool) -> None:
    """Files may not grow beyond `size` bytes: an error as of a full disk or, where `fatal`, death in mid-write."""
    cpu_kernels.available()  # its library is loaded as a copy in memory, which would be too large a file
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def die_at_event(number: int) -> None:
    """Kills this process when it opens, renames or removes a file below a run folder for the `number`-th time."""
    left = [number]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and "/run" in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun sets for each of so many processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start_job(
    folder: Path, count: int, work: Callable[..., object], *arguments: object, **environment: str
) -> list[BaseProcess]:
    """Starts `count` processes of one job, as torchrun would; each calls `work` and prints to `folder/RANK.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [{**own, **environment} for own in environments(count)]
    logs = [folder / f"{rank}.log" for rank in range(count)]
    started = [processes.Process(target=_join, args=(*pair, work, arguments)) for pair in zip(ranks, logs, strict=True)]
    for process in started:
        process.start()
    return started


def _join(environment: dict[str, str], log: Path, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    _quiet(log)
    sys.exit(work(*arguments))


def _train(argv: list[str], log: Path, prepare: Callable[[], object] | None) -> None:
    _quiet(log)
    if prepare is not None:
        prepare()
    sys.exit(train_maml.main(argv))


def _quiet(log: Path) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would leave semaphores behind where it is killed
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
