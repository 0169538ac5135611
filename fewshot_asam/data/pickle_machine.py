"""The stack machine that takes a pickle's opcodes, and calls nothing of the pickle's choice.

`pickletools` takes the file apart and a stack machine of our own puts it together. Python's own unpickler, even where
it finds no function to call, hashes tuples nested a million deep and changes the bytes that an array lies in.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 1_000_000
"""Opcodes of a pickle, and parts of what it holds: three times what Mini-ImageNet's has with numpy's integers."""
MOST_ARGUMENTS = 10
"""Of a function and parts of an object's state; a dtype's are nine."""
SHORT = 256
"""Bytes of a text that may be given to functions any number of times."""
PLAIN_DTYPE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|S[1-9]\d{0,8}")

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Opcodes whose argument is the value."""
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """Pickle's stack machine, in which nothing is called but `_CALLS` and nothing changes but lists and dicts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = 2 * size  # bytes of long texts that functions may still be given
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.forgotten = 0  # entries that the memo had

    def run(self, file: Any) -> object:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number >= MOST:
                raise UnpicklingError(f"it has more than {MOST:,} opcodes")
            self._step(opcode.name, argument)
        return self.stack.pop()

    def parts(self, file: Any) -> Iterator[Any]:
        """The parts of the list that the pickle is; each is forgotten when the next one is asked for."""
        number = 0
        for opcode, argument, _ in pickletools.genops(file):
            if (number := number + 1) > MOST:
                raise UnpicklingError(f"it has more than {MOST:,} opcodes for a part")
            self._step(opcode.name, argument)
            if opcode.name in ("APPEND", "APPENDS") and len(self.stack) == 1 and self.stack[0]:
                number, given = 0, self.stack[0][:]
                self.stack[0].clear()
                self._forget()
                yield from given
                del given
        if type(self.stack.pop()) is not list:
            raise UnpicklingError("it is no list")

    def _forget(self) -> None:
        """Leaves in the memo the list itself and what all its parts are made of."""
        kept = {
            key: value
            for key, value in self.memo.items()
            if value is self.stack[0]
            or isinstance(value, _Name | _Dtype)
            or (isinstance(value, str | bytes) and len(value) <= SHORT)
        }
        self.forgotten += len(self.memo) - len(kept)
        self.memo = kept

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        else:
            match name:
                case "PROTO" | "STOP":
                    pass
                case "FRAME":
                    if argument > self.size:
                        raise UnpicklingError(f"it has no frame of {argument:,} bytes")
                case "BYTEARRAY8":
                    stack.append(bytes(argument))
                case "MARK":
                    self.marks.append(len(stack))
                case "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append([] if name == "EMPTY_LIST" else {})
                case "LIST" | "TUPLE":
                    parts = self._pop_marked()
                    stack.append(parts if name == "LIST" else tuple(parts))
                case "DICT":
                    parts = self._pop_marked()
                    stack.append({})
                    self._set(parts)
                case "APPEND" | "APPENDS":
                    self._extend(self._pop(1) if name == "APPEND" else self._pop_marked())
                case "SETITEM" | "SETITEMS":
                    self._set(self._pop(2) if name == "SETITEM" else self._pop_marked())
                case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                    self.memo[len(self.memo) + self.forgotten if name == "MEMOIZE" else argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(_filled(self.memo[argument]))
                case "GLOBAL":
                    stack.append(_Name(argument))
                case "STACK_GLOBAL":
                    stack.append(_Name(" ".join(self._pop(2))))
                case "REDUCE":
                    function, arguments = self._pop(2)
                    self._charge(arguments)
                    stack.append(function.call(*arguments))
                case "BUILD":
                    built, state = self._pop(2)
                    self._charge(state)
                    built.build(state)
                    stack.append(_filled(built))
                case _:
                    raise UnpicklingError(f"it uses the opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise UnpicklingError("it takes more from its stack than is there")
        return [self.stack.pop() for _ in range(count)][::-1]

    def _pop_marked(self) -> list[Any]:
        return self._pop(max(0, len(self.stack) - self.marks.pop()))

    def _extend(self, parts: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UnpicklingError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(parts)

    def _set(self, parts: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise UnpicklingError(f"it sets an item of a {type(self.stack[-1]).__name__}")
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            # Other integers can be made to have all the same hash, and other keys to be hashed for ever.
            if type(key) not in (str, bytes) and not (type(key) is int and abs(key) < 2**63):
                raise UnpicklingError(f"a key of a dict is a {type(key).__name__}")
            self.stack[-1][key] = value

    def _charge(self, arguments: tuple[Any, ...]) -> None:
        """Raises where functions are given many arguments, or one long text, which they copy, again and again."""
        if type(arguments) is not tuple or len(arguments) > MOST_ARGUMENTS:
            raise UnpicklingError(f"it calls a function with more than {MOST_ARGUMENTS} arguments")
        lengths = (len(value) for value in arguments if isinstance(value, str | bytes))
        self.left -= sum(length for length in lengths if length > SHORT)
        if self.left < 0:
            raise UnpicklingError("it makes many arrays of one text")


class _Dtype:
    """Stands in for `numpy.dtype`. Numbers and bytes only.

    Text is left out, as numpy does not check its code points and Python fails on those that do not exist.
    """

    def __init__(self, code: str, *_: object) -> None:
        if not PLAIN_DTYPE.fullmatch(code):
            raise UnpicklingError(f"it asks for an array of dtype {code}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def build(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for an array that gets its content later."""

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] | None = None

    def build(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        array = _frombuffer(data, dtype, shape, "F" if fortran else "C")
        self.array = array.astype(array.dtype.newbyteorder("="), copy=False)  # as numpy does


def _filled(value: Any) -> Any:
    """The array that this stands in for, once it has its content; anything else as it is."""
    return value.array if isinstance(value, _Array) and value.array is not None else value


def _frombuffer(
    data: object, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> NDArray[Any]:
    """An array that lies in `data`, which nothing can change; of order `"K"` it is transposed to `axes`."""
    content = _bytes(data)
    inner: Any = "C" if order == "K" else order
    array: NDArray[Any] = np.ndarray(shape, dtype.dtype, content, order=inner)
    if array.nbytes != len(content):
        raise UnpicklingError(f"an array of {array.nbytes} bytes has {len(content)} bytes of content")
    if dtype.dtype.kind == "b" and content.strip(b"\0\1"):
        raise UnpicklingError("an array of bool has other bytes than 0 and 1")
    return array.transpose(axes) if order == "K" and axes is not None else array


def _scalar(dtype: _Dtype, data: object) -> object:
    return _frombuffer(data, dtype, (), "C")[()]


def _bytes(data: object) -> bytes:
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, bytes):
        return data
    raise UnpicklingError(f"the content of an array is {type(data).__name__}, not bytes")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_CALLS: dict[str, Callable[..., object] | None] = {
    "numpy ndarray": None,
    "numpy dtype": _Dtype,
    "numpy._core.multiarray _reconstruct": _Array,
    "numpy._core.multiarray scalar": _scalar,
    "numpy._core.numeric _frombuffer": _frombuffer,
    "_codecs encode": _encode,
    "builtins bytes": _no_bytes,
    "__builtin__ bytes": _no_bytes,
}


@dataclass(frozen=True)
class _Name:
    """A name that a pickle asks for, as `module name`."""

    text: str

    def __post_init__(self) -> None:
        if self.known not in _CALLS:
            raise UnpicklingError(f"it asks for {self.text.replace(' ', '.')}")

    @property
    def known(self) -> str:
        """The name in numpy 2."""
        return self.text.replace("numpy.core.", "numpy._core.")

    def call(self, *arguments: object) -> object:
        function = _CALLS[self.known]
        if function is None:
            raise UnpicklingError(f"it calls {self.text}")
        return function(*arguments)
