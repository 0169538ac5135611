"""Files that are whole or not there, that show every damage, and that cannot run code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from fewshot_asam import MAML, FewShotError, MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.training import checkpoint
from fewshot_asam.training.checkpoint import (
    FORMAT,
    SIGNATURE,
    STATES,
    decode,
    encode,
    latest_state,
    load_weights,
    read_state,
    read_weights,
    save_state,
    save_weights,
    tidy,
    weights,
    write_atomically,
)

SHAPE = (1, 16, 16)
EXAMPLES = int(os.environ.get("FEWSHOT_ASAM_FUZZ", "300"))
"""Inputs that each fuzzed loader gets."""


def learner(ways: int = 3, seed: int = 0, hidden: int = 4) -> MetaLearner:
    return MAML(build_model("conv4", ways, SHAPE, hidden, seed=seed), 0.4)


def state() -> dict[str, object]:
    """Like a training's: tensors of several types and shapes, numbers, text, lists, dictionaries."""
    generator = torch.Generator().manual_seed(0).get_state()
    tensors = {**weights(learner()), "step": torch.tensor(8.0), "tasks": generator, "unlogged": torch.empty(0, 3)}
    return {"progress": {"iteration": 8, "seconds": 0.1}, "made_by": ["ü", None], "tensors": tensors}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_training_state_comes_back_bit_for_bit() -> None:
    saved, found = state(), decode(encode(state()), "x.ckpt")
    tensors, expected = found.pop("tensors"), saved.pop("tensors")
    assert found == saved
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = learner(seed=0), learner(seed=1)
    save_weights(tmp_path / "w.safetensors", weights(saved), "by ü")
    load_weights(tmp_path / "w.safetensors", other)
    assert read_weights(tmp_path / "w.safetensors")[1] == "by ü"
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))


def test_the_model_alone_takes_its_weights_from_those_of_a_learner(tmp_path: Path) -> None:
    saved = MAML(learner().model, torch.nn.Parameter(torch.tensor(0.3)))
    save_weights(tmp_path / "w.safetensors", weights(saved))
    other, model = MAML(learner(seed=1).model, torch.nn.Parameter(torch.tensor(0.1))), learner(seed=2).model
    load_weights(tmp_path / "w.safetensors", other)
    load_weights(tmp_path / "w.safetensors", model)
    assert other.lr.item() == pytest.approx(0.3)
    for found in (other.model, model):
        assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), found.parameters(), strict=True))
    with pytest.raises(FewShotError, match=r"w.safetensors holds the weights of another model \(.*lr"):
        load_weights(tmp_path / "w.safetensors", learner())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", weights(learner()))
    with pytest.raises(FewShotError, match=r"w.safetensors holds the weights of another model \(.*head.bias"):
        load_weights(tmp_path / "w.safetensors", learner(ways=5))


def test_weights_without_a_checksum_are_refused(tmp_path: Path) -> None:
    save_file(weights(learner()), tmp_path / "w.safetensors")
    with pytest.raises(FewShotError, match="its checksum is missing"):
        load_weights(tmp_path / "w.safetensors", learner())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, number: float) -> None:
    broken, other = weights(learner()), learner(seed=1)
    broken["model.head.weight"][0, 0] = number
    save_weights(tmp_path / "w.safetensors", broken)
    before = weights(other)
    with pytest.raises(FewShotError, match=r"w.safetensors holds numbers in model\.head\.weight that are not finite"):
        load_weights(tmp_path / "w.safetensors", other)
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())


@pytest.mark.parametrize("kind", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    save_file({name: value.to(kind) for name, value in weights(learner()).items()}, tmp_path / "w.safetensors")
    with pytest.raises(FewShotError, match=r"w.safetensors is damaged \(.* is of torch\."):
        load_weights(tmp_path / "w.safetensors", learner())


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "open_regular", refused)  # root, who may run this, is refused nothing
    save_state(tmp_path, 5, state())
    with pytest.raises(FewShotError, match=r"w\.safetensors may not be read \(Permission denied\)"):
        load_weights(tmp_path / "w.safetensors", learner())
    with pytest.raises(FewShotError, match=r"0005\.ckpt may not be read \(Permission denied\)"):
        read_state(tmp_path)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_open_to_whom_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        save_weights(tmp_path / "w.safetensors", weights(learner()))
        save_state(tmp_path, 5, state())
    for path in (tmp_path / "w.safetensors", tmp_path / STATES / "0000000005.ckpt"):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert load_file(tmp_path / "w.safetensors").keys() == weights(learner()).keys()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(FewShotError, match=r"w\.safetensors is damaged \(it is a named pipe"):
        load_weights(tmp_path / "w.safetensors", learner())
    (tmp_path / STATES).mkdir()
    os.mkfifo(tmp_path / STATES / "0000000005.ckpt")
    with pytest.raises(FewShotError, match=r"0005\.ckpt cannot be read \(it is a named pipe.*no checkpoint is left"):
        read_state(tmp_path)


def test_what_is_not_the_run_s_own_is_not_removed(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save_state(tmp_path, iteration, state())
    foreign = [".notes.tmp", ".cache.5.tmp/x", f"{STATES}/9.ckpt", f"{STATES}/0000000001.ckpt.bak", "a.txt.1.tmp"]
    left = [".config.yaml.12.tmp", f"{STATES}/.0000000005.ckpt.12.tmp"]
    for name in foreign + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    tidy(tmp_path)
    assert [name for name in foreign if not (tmp_path / name).exists()] == []
    assert [name for name in left if (tmp_path / name).exists()] == []


def test_states_in_another_folder_are_left_alone(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    for iteration in (5, 10):
        save_state(elsewhere, iteration, state())
    (run / STATES).symlink_to(elsewhere / STATES)
    for use in (read_state, tidy, lambda folder: save_state(folder, 15, state())):
        with pytest.raises(FewShotError, match=r"checkpoints is a link to .*elsewhere"):
            use(run)
    assert [path.name for path in sorted((elsewhere / STATES).iterdir())] == ["0000000005.ckpt", "0000000010.ckpt"]


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
    path, trained = tmp_path / "w.safetensors", learner(ways=2, hidden=1)
    save_weights(path, weights(trained), '{"classes": "\\u00fc"}')
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
    whole = encode({"tensors": {"a": torch.ones(3)}, "b": [1, "x", {"c": 2.0}]})
    content = bytearray(whole[len(SIGNATURE) + 2 + 32 :])
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not content:
            break
    for candidate in (sealed(bytes(content)), bytes(content)):
        with suppress(FewShotError):
            assert isinstance(decode(candidate, "x.ckpt"), dict)


@pytest.mark.parametrize("version", [1, 9])
def test_a_state_of_another_version_is_refused(version: int) -> None:
    data = encode(state()).replace(SIGNATURE + b"%d\n" % FORMAT, SIGNATURE + b"%d\n" % version)
    with pytest.raises(FewShotError, match=rf"x\.ckpt is of format {version}; this version .* reads format {FORMAT}"):
        decode(data, "x.ckpt")


@pytest.mark.parametrize("version", ["9" * 5000, "00", "", "-1", "2.0", " 2"])
def test_what_is_no_version_is_damage(version: str) -> None:
    data = encode(state()).replace(SIGNATURE + b"%d\n" % FORMAT, SIGNATURE + version.encode() + b"\n")
    with pytest.raises(FewShotError, match=r"x\.ckpt is damaged"):
        decode(data, "x.ckpt")


def sealed(content: bytes) -> bytes:
    return SIGNATURE + b"%d\n" % FORMAT + hashlib.sha256(content).digest() + content


def headed(header: str, data: bytes = b"") -> bytes:
    """What safetensors would be with this header."""
    return len(header).to_bytes(8, "little") + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        bytes(8),
        b"\xff" * 8,
        b"\xff" * 7 + b"\x7f{}",
        headed("[]"),
        headed("{}"),
        headed("[" * 100_000),
        headed('{"__metadata__": {"fewshot_asam": 5}}'),
        headed('{"__metadata__": ["fewshot_asam"]}'),
        headed('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', bytes(4)),
        headed('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 36]}}', bytes(36)),
        headed('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)),
        headed('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'),
        headed('{"a": {"dtype": "F64", "shape": [0, 9223372036854775807, 9], "data_offsets": [0, 0]}}'),
        headed('{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)),
        headed('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', bytes(1)),
        headed('{"a": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)),
        save({"a": torch.ones(1)}),
        save({}, {"fewshot_asam": ""}),
        save({}, {"fewshot_asam": "null"}),
        save({}, {"fewshot_asam": "[]"}),
        save({}, {"fewshot_asam": "[" * 100_000}),
        save({}, {"fewshot_asam": '{"a": ' + "9" * 5000 + "}"}),
        save({}, {"fewshot_asam": "{'a': 1}"}),
    ],
)
def test_forged_containers_under_a_right_checksum(content: bytes) -> None:
    with pytest.raises(FewShotError, match=r"x\.ckpt is damaged") as raised:
        decode(sealed(content), "x.ckpt")
    assert len(str(raised.value)) < 500


def test_names_in_a_state_cannot_shadow_its_tensors() -> None:
    content = save({"a": torch.ones(1)}, {"fewshot_asam": json.dumps({"tensors": 5})})
    assert torch.equal(decode(sealed(content), "x.ckpt")["tensors"]["a"], torch.ones(1))


def numbered(iteration: int) -> dict[str, object]:
    return {"iteration": iteration, "tensors": {}}


def test_two_states_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save_state(tmp_path, iteration, numbered(iteration))
    assert [path.name for path in sorted((tmp_path / STATES).iterdir())] == ["0000000010.ckpt", "0000000015.ckpt"]
    data, name = read_state(tmp_path)
    assert (decode(data, name), name) == (numbered(15), str(latest_state(tmp_path)))
    (tmp_path / STATES / "0000000015.ckpt").write_bytes(data[:-1])
    with pytest.warns(UserWarning, match=r"0015\.ckpt is damaged .* going on from the one before it, .*0010\.ckpt"):
        assert decode(*read_state(tmp_path)) == numbered(10)
    save_state(tmp_path, 12, numbered(12))
    assert [path.name for path in sorted((tmp_path / STATES).iterdir())] == ["0000000010.ckpt", "0000000012.ckpt"]


def test_where_all_states_are_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (b"", "")
    save_state(tmp_path, 5, numbered(5))
    (tmp_path / STATES / "0000000005.ckpt").write_bytes(b"")
    with pytest.raises(FewShotError, match=r"0005\.ckpt is damaged .*no checkpoint is left to go on from"):
        read_state(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match=r"w\.safetensors does not exist"):
        load_weights(tmp_path / "w.safetensors", learner())


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
    for data in (content, sealed(content)):
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
            save_weights(tmp_path / "w.safetensors", weights(learner()))
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


def test_the_same_weights_are_the_same_file(tmp_path: Path) -> None:
    for number in range(9):
        save_weights(tmp_path / str(number), weights(learner()), "by me")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_what_a_killed_first_checkpoint_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / STATES).mkdir()
    left = tmp_path / STATES / ".0000000005.ckpt.12.tmp"
    left.write_text("half")
    tidy(tmp_path)
    assert not left.exists()
