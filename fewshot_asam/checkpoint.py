"""Weights and training states on disk: written atomically, checked when read, loaded without running code."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewshot_asam.errors import FewShotError

Weights = dict[str, Tensor]

SIGNATURE = b"fewshot_asam training state "
FORMAT = 1
"""Of training states; a file begins with `SIGNATURE`, this number, a newline and the SHA-256 of the rest."""
STATES = "checkpoints"
"""The folder of a run that holds its training states."""
SCRATCH = ".*.tmp"
"""Names of files that are being written."""
KEPT = 2
"""Training states kept of a run, so that one is left where the newest is damaged."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place: whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        _sync(scratch)
        scratch.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch have their own for a full disk
        reason = " ".join(str(error).split())
        raise FewShotError(f"{path} cannot be written ({reason}); what stood there before is intact") from error
    finally:
        scratch.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Removes what killed processes left in a run folder: temporary files and a training state too many."""
    for left in [*folder.glob(SCRATCH), *(folder / STATES).glob(SCRATCH), *_stored(folder)[:-KEPT]]:
        left.unlink(missing_ok=True)


def weights(model: nn.Module) -> Weights:
    """A copy of the model's state, on the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}


def save_weights(path: Path, state: Weights) -> None:
    """What `weights` gave, as safetensors with a checksum."""
    write_atomically(path, lambda scratch: save_file(state, scratch, metadata={"sha256": _digest(state)}))


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts weights that `save_weights` wrote into a model of the same layers.

    Raises `FewShotError` naming the file where it is missing, damaged or of another model.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            expected = (stored.metadata() or {}).get("sha256")
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  it is no mapping
    except FileNotFoundError as error:
        raise FewShotError(f"{path} does not exist; expected weights as train_maml writes them") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged_weights(path, str(error)) from error
    if expected != _digest(state):
        raise _damaged_weights(path, "its checksum is missing or another")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise FewShotError(f"{path} holds the weights of another model ({first})") from error


def _damaged_weights(path: Path, reason: str) -> FewShotError:
    return FewShotError(
        f"{path} is damaged ({reason}); expected weights as train_maml writes them, which "
        f"train_maml --resume --output-dir {path.parent} restores from the run's checkpoint"
    )


def encode(state: dict[str, Any]) -> bytes:
    """A training state as a file's content: tensors, numbers, strings, lists and dictionaries."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    return SIGNATURE + b"%d\n" % FORMAT + hashlib.sha256(content).digest() + content


def decode(data: bytes, name: str) -> dict[str, Any]:
    """The training state in a file's content, on the CPU.

    Raises `FewShotError` naming the file where it is damaged or of another version.
    """
    head, newline, rest = data.partition(b"\n")
    version = head.removeprefix(SIGNATURE)
    if head == version or not newline or not version.isdigit():
        raise FewShotError(f"{name} is damaged (it does not begin as one); expected a training state")
    if int(version) != FORMAT:
        raise FewShotError(
            f"{name} is of format {int(version)}; this version of fewshot_asam reads format {FORMAT}: go on with the "
            "version that wrote it, or start a new run"
        )
    if hashlib.sha256(rest[32:]).digest() != rest[:32]:
        raise FewShotError(f"{name} is damaged (its checksum is another); expected a training state")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that torch.save does not write
            state = torch.load(io.BytesIO(rest[32:]), map_location="cpu", weights_only=True)
    except Exception as error:  # what a pickle that somebody forged raises is open-ended
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FewShotError(f"{name} is damaged ({first}); expected a training state") from error
    if not isinstance(state, dict):
        raise FewShotError(f"{name} holds a {type(state).__name__}; expected a training state")
    return state


def save_state(folder: Path, iteration: int, state: dict[str, Any]) -> None:
    """Stores the training state after `iteration` iterations in a run folder; the one before it is kept too."""
    path = folder / STATES / f"{iteration:010d}.ckpt"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise FewShotError(f"{path.parent} cannot be made ({error})") from error
    write_atomically(path, lambda scratch: scratch.write_bytes(encode(state)))
    older = [other for other in _stored(folder) if other.name < path.name]
    for other in set(_stored(folder)).difference([path], older[1 - KEPT :]):
        other.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[bytes, str]:
    """The newest whole training state of a run folder, encoded, and its path; both empty where none was ever stored.

    Warns of newer ones that are damaged; raises `FewShotError` where all are.
    """
    problems = []
    for path in reversed(_stored(folder)):
        try:
            data = path.read_bytes()
            decode(data, str(path))
        except (FewShotError, OSError) as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; going on from the one before it, {path}", stacklevel=2)
        return data, str(path)
    if problems:
        raise FewShotError(f"{'; '.join(problems)}; no checkpoint is left to go on from, so start a new run")
    return b"", ""


def latest_state(folder: Path) -> Path | None:
    """The newest training state of a run folder, damaged or not."""
    return next(reversed(_stored(folder)), None)


def _stored(folder: Path) -> list[Path]:
    """The training states of a run folder, oldest first."""
    return sorted((folder / STATES).glob("[0-9]*.ckpt"))


def _digest(state: Weights) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
