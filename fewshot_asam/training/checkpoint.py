"""Weights and training states on disk: written atomically, checked when read, in a format that holds no code.

Both are safetensors. A training state has a signature and a checksum before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner
from fewshot_asam.runtime.files import open_regular

Weights = dict[str, Tensor]

SIGNATURE = b"fewshot_asam training state "
FORMAT = 3
"""Of training states; a file begins with `SIGNATURE`, this number, a newline and the SHA-256 of the rest."""
STATES = "checkpoints"
"""The folder of a run that holds its training states."""
SNAPSHOTS = "snapshots"
"""The folder of a run that holds the weights of its validations."""
HEADER = "fewshot_asam"
"""The one name under which safetensors say something: several would be written in any order."""
MODEL = "model."
"""What the names of a model's tensors begin with in the weights of a learner."""
KEPT = 2
"""Training states kept of a run, so that one is left where the newest is damaged."""
NUMBERS = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Types of the numbers that files may hold."""
_VERSION = re.compile(rb"[1-9]\d{0,3}")
_STATE = re.compile(r"\d{10}\.ckpt")
_SCRATCH = re.compile(r"\..+\.\d+\.tmp")


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


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, atomically."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def is_scratch(path: Path) -> bool:
    """Whether a file has the name of one that `write_atomically` is writing."""
    return _SCRATCH.fullmatch(path.name) is not None and path.is_file()


def tidy(folder: Path) -> None:
    """Removes what killed processes left in a run folder: temporary files and a training state too many."""
    stored = _stored(folder)
    states = folder / STATES
    for left in [*folder.iterdir(), *(states.iterdir() if states.is_dir() else ())]:
        if is_scratch(left) or left in stored[:-KEPT]:
            left.unlink(missing_ok=True)


def weights(module: nn.Module) -> Weights:
    """A copy of a learner's or a model's state, on the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in module.state_dict().items()}


def require_storable(learner: MetaLearner) -> None:
    """Raises `FewShotError` where the learner's state is none that weights files hold."""
    state = learner.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dtype not in NUMBERS:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise FewShotError(f"{name} in the learner's state_dict is a {kind}; expected tensors of plain numbers")
    if bad := not_finite(state):
        raise FewShotError(
            f"{bad} begins with numbers that are not finite, which would be taken for those of a run that went wrong; "
            "register a buffer that is to hold such with persistent=False"
        )


def save_weights(path: Path, state: Weights, made_by: str = "") -> None:
    """What `weights` gave, as safetensors with a checksum and with what they were made by, in words or JSON."""
    header = json.dumps({"sha256": _digest(state, made_by), "made_by": made_by})
    write_atomically(path, lambda scratch: scratch.write_bytes(save(state, {HEADER: header})))


def load_weights(path: Path | str, module: nn.Module) -> None:
    """Puts the weights of a run into a learner like the run's, or into its model alone.

    Raises `FewShotError` naming the file where `read_weights` does and where it is of another model.
    """
    state = read_weights(Path(path))[0]
    if not isinstance(module, MetaLearner):
        state = {name.removeprefix(MODEL): value for name, value in state.items() if name.startswith(MODEL)}
    put_weights(state, module, str(path))


def read_weights(path: Path) -> tuple[Weights, str]:
    """Weights that `save_weights` wrote, and what they were made by.

    Raises `FewShotError` naming the file where it is missing, damaged or has numbers that are not finite.
    """
    try:
        with open_regular(path) as file:
            state, metadata = _unpacked(file.read())
        sha256, made_by = _described(metadata.get(HEADER, "{}"))
    except FileNotFoundError as error:
        raise FewShotError(f"{path} does not exist; expected weights as train_maml writes them") from error
    except PermissionError as error:
        raise FewShotError(f"{path} may not be read ({error.strerror}); ask its owner to permit it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged_weights(path, str(error)) from error
    if sha256 != _digest(state, made_by):
        raise _damaged_weights(path, "its checksum is missing or another")
    if bad := not_finite(state):
        raise FewShotError(f"{path} holds numbers in {bad} that are not finite; they are of a run that went wrong")
    return state, made_by


def put_weights(state: Weights, module: nn.Module, name: str) -> None:
    """Puts weights into a learner or a model; raises `FewShotError` naming their file where it has other layers."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise FewShotError(f"{name} holds the weights of another model ({first})") from error


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a number that is not finite; empty where there is none."""
    return next((name for name, value in tensors.items() if not bool(value.isfinite().all())), "")


def _described(header: str) -> tuple[str, str]:
    """The checksum of weights and what they were made by; empty where they are of somebody else."""
    read = json.loads(header)
    sha256, made_by = (read.get(name, "") if isinstance(read, dict) else "" for name in ("sha256", "made_by"))
    return str(sha256), str(made_by)


def _damaged_weights(path: Path, reason: str) -> FewShotError:
    return FewShotError(
        f"{path} is damaged ({reason}); expected weights as train_maml writes them, which "
        f"train_maml --resume --output-dir {path.parent} restores from the run's checkpoint"
    )


def encode(state: Mapping[str, Any]) -> bytes:
    """A training state as a file's content: tensors by name under `tensors`, and else what JSON can hold."""
    described = {name: value for name, value in state.items() if name != "tensors"}
    content = save(state["tensors"], {HEADER: json.dumps(described)})
    return SIGNATURE + b"%d\n" % FORMAT + hashlib.sha256(content).digest() + content


def decode(data: bytes, name: str) -> dict[str, Any]:
    """The training state in a file's content, on the CPU.

    Raises `FewShotError` naming the file where it is damaged or of another version.
    """
    head, newline, rest = data.partition(b"\n")
    version = head.removeprefix(SIGNATURE)
    if head == version or not newline or not _VERSION.fullmatch(version):
        raise FewShotError(f"{name} is damaged (it does not begin as one); expected a training state")
    if int(version) != FORMAT:
        raise FewShotError(
            f"{name} is of format {int(version)}; this version of fewshot_asam reads format {FORMAT}: go on with the "
            "version that wrote it, or start a new run"
        )
    if hashlib.sha256(rest[32:]).digest() != rest[:32]:
        raise FewShotError(f"{name} is damaged (its checksum is another); expected a training state")
    try:
        tensors, metadata = _unpacked(rest[32:])
        state = json.loads(metadata.get(HEADER, "null"))
    except (ValueError, RecursionError) as error:
        raise FewShotError(f"{name} is damaged ({error}); expected a training state") from error
    if not isinstance(state, dict):
        raise FewShotError(f"{name} is damaged (it describes nothing); expected a training state")
    return state | {"tensors": tensors}


def save_state(folder: Path, iteration: int, state: dict[str, Any]) -> None:
    """Stores the training state after `iteration` iterations in a run folder; the one before it is kept too."""
    path = folder / STATES / f"{iteration:010d}.ckpt"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise FewShotError(f"{path.parent} cannot be made ({error})") from error
    others = [other for other in _stored(folder) if other != path]
    write_atomically(path, lambda scratch: scratch.write_bytes(encode(state)))
    older = [other for other in others if other.name < path.name]
    for other in set(others).difference(older[1 - KEPT :]):
        other.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[bytes, str]:
    """The newest whole training state of a run folder, encoded, and its path; both empty where none was ever stored.

    Warns of newer ones that are damaged; raises `FewShotError` where all are.
    """
    problems = []
    for path in reversed(_stored(folder)):
        try:
            with open_regular(path) as file:
                data = file.read()
            decode(data, str(path))
        except PermissionError as error:
            raise FewShotError(f"{path} may not be read ({error.strerror}); ask its owner to permit it") from error
        except (FewShotError, OSError) as error:
            problems.append(str(error) if isinstance(error, FewShotError) else f"{path} cannot be read ({error})")
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
    """The training states of a run folder, oldest first; raises `FewShotError` where they are not in it."""
    states = folder / STATES
    if states.is_symlink():
        raise FewShotError(
            f"{states} is a link to {os.readlink(states)}, where files that are not of this run might be removed; put "
            "a folder in its place"
        )
    return sorted(path for path in states.glob("*.ckpt") if _STATE.fullmatch(path.name) and not path.is_dir())


def _unpacked(data: bytes) -> tuple[Weights, dict[str, str]]:
    """The tensors of safetensors and what is said of them; raises `ValueError` where the data are none."""
    try:
        with torch.device("cpu"):  # whatever PyTorch's default device
            tensors = load(data)
        if unknown := [name for name, value in tensors.items() if value.dtype not in NUMBERS]:
            raise ValueError(f"{unknown[0]} is of {tensors[unknown[0]].dtype}")
    except (SafetensorError, KeyError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _digest(state: Weights, made_by: str) -> str:
    digest = hashlib.sha256(made_by.encode())
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
