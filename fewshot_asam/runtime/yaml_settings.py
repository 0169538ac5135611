"""Settings as people write them: strictly read YAML, home folders, and what is wrong with a value in plain words."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.files import open_regular

Record = TypeVar("Record")

LARGEST_FILE = 20_000
"""Bytes; a file of settings has about a thousand."""
DEEPEST = 3
"""Levels of nesting; YAML takes time that grows with their square."""
MOST_BITS = 128
"""Of a whole number: more is no setting, and more than 14,000 cannot be written."""
LONGEST_VALUE = 200
"""Characters of a value that is shown."""
END = "# the end: nothing was cut off\n"
"""The last line of a file of all settings."""
_REFUSED = re.compile(r'key "(?P<name>\w+)":\s.*(?:Got|Given) value: (?P<value>.*)', re.DOTALL)
"""How jsonargparse says that a value has not the type of its setting."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""What jsonargparse reads values with."""
_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    str: "text",
    dict: "names and values",
}


def read_yaml(path: Path, deepest: int = DEEPEST) -> dict[str, object]:
    """The names and values of a YAML file of settings; tags, aliases and repeated names are refused.

    Lists and mappings may stand in one another `deepest` deep.

    Raises `FewShotError` naming the file and, where there is one, the line.
    """
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise FewShotError(f"{path} has more than {LARGEST_FILE:,} bytes; expected a YAML file of settings")
        text = content.decode("utf-8-sig")
        _require_plain(path, text, deepest)
        read = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise FewShotError(f"{path} does not exist; expected a YAML file of settings") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FewShotError(f"{path} is not a YAML file of settings ({_reason(error)})") from error
    if not isinstance(read, dict):
        raise FewShotError(f"{path} does not hold settings; expected lines of a name and a value, such as 'ways: 5'")
    return read


def is_whole(path: Path) -> bool:
    """Whether a file of all settings has its last line still."""
    with open_regular(path) as file:
        return END.encode() in file.read(LARGEST_FILE)


def require_plain(what: str, value: object) -> None:
    """Raises `FewShotError` for a value that would grow if its text were read as YAML, as jsonargparse reads it."""
    if not _is_plain(value, 1):
        raise FewShotError(f"{what} is nested or has a YAML alias or tag; expected a plain value")


def require_known(names: Collection[object], known: Collection[str], origin: str) -> None:
    """Raises `FewShotError` for the first of `names` that is not `known`, with the one that may have been meant."""
    for name in names:
        if name not in known:
            raise FewShotError(f"{origin}: there is no setting {str(name)!r}{nearest(str(name), known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?`, or nothing where no known name is like this one."""
    plain = {_plain(key): key for key in known}
    wanted = _plain(name)
    close = [key for key in plain if wanted in key.split("_")] or difflib.get_close_matches(wanted, plain, 1)
    return f"; did you mean {' or '.join(plain[key] for key in close)}?" if close else ""


def explained(message: str, types: dict[str, Any]) -> str:
    """jsonargparse's message on one line; where it refuses a value, in our words."""
    refused = _REFUSED.search(message)
    if refused is None or refused["name"] not in types:
        return " ".join(message.split())
    name, value = refused["name"], refused["value"].strip()
    return f"{name} is {value!r}; expected {_described(types[name])}{nearest(value, _choices(types[name]))}"


def conforming(name: str, value: object, kind: Any) -> Any:
    """The value of a setting as its type has it; numpy's numbers, whole ones for numbers and text for paths will do.

    Raises `FewShotError` in the words of the command line where it is of another type.
    """
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        with suppress(TypeError, ValueError, OverflowError):
            return _fitted(value, part)
    hint = nearest(value, _choices(kind)) if isinstance(value, str) else ""
    raise FewShotError(f"{name} is {_shown(value)}; expected {_described(kind)}{hint}")


def filled(kind: type[Record], values: object, origin: str) -> Record:
    """A dataclass of plain values from a mapping that names all its fields and no others.

    Raises `FewShotError` in which `origin` is said.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or values.keys() != hints.keys():
        raise FewShotError(f"{origin} is {_shown(values)}; expected values of {', '.join(hints)}")
    return kind(**{name: conforming(f"{origin}: {name}", values[name], hints[name]) for name in hints})


def expanded(path: Path) -> Path:
    """The path with a leading `~` or `~user` as that home folder; raises `FewShotError` where there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise FewShotError(f"{path} begins with a home folder that is not known; write it out") from error


def _fitted(value: Any, kind: Any) -> Any:
    """The value as one of this type, which is no union; raises what `conforming` suppresses where it is none."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return choices[choices.index(_fitted(value, type(choices[0])))]
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_fitted(*pair) for pair in zip(value, kinds, strict=True))
    if kind is Path and os.fspath(value):
        return expanded(Path(value))
    abstract = {int: Integral, float: Real}.get(kind, get_origin(kind) or kind)
    if not isinstance(value, abstract) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    if kind is int and int(value).bit_length() > MOST_BITS:
        raise OverflowError
    return None if value is None else kind(value)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        text = "a number of very many digits"
    return text if len(text) < LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _require_plain(path: Path, text: str, deepest: int) -> None:
    """Raises for what a file of settings has no use for, and what could make it larger than it looks."""
    if odd := _first_odd(yaml.parse(text, yaml.SafeLoader), deepest):
        where = f"{path} line {_line(odd.start_mark)}"
        raise FewShotError(f"{where} is nested or has a YAML alias or tag; expected names and plain values")
    if root := yaml.compose(text, yaml.SafeLoader):
        _require_once(path, root)


def _first_odd(events: Iterable[yaml.Event], deepest: int) -> yaml.Event | None:
    """Where collections are first nested more than `deepest` deep, or an alias or a tag is given."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > deepest or isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            return event
    return None


def _is_plain(value: object, deepest: int) -> bool:
    """Whether a text is a scalar, or a collection of them where `deepest` is 1; and so are the texts in a list."""
    if isinstance(value, list | tuple):
        return all(_is_plain(part, 0) for part in value)
    if not isinstance(value, str):
        return True
    with suppress(yaml.YAMLError):  # such text is left as it stands
        if _first_odd(yaml.parse(value, _LOADER), deepest):
            return False
        scalars = [event.value for event in yaml.parse(value, _LOADER) if isinstance(event, yaml.ScalarEvent)]
        return deepest == 0 or all(_is_plain(text, 0) for text in scalars)
    return True


def _require_once(path: Path, node: yaml.Node) -> None:
    """Raises for a name that a mapping gives twice, at any depth."""
    seen: set[str] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key.value, str) and key.value in seen:
            raise FewShotError(f"{path} line {_line(key.start_mark)} gives {key.value} again; expected it once")
        seen.add(str(key.value))
        _require_once(path, value)


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return f"line {_line(error.problem_mark)}: {error.problem}"
    return " ".join(str(error).split()) or type(error).__name__


def _line(mark: Any) -> int:
    return mark.line + 1 if mark else 1


def _plain(name: str) -> str:
    return name.strip("-").lower().replace("-", "_").replace("learning_rate", "lr")


def _choices(kind: Any) -> list[str]:
    """The words that a setting of this type may be, where it is one of some."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _described(kind: Any) -> str:
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        words = ", ".join(map(str, parts))
        return words if len(parts) == 1 else f"one of {words}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_described, parts))
    if get_origin(kind) is tuple:
        return f"a list{'' if Ellipsis in parts else f' of {len(parts)}'}, each {_described(parts[0])}"
    return _TYPES.get(get_origin(kind) or kind, str(kind))
