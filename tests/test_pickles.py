"""The pickle reader: arrays and plain data come out as they went in, and nothing else is so much as looked up."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing._private.utils import runstring

from fewshot_asam.data.pickles import load_plain, parse_plain, stream_plain
from fewshot_asam.errors import FewShotError

ARRAYS = {
    "images": np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3) * 5,
    "large": np.arange(70_000, dtype=np.int64).reshape(7, -1),
    "fortran": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "turned": np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(24, dtype=np.uint16).reshape(4, 6)[::2, ::-3],
    "swapped": np.arange(6, dtype=">i4"),
    "single": np.array(2.5),
    "empty": np.zeros((0, 3), np.float16),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "bytes": np.array([b"ab", b"\xff"]),
}
PLAIN = {"a": [1, -(2**70), 1.5, None, True], "b": ({"c": b"\x00\xff"}, "ü\n"), 3: np.float32(0.5), "d": np.int64(-7)}

PYTHON2 = (
    b"\x80\x02}q\x01(U\nimage_dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
    b"U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x02K\x03\x86q\tcnumpy\ndtype\nq\nU\x02u1q\x0bK\x00K\x01\x87q\x0cRq\r(K\x03U\x01|"
    b"q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x06\x00\x7f\x80\xc3\xa9\xffq\x10tq\x11bU\nclass_dict"
    b"q\x12}q\x13U\tn01532829q\x14]q\x15(K\x00K\x01esu."
)
"""What Python 2's cPickle writes for `{"image_data": <uint8 [2, 3]>, "class_dict": {"n01532829": [0, 1]}}`."""

GLOBAL = {
    "array": b"cnumpy._core.multiarray\n_reconstruct\n",
    "dtype": b"cnumpy\ndtype\n",
    "frombuffer": b"cnumpy._core.numeric\n_frombuffer\n",
    "encode": b"c_codecs\nencode\n",
}
UINT8 = GLOBAL["dtype"] + b"(X\x02\x00\x00\x00u1tR"


class Reduced:
    """Pickles as a call, with these arguments, of this function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], object]:
    """Reads bytes as the pickle `data.pkl`."""

    def read(content: bytes) -> object:
        path = tmp_path / "data.pkl"
        path.write_bytes(content)
        return load_plain(path)

    return read


def refuse(read: Callable[[bytes], object], content: bytes, reason: str = "") -> None:
    with pytest.raises(FewShotError, match=rf"\A\S+data\.pkl .*{re.escape(reason)}.*; expected .*numpy arrays.*\Z"):
        read(content)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(read: Callable[[bytes], object], name: str, protocol: int) -> None:
    array = ARRAYS[name]
    content = pickle.dumps({name: [array, array]}, protocol)
    result = read(content)
    assert isinstance(result, dict)
    first, second = result[name]
    assert first is second
    assert isinstance(first, np.ndarray)
    assert first.dtype == pickle.loads(content)[name][0].dtype
    assert first.shape == array.shape
    assert np.array_equal(first, array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(read: Callable[[bytes], object], protocol: int) -> None:
    result = read(pickle.dumps(PLAIN, protocol))
    assert result == PLAIN
    assert repr(result) == repr(PLAIN)


@pytest.mark.parametrize("protocol", range(4))
def test_numpy1(read: Callable[[bytes], object], protocol: int) -> None:
    content = pickle.dumps([ARRAYS["images"], np.int64(3)], protocol)
    array, scalar = read(content.replace(b"numpy._core", b"numpy.core"))  # type: ignore[misc]
    assert b"numpy._core" in content
    assert np.array_equal(array, ARRAYS["images"])
    assert scalar == 3


def test_python2(read: Callable[[bytes], object]) -> None:
    result = read(PYTHON2)
    assert isinstance(result, dict)
    assert result["class_dict"] == {"n01532829": [0, 1]}
    assert result["image_data"].dtype == np.uint8
    assert result["image_data"].tolist() == [[0, 127, 128], [195, 169, 255]]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        (f"{os.name}.system", lambda file: Reduced(os.system, f"echo > {file}")),
        (".eval", lambda file: Reduced(eval, f"open({file!r}, 'w').close()")),
        (".exec", lambda file: Reduced(exec, f"open({file!r}, 'w').close()")),
        (".runstring", lambda file: Reduced(runstring, f"open({file!r}, 'w').close()", {})),
        (".open", lambda file: Reduced(io.open, file, "w")),
        ("numpy.memmap", lambda file: Reduced(np.memmap, file, "u1", "w+", 0, (1,))),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_code_is_refused_by_name(
    read: Callable[[bytes], object],
    tmp_path: Path,
    name: str,
    attack: Callable[[str], object],
    protocol: int,
    nested: bool,
) -> None:
    harmed = tmp_path / "harmed"
    content: object = attack(str(harmed))
    if nested:
        content = {"image_data": ARRAYS["images"], "class_dict": {"n01532829": [0, content]}}
    attacked = pickle.dumps(content, protocol)
    refuse(read, attacked, f"{name})")
    assert not harmed.exists()
    pickle.loads(attacked)
    assert harmed.exists(), "the attack would not have worked anywhere"


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("os.system", b"cos\nsystem\n(X\x04\x00\x00\x00truetR."),
        ("numpy.load", pickle.dumps(Reduced(np.load, "other.npy"))),
        ("numpy.ndarray.tofile", b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."),
        ("numpy._core.multiarray.set_typeDict", b"cnumpy._core.multiarray\nset_typeDict\n."),
        ("builtins.getattr", pickle.dumps(getattr)),
        ("collections.OrderedDict", pickle.dumps(OrderedDict(a=1))),
        ("opcode BINPERSID", b"\x80\x02X\x01\x00\x00\x00aQ."),
        ("opcode EXT1", b"\x80\x02\x82\x07."),
        ("dtype O8", pickle.dumps(np.array([{}, None], object))),
        ("dtype U1", pickle.dumps(np.array(["a"]))),
        ("dtype V5", pickle.dumps(np.zeros(2, "u1,f4"))),
        ("dtype M8", pickle.dumps(np.zeros(2, "M8[s]"))),
        ("encoding rot13", GLOBAL["encode"] + b"(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR."),
        ("it holds a Name", GLOBAL["dtype"] + b"."),
        ("it holds a Dtype", b"](}(K\x01" + UINT8 + b"ue."),
        ("it holds a Array", b"]" + GLOBAL["array"] + b"(tRa."),
        ("_no_bytes", b"cbuiltins\nbytes\n(J\x00\x00\x00\x7ftR."),
    ],
)
def test_everything_else_is_refused(read: Callable[[bytes], object], reason: str, content: bytes) -> None:
    refuse(read, content, reason)


def state(shape: bytes, data: bytes, dtype: bytes = UINT8) -> bytes:
    """A pickle of an array of that shape and content, each given as opcodes."""
    return GLOBAL["array"] + b"(tR(K\x01(" + shape + b"t" + dtype + b"\x89" + data + b"tb."


def test_state_is_read_where_it_is_sound(read: Callable[[bytes], object]) -> None:
    result = read(state(b"K\x02K\x01", b"C\x02\x05\x06"))
    assert isinstance(result, np.ndarray)
    assert result.tolist() == [[5], [6]]


@pytest.mark.parametrize(
    "content",
    [
        state(b"K\x03", b"C\x02\x05\x06"),
        state(b"K\x01", b"C\x02\x05\x06"),
        state(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff", b"C\x02\x05\x06"),
        state(b"K\x00" + 2 * (b"\x8a\x08" + struct.pack("<q", 2**62)), b"C\x00"),
        state(b"\x8a\x08" + struct.pack("<q", 2**62) + b"K\x04", b"C\x00"),
        state(b"K\x01" * 65, b"C\x01\x05"),
        state(b"X\x01\x00\x00\x00a", b"C\x01\x05"),
        state(b"K\x02", b"](K\x01K\x02e"),
        state(b"K\x01", b"X\x03\x00\x00\x00\xe2\x82\xac"),
        state(b"K\x01", b"C\x01\x05", dtype=b"N"),
        state(b"K\x01", b"C\x01\x05", dtype=UINT8 + b"(K\x03X\x01\x00\x00\x00?tb"),
        # An array whose memory is another array's, which could then be freed.
        GLOBAL["frombuffer"] + b"(" + state(b"K\x01", b"C\x01\x05")[:-1] + UINT8 + b"(K\x01tX\x01\x00\x00\x00CtR.",
        # More content than the shape has room for.
        GLOBAL["frombuffer"] + b"(C\x02\x05\x06" + UINT8 + b"(K\x01tX\x01\x00\x00\x00CtR.",
        # Attributes of the stand-ins themselves.
        GLOBAL["array"] + b"}X\x01\x00\x00\x00aK\x01sb.",
        GLOBAL["array"] + b"(N}X\x08\x00\x00\x00functionK\x01stb.",
    ],
)
def test_forged_arrays(read: Callable[[bytes], object], content: bytes) -> None:
    refuse(read, content)
    assert np.array_equal(read(pickle.dumps(ARRAYS["swapped"])), ARRAYS["swapped"])  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"\x80\x02Nr" + struct.pack("<I", 50_000_000) + b".", b"Np50000000\n."])
def test_the_memo_is_not_made_as_large_as_claimed(read: Callable[[bytes], object], content: bytes) -> None:
    tracemalloc.start()
    try:
        assert read(content) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**22


TWICE = b"(h\x00h\x00"
"""Opcodes for a mark and twice what the memo has at 0."""


def doubled(start: bytes, step: bytes) -> bytes:
    """Opcodes for something that holds `start` `2 ** 60` times, each level made by `step` of two of the one before."""
    return start + b"q\x00" + (TWICE + step + b"q\x00") * 60


ARRAY = GLOBAL["frombuffer"] + b"(h\x00" + UINT8 + b"K\x10\x85X\x01\x00\x00\x00CtR"
"""Opcodes for an array that lies in the 16 bytes which the memo has at 0."""


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        # The bytes that an array lies in are moved, and then written to.
        ("appends to a bytes", b"\x96" + struct.pack("<Q", 16) + bytes(16) + b"q\x00" + ARRAY + b"h\x00(K\x01e."),
        ("sets an item of a ndarray", b"C\x10" + bytes(16) + b"q\x00" + ARRAY + b"K\x00K\x01s."),
        # What C hashes, prints, compares or frees recursively.
        ("a key of a dict is a tuple", b"})" + b"\x85" * 200_000 + b"Ns."),
        ("a key of a dict is a tuple", doubled(b")", b"t") + b"(h\x00Nd."),
        ("opcode FROZENSET", doubled(b")", b"\x91") + b"(h\x00Nd."),
        ("opcode EMPTY_SET", b"\x8f" + doubled(b")", b"t") + b"."),
        ("nested more than 50", b"]" * 100_000 + b"a" * 99_999 + b"."),
        ("nested more than 50", b")" + b"\x85" * 100_000 + b"."),
        ("nested more than 50", b"]q\x00h\x00a."),
        ("holds more than 1,000,000 parts", b"".join([doubled(b")", b"t"), b"."])),
        # What takes a time that grows with a square.
        (
            "a key of a dict is a int",
            b"}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(9)) + b"u.",
        ),
        ("more than 10 arguments", b"(" + b"N" * 1000 + b"tq\x00" + GLOBAL["array"] + b"h\x00R."),
        (
            "many arrays of one text",
            b"X"
            + struct.pack("<I", 1000)
            + b"a" * 1000
            + b"q\x00"
            + GLOBAL["encode"]
            + b"q\x01"
            + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 200
            + b".",
        ),
        ("more than 1,000,000 opcodes", b"N" * 1_000_001 + b"."),
        # True that is neither 0 nor 1 is counted wrongly where an array is indexed by it.
        (
            "other bytes than 0 and 1",
            GLOBAL["frombuffer"]
            + b"(C\x02\x01\x05"
            + GLOBAL["dtype"]
            + b"(X\x02\x00\x00\x00b1tR"
            + b"K\x02\x85X\x01\x00\x00\x00CtR.",
        ),
    ],
)
def test_attacks(read: Callable[[bytes], object], reason: str, content: bytes) -> None:
    refuse(read, content, reason)


def test_arrays_cannot_be_changed(read: Callable[[bytes], object]) -> None:
    for protocol in range(6):
        assert not read(pickle.dumps(ARRAYS["images"], protocol)).flags.writeable  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"abc.",
        b"\x80\x02T" + struct.pack("<I", 2**31 - 1) + b"abc.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\x01.",
    ],
)
def test_claimed_sizes_are_not_believed(read: Callable[[bytes], object], content: bytes) -> None:
    refuse(read, content)


def test_truncated_anywhere(read: Callable[[bytes], object]) -> None:
    for content in (PYTHON2, pickle.dumps(ARRAYS["images"], 2), pickle.dumps(PLAIN, 5)):
        for end in range(len(content)):
            refuse(read, content[:end])


def damage(read: Callable[[bytes], object], tries: int) -> set[str]:
    """What is said of pickles with some bytes changed; those that are read are left to the garbage collector."""
    chance, messages = random.Random(0), set()
    contents = [PYTHON2, *(pickle.dumps([ARRAYS["images"], ARRAYS["bytes"], PLAIN], p) for p in range(6))]
    for _ in range(tries):
        damaged = bytearray(chance.choice(contents))
        for _ in range(chance.choice([1, 1, 2, 5])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            read(bytes(damaged))
        except FewShotError as error:
            messages.add(str(error))
    return messages


def test_damaged_anywhere(read: Callable[[bytes], object]) -> None:
    """Whatever byte is another, the result is plain or the file is named."""
    messages = damage(read, 1000)
    assert len(messages) > 100
    assert all(re.fullmatch(r"\S+data\.pkl cannot be read as plain data \(.+\); expected .+", m) for m in messages)


def test_no_memory_is_corrupted(tmp_path: Path) -> None:
    """With Python's debugging allocator, which ends the process where bytes around an object are changed."""
    code = (
        "import sys, test_pickles as tests; from pathlib import Path; path = Path(sys.argv[1]);"
        "print(len(tests.damage(lambda content: path.write_bytes(content) and tests.load_plain(path), 300)))"
    )
    environment = {**os.environ, "PYTHONMALLOC": "debug", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(tmp_path / "data.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 50


def test_of_bytes_in_memory() -> None:
    assert parse_plain(pickle.dumps(PLAIN), "some.pkl: train") == PLAIN
    with pytest.raises(FewShotError, match=r"\Asome.pkl: train cannot be read as plain data"):
        parse_plain(pickle.dumps(print), "some.pkl: train")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_list_part_by_part(tmp_path: Path, protocol: int) -> None:
    arrays = [np.frombuffer(os.urandom(300 + index % 7), np.uint8)[:, None] for index in range(2500)]
    (tmp_path / "data.pkl").write_bytes(pickle.dumps([*arrays, "end"], protocol))
    *parts, last = stream_plain(tmp_path / "data.pkl")
    assert last == "end"
    assert all(np.array_equal(part, array) for part, array in zip(parts, arrays, strict=True))


@pytest.mark.parametrize("protocol", [2, 5])
def test_the_parts_of_a_list_are_not_kept(tmp_path: Path, protocol: int) -> None:
    """5,000 parts of 10 kB: together 50 MB, and as much again for the text that they are made of."""
    with (tmp_path / "data.pkl").open("wb") as file:
        pickle.dump([np.full(10_000, index % 256, np.uint8) for index in range(5000)], file, protocol)
    tracemalloc.start()
    count = sum(part[0] == index % 256 for index, part in enumerate(stream_plain(tmp_path / "data.pkl")))  # type: ignore
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 40_000_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"a": 1}), "it is no list"),
        (pickle.dumps([1, print]), "builtins.print"),
        (pickle.dumps([*range(3000)])[:-500], ""),
        (b"](K\x01e" + b"N0" * 10, "opcode POP"),
        (b"](K\x01e" + b"N" * 1_000_001 + b".", "more than 1,000,000 opcodes for a part"),
        (pickle.dumps([text := "a" * 300, *range(1000), text]), ""),
    ],
)
def test_a_list_that_is_wrong(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "data.pkl").write_bytes(content)
    with pytest.raises(FewShotError, match=rf"\A\S+data\.pkl .*{re.escape(reason)}.*; expected .*numpy arrays.*\Z"):
        list(stream_plain(tmp_path / "data.pkl"))


def test_missing_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    for path in (tmp_path / "none.pkl", tmp_path, tmp_path / "pipe.pkl"):
        with pytest.raises(FewShotError, match=re.escape(str(path))):
            load_plain(path)
