"""Files that are whole or not there, that show every damage, and that cannot run code."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fewshot_asam import FewShotError
from fewshot_asam.checkpoint import (
    FORMAT,
    SIGNATURE,
    STATES,
    decode,
    encode,
    latest_state,
    load_weights,
    read_state,
    save_state,
    save_weights,
    weights,
    write_atomically,
)
from fewshot_asam.models import build_model

SHAPE = (1, 16, 16)
EXAMPLES = int(os.environ.get("FEWSHOT_ASAM_FUZZ", "300"))
"""Inputs that each fuzzed loader gets."""


def model(ways: int = 3, seed: int = 0) -> torch.nn.Module:
    return build_model("conv4", ways, SHAPE, 4, seed=seed)


def state() -> dict[str, object]:
    """Like a trainer's: tensors, numbers, text, lists, dictionaries."""
    trained = model()
    adam = torch.optim.Adam(trained.parameters())
    sum(value.sum() for value in trained.parameters()).backward()
    adam.step()
    generator = torch.Generator().manual_seed(0).get_state()
    return {"progress": {"iteration": 8}, "model": weights(trained), "optimizer": adam.state_dict(), "tasks": generator}


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = model(seed=0), model(seed=1)
    save_weights(tmp_path / "w.safetensors", weights(saved))
    load_weights(tmp_path / "w.safetensors", other)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", weights(model()))
    with pytest.raises(FewShotError, match=r"w.safetensors holds the weights of another model \(.*head.bias"):
        load_weights(tmp_path / "w.safetensors", model(ways=5))


def test_weights_without_a_checksum_are_refused(tmp_path: Path) -> None:
    save_file(weights(model()), tmp_path / "w.safetensors")
    with pytest.raises(FewShotError, match="its checksum is missing"):
        load_weights(tmp_path / "w.safetensors", model())


def test_every_flipped_byte_and_every_cut_of_a_training_state_is_seen() -> None:
    data = encode(state())
    for index in range(len(data)):
        flipped = bytearray(data)
        flipped[index] ^= 1 << index % 8
        for damaged in (bytes(flipped), data[:index]):
            with pytest.raises(FewShotError, match=r"x\.ckpt (is damaged|is of format)"):
                decode(damaged, "x.ckpt")
    print(f"\n{2 * len(data)} corruptions of a training state")


def test_every_flipped_byte_and_every_cut_of_weights_is_seen(tmp_path: Path) -> None:
    path, trained = tmp_path / "w.safetensors", model()
    save_weights(path, weights(trained))
    data = path.read_bytes()
    for index in range(len(data)):
        flipped = bytearray(data)
        flipped[index] ^= 1 << index % 8
        for damaged in (bytes(flipped), data[:index]):
            path.write_bytes(damaged)
            with pytest.raises(FewShotError, match=r"w\.safetensors is damaged"):
                load_weights(path, trained)
    print(f"\n{2 * len(data)} corruptions of weights")


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_whatever_is_in_a_training_state_it_is_refused_in_one_way(data: st.DataObject) -> None:
    """Random bytes, and mutated content under a checksum that is right, as somebody might forge it."""
    whole = encode({"a": torch.ones(3), "b": [1, "x", {"c": 2.0}]})
    content = bytearray(whole[len(SIGNATURE) + 2 + 32 :])
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not content:
            break
    forged = SIGNATURE + b"1\n" + hashlib.sha256(content).digest() + content
    for candidate in (forged, bytes(content)):
        with suppress(FewShotError):
            assert isinstance(decode(candidate, "x.ckpt"), dict)


def test_a_state_of_another_version_is_refused() -> None:
    data = encode(state()).replace(SIGNATURE + b"%d\n" % FORMAT, SIGNATURE + b"9\n")
    with pytest.raises(FewShotError, match=r"x\.ckpt is of format 9; this version of fewshot_asam reads format 1"):
        decode(data, "x.ckpt")


def test_two_states_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save_state(tmp_path, iteration, {"iteration": iteration})
    assert [path.name for path in sorted((tmp_path / STATES).iterdir())] == ["0000000010.ckpt", "0000000015.ckpt"]
    data, name = read_state(tmp_path)
    assert (decode(data, name), name) == ({"iteration": 15}, str(latest_state(tmp_path)))
    (tmp_path / STATES / "0000000015.ckpt").write_bytes(data[:-1])
    with pytest.warns(UserWarning, match=r"0015\.ckpt is damaged .* going on from the one before it, .*0010\.ckpt"):
        assert decode(*read_state(tmp_path)) == {"iteration": 10}
    save_state(tmp_path, 12, {"iteration": 12})
    assert [path.name for path in sorted((tmp_path / STATES).iterdir())] == ["0000000010.ckpt", "0000000012.ckpt"]


def test_where_all_states_are_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (b"", "")
    save_state(tmp_path, 5, {})
    (tmp_path / STATES / "0000000005.ckpt").write_bytes(b"")
    with pytest.raises(FewShotError, match=r"0005\.ckpt is damaged .*no checkpoint is left to go on from"):
        read_state(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match=r"w\.safetensors does not exist"):
        load_weights(tmp_path / "w.safetensors", model())


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.trace}",)


def pickled(content: object) -> bytes:
    return pickle.dumps(content)


def torch_saved(content: object) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("write", [pickled, torch_saved])
def test_a_state_that_would_run_code_is_refused(tmp_path: Path, write: Callable[[object], bytes]) -> None:
    content = write({"progress": Hostile(tmp_path / "trace")})
    forged = SIGNATURE + b"%d\n" % FORMAT + hashlib.sha256(content).digest() + content
    for data in (content, forged):
        with pytest.raises(FewShotError, match=r"x\.ckpt is damaged"):
            decode(data, "x.ckpt")
    assert not (tmp_path / "trace").exists()
    torch.load(BytesIO(content), weights_only=False) if write is torch_saved else pickle.loads(content)
    assert (tmp_path / "trace").exists()  # so it is hostile indeed


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; safetensors and torch report it in their own ways."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(FewShotError, match=r"w\.safetensors cannot be written"):
            save_weights(tmp_path / "w.safetensors", weights(model()))
        with pytest.raises(FewShotError, match=r"0003\.ckpt cannot be written"):
            save_state(tmp_path, 3, state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.rglob("*")] == [STATES]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError("no space left")

    (tmp_path / "a").write_text("whole")
    with pytest.raises(FewShotError, match=r"cannot be written \(no space left\)"):
        write_atomically(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "whole"
