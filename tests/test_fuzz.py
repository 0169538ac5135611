"""Random and damaged files: whatever they hold, a loader returns something valid or raises `FewShotError`.

`FEWSHOT_ASAM_FUZZ=20000 pytest tests/test_fuzz.py` tries so many a loader.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewshot_asam.cli import parsing, train_maml
from fewshot_asam.data import folder, mini_imagenet
from fewshot_asam.data.mini_imagenet import Sizes
from fewshot_asam.data.pickles import load_plain
from fewshot_asam.errors import FewShotError
from fewshot_asam.training.config import TrainConfig, from_yaml, to_yaml
from test_pickles import ARRAYS, GLOBAL, PLAIN, PYTHON2, UINT8

EXAMPLES = int(os.environ.get("FEWSHOT_ASAM_FUZZ", "100"))
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

YAMLS = [to_yaml(TrainConfig()).encode(), to_yaml(TrainConfig(inner="maml", rho1=0.1, data_root=Path("a"))).encode()]
FLAGS = [
    b"inner: maml\nways: 20\nshots: 1\ninner_lr: 0.1\nsplit_fractions: [0.6, 0.2, 0.2]\n",
    b"{ways: 5, 'data_root': \"a\", clip_grad: null, first_order: yes}",
    *YAMLS,
]
CLASSES = {name: [f"{name}/0.png"] for name in "abcde"}
SPLITS = [b"class,split\na,train\nb,train\nc,val\nd,test\ne,test\n", b'\xef\xbb\xbfclass,split\r\n"a", train\r\n\r\n']
SIZES = Sizes(train=2, val=2, test=2, per_class=2)
TABLES = [b"filename,label\na0.jpg,a\nb0.jpg,b\na1.jpg,a\nb1.jpg,b\n", b'filename,label\r\n"a,0.jpg",a\r\n']
PICKLES = [
    PYTHON2,
    *(pickle.dumps({"image_data": ARRAYS["images"], "class_dict": {"n1": [0, 1]}}, p) for p in range(6)),
    *(pickle.dumps([ARRAYS["bytes"], ARRAYS["swapped"], PLAIN], p) for p in (0, 2, 5)),
]
TOKENS = {
    "yaml": [
        *(b"&a ", b"*a", b"- ", b": ", b"? ", b"<<: ", b"---\n", b"[", b"{", b"|", b"\t", b"0x", b".nan", b"~"),
        *(b"\nseed: !!int ''\n", b"\nseed: !!timestamp x\n", b"\nseed: !!bool x\n", b"\nseed: 2020-99-99\n"),
    ],
    "csv": [b'"', b",", b"\n", b"\r", b"\0", b"../", b"\xff", b"a" * 140_000],
    "pickle": [
        *(
            b"l",
            b"d",
            b"i",
            b"o",
            b"0",
            b"2",
            b"]",
            b"}",
            b"a",
            b"e",
            b"s",
            b"u",
            b"t",
            b"R",
            b"b",
            b"(",
            b")",
            b"\x85",
            b"\x86",
            b"\x94",
            b".",
        ),
        *(b"h\x00", b"h\x01", b"q\x00", b"K\x05", b"\x81", b"\x93", b"\x8f", b"\x91", b"cos\nsystem\n"),
        *GLOBAL.values(),
        *(UINT8, b"C\x02ab", b"\x96\x02\0\0\0\0\0\0\0ab", b"K\x02\x85X\x01\0\0\0CtR"),
    ],
}


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes], tokens: list[bytes]) -> bytes:
    """A valid file after one to four changes."""
    content = draw(st.sampled_from(whole))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(start + 20, len(content))))
        kind = draw(st.sampled_from(["flip", "delete", "insert", "token", "splice", "truncate"]))
        if kind == "flip":
            flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in content[start : start + 1])
            content = content[:start] + flipped + content[start + 1 :]
        elif kind == "truncate":
            content = content[:start]
        elif kind == "splice":
            other = draw(st.sampled_from(whole))
            content = content[:start] + other[draw(st.integers(0, len(other))) :]
        else:
            new = {"delete": st.just(b""), "insert": st.binary(max_size=8), "token": st.sampled_from(tokens)}[kind]
            content = content[:start] + draw(new) + content[end if kind == "delete" else start :]
    return content


def files(whole: list[bytes], kind: str) -> st.SearchStrategy[bytes]:
    """Valid files changed, mostly; also random bytes and text."""
    changed = damaged(whole, TOKENS[kind])
    return st.one_of(changed, changed, st.binary(max_size=200), st.text(max_size=100).map(lambda t: t.encode()))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """A Mini-ImageNet of two classes of two images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_imagenet, "EXPECTED", SIZES)
        yield


def outcome(load: Callable[[], Any], valid: Callable[[Any], bool]) -> None:
    """Loads; what is returned is valid, and nothing is raised but the one family."""
    try:
        result = load()
    except FewShotError:
        return
    assert valid(result)


def test_valid_files_are_valid(file: Path) -> None:
    """So that the changes start from something that is read."""
    for content in YAMLS:
        file.write_bytes(content)
        assert isinstance(from_yaml(file), TrainConfig)
    for content in FLAGS:
        file.write_bytes(content)
        assert parsing._flags(train_maml._parser(TrainConfig()), file)
    file.write_bytes(SPLITS[0])
    assert folder._split_by_csv(file, CLASSES) == [["a", "b"], ["c"], ["d", "e"]]
    assert mini_imagenet._listing(TABLES[0], "x", "val") == {"a": ["a0.jpg", "a1.jpg"], "b": ["b0.jpg", "b1.jpg"]}
    for content in PICKLES:
        file.write_bytes(content)
        load_plain(file)


@given(content=files(YAMLS, "yaml"))
@fuzzed
def test_stored_settings(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    outcome(lambda: from_yaml(file), lambda config: isinstance(config, TrainConfig))


@pytest.fixture(scope="module")
def parser() -> parsing.Parser:
    return train_maml._parser(TrainConfig())


@given(content=files(FLAGS, "yaml"))
@fuzzed
def test_settings_files(file: Path, parser: parsing.Parser, content: bytes) -> None:
    file.write_bytes(content)
    outcome(lambda: parsing.parse(parser, ["--config", str(file)]), lambda given: given["ways"] is not None)


@given(content=files(SPLITS, "csv"))
@fuzzed
def test_splits_of_a_folder(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    outcome(
        lambda: folder._split_by_csv(file, CLASSES),
        lambda names: sorted(name for part in names for name in part) == sorted(CLASSES),
    )


@given(content=files(TABLES, "csv"))
@fuzzed
def test_tables_of_mini_imagenet(content: bytes) -> None:
    outcome(
        lambda: mini_imagenet._listing(content, "val.csv", "val"),
        lambda listing: [len(images) for images in listing.values()] == [2, 2],
    )


def plain(value: object) -> bool:
    """Whether this is plain data, which can be printed, copied and freed however it is nested."""
    todo = [copy.deepcopy(value)]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            todo += part
        elif not isinstance(part, np.ndarray | np.generic | str | bytes | int | float | None):
            return False
    return repr(value) != ""


@given(content=files(PICKLES, "pickle"))
@fuzzed
def test_pickles(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    outcome(lambda: load_plain(file), plain)
