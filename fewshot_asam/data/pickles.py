"""Reading pickles of plain data and numpy arrays without giving the file a way to run code."""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewshot_asam.errors import FewShotError

PLAIN = "only numpy arrays, dict, list, tuple, str, bytes, int, float, bool and None"
_PARTS = (np.ndarray, np.generic, str, bytes, bytearray, int, float, type(None))
PLAIN_DTYPE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|S[1-9]\d{0,8}")


def load_plain(path: Path) -> object:
    """The content of a pickle, of any protocol and of Python 2 or 3, that holds plain data and numpy arrays.

    Every name that the pickle asks for is refused, except those that arrays are made of; and those do not give it
    numpy's own functions, but stand-ins that check what they are given. The `str` of Python 2 is read as latin1.

    Raises `FewShotError` where the file asks for anything else, is truncated or damaged, claims sizes that it does
    not hold, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            _check_sizes(file)
            file.seek(0)
            content: object = _PlainUnpickler(file, encoding="latin1").load()
        _require_plain(content)
        return content
    # What a damaged pickle raises is open-ended: any of its opcodes may meet any object.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FewShotError(
            f"{path} cannot be read as plain data ({reason}); expected a complete pickle of {PLAIN}"
        ) from error


def _check_sizes(file: BinaryIO) -> None:
    """Raises where a size or a memo index is more than the file can hold.

    `Unpickler` allocates what either of them claims before it looks further: gigabytes for a file of ten bytes.
    """
    for position, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > position:
            raise pickle.UnpicklingError(f"memo index {argument} before as many objects")


def _require_plain(content: object) -> None:
    """Raises where a part of `content` is something else, such as a stand-in that was never called."""
    seen, todo = set(), [content]
    while todo:
        value = todo.pop()
        if type(value) in (dict, list, tuple, set, frozenset):
            parts: Any = value
            if id(value) not in seen:
                todo += [*parts, *(parts.values() if isinstance(parts, dict) else ())]
            seen.add(id(value))
        elif not isinstance(value, _PARTS):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')}")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        stand_in = _STAND_INS.get((module.replace("numpy.core.", "numpy._core."), name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_in


class _Dtype:
    """Stands in for `numpy.dtype`, whose own `__setstate__` trusts its argument. Numbers and bytes only.

    Text is left out, as numpy does not check its code points and Python fails on those that do not exist.
    """

    def __init__(self, code: str, *_: object) -> None:
        if not PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"it asks for an array of dtype {code}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """Stands in for an array that gets its content later: the same, but checks the content first."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        content: Any = _bytes(data)
        checked = _frombuffer(content, dtype, shape, "C")
        super().__setstate__((1, checked.shape, checked.dtype, fortran, content))


def _reconstruct(*_: object) -> NDArray[Any]:
    return _Array((0,), np.uint8)


def _frombuffer(data: object, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    content = _bytes(data)
    array: NDArray[Any] = np.ndarray(shape, dtype.dtype, content, order=order)
    if array.nbytes != len(content):
        raise pickle.UnpicklingError(f"an array of {array.nbytes} bytes has {len(content)} bytes of content")
    return array


def _scalar(dtype: _Dtype, data: object) -> object:
    return _frombuffer(data, dtype, (), "C")[()]


def _bytes(data: object) -> bytes | bytearray:
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, bytes | bytearray):
        return data
    raise pickle.UnpicklingError(f"the content of an array is {type(data).__name__}, not bytes")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


class _StandIn(NamedTuple):
    """Something that a pickle may call but, unlike a function's attributes, not change."""

    function: Callable[..., object]

    def __call__(self, *args: object) -> object:
        return self.function(*args)


_STAND_INS: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy._core.multiarray", "_reconstruct"): _StandIn(_reconstruct),
    ("numpy._core.multiarray", "scalar"): _StandIn(_scalar),
    ("numpy._core.numeric", "_frombuffer"): _StandIn(_frombuffer),
    ("_codecs", "encode"): _StandIn(_encode),
    ("builtins", "bytes"): _StandIn(_no_bytes),
    ("__builtin__", "bytes"): _StandIn(_no_bytes),
}
