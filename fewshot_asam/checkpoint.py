"""Weights and training state on disk: written atomically, loaded without running code."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fewshot_asam.errors import FewShotError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place: whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch have their own for a full disk
        reason = " ".join(str(error).split())
        raise FewShotError(f"{path} cannot be written ({reason}); what stood there before is intact") from error
    finally:
        scratch.unlink(missing_ok=True)


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's state as safetensors."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda scratch: save_file(state, scratch))


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts weights that `save_weights` wrote into a model of the same layers.

    Raises `FewShotError` naming the file where it is missing, damaged or of another model.
    """
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise FewShotError(f"{path} does not exist; expected weights as train_maml writes them") from error
    except (SafetensorError, OSError) as error:
        raise FewShotError(f"{path} is damaged ({error}); expected weights as train_maml writes them") from error
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise FewShotError(f"{path} holds the weights of another model ({first})") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Training state: tensors, numbers, strings, lists and dictionaries."""
    write_atomically(path, lambda scratch: torch.save(state, scratch))


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; raises `FewShotError` naming a file that is missing or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that torch.save does not write
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FewShotError(f"{path} does not exist; there is nothing to resume there") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FewShotError(f"{path} is damaged ({first}); expected a training state") from error
    if not isinstance(state, dict):
        raise FewShotError(f"{path} holds a {type(state).__name__}; expected a training state")
    return state
