"""Files that are whole or not there, and that cannot run code."""

from __future__ import annotations

import os
import pickle
import re
import resource
import signal
from pathlib import Path

import pytest
import torch

from fewshot_asam import FewShotError
from fewshot_asam.checkpoint import load_state, load_weights, save_state, save_weights, write_atomically
from fewshot_asam.models import build_model

SHAPE = (1, 16, 16)


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = (build_model("conv4", 3, SHAPE, 4, seed=seed) for seed in (0, 1))
    save_weights(tmp_path / "w.safetensors", saved)
    load_weights(tmp_path / "w.safetensors", other)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", build_model("conv4", 3, SHAPE, 4, seed=0))
    with pytest.raises(FewShotError, match=r"w.safetensors holds the weights of another model \(.*head.bias"):
        load_weights(tmp_path / "w.safetensors", build_model("conv4", 5, SHAPE, 4, seed=0))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:3], lambda data: b"", lambda data: b"x" * 99]
)
def test_damaged_files_are_named(tmp_path: Path, damage) -> None:
    model = build_model("conv4", 3, SHAPE, 4, seed=0)
    for name, save, load in (
        ("w.safetensors", lambda path: save_weights(path, model), lambda path: load_weights(path, model)),
        ("state.pt", lambda path: save_state(path, {"a": torch.ones(40)}), load_state),
    ):
        path = tmp_path / name
        save(path)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(FewShotError, match=f"{re.escape(name)} is damaged"):
            load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match=r"w\.safetensors does not exist"):
        load_weights(tmp_path / "w.safetensors", build_model("conv4", 3, SHAPE, 4, seed=0))
    with pytest.raises(FewShotError, match=r"state\.pt does not exist"):
        load_state(tmp_path / "state.pt")


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    "write", [lambda path, x: torch.save(x, path), lambda path, x: path.write_bytes(pickle.dumps(x))]
)
def test_a_state_that_would_run_code_is_refused(tmp_path: Path, write) -> None:
    write(tmp_path / "state.pt", {"progress": Hostile(tmp_path / "trace")})
    with pytest.raises(FewShotError, match=r"state\.pt is damaged"):
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "trace").exists()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; safetensors and torch report it in their own ways."""
    model = build_model("conv4", 3, SHAPE, 8, seed=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(FewShotError, match=r"w\.safetensors cannot be written"):
            save_weights(tmp_path / "w.safetensors", model)
        with pytest.raises(FewShotError, match=r"state\.pt cannot be written"):
            save_state(tmp_path / "state.pt", {"model": model.state_dict()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError("no space left")

    (tmp_path / "a").write_text("whole")
    with pytest.raises(FewShotError, match=r"cannot be written \(no space left\)"):
        write_atomically(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "whole"
