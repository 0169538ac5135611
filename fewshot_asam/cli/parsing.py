"""Typed dataclasses to command lines, and every mistake to one line and exit status 2."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import warnings
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from fewshot_asam.cli.surroundings import end_process, lasting_streams, lost
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime import distributed
from fewshot_asam.runtime.distributed import PeerLost
from fewshot_asam.runtime.imports import comes_from_imported, said_by
from fewshot_asam.runtime.signals import Stopped
from fewshot_asam.runtime.yaml_settings import expanded, explained, nearest, read_yaml, require_known, require_plain
from fewshot_asam.version import __version__

LONGEST = 2000
"""Characters of an error; what is longer loses its middle."""


METAVARS = ((int, "N"), (float, "X"), (Path, "PATH"), (str, "TEXT"))
"""How the help names a value of a type that is no choice."""


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with a usage of one line, the description as it is written, and defaults but no Python types."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"max_help_position": 34, **options})  # type: ignore[no-untyped-call]

    def _format_usage(self, usage: str | None, actions: Iterable[Action], *rest: Any, **options: Any) -> str:
        positional = [action for action in actions if not action.option_strings]
        return super()._format_usage(usage, positional, *rest, **options).rstrip() + " [options]\n\n"

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").strip()
        if action.default is None or action.default is SUPPRESS or action.nargs == 0 or not action.option_strings:
            return text
        default = f"(default: {_text(action.default)})"
        return (
            text if text.endswith(default) else f"{text} {default}".lstrip()
        )  # jsonargparse asks twice without a text


class Parser(ArgumentParser):
    """A parser whose mistakes are `FewShotError`s.

    **Arguments:**

    - `prog`: the command's name.
    - `description`: its module's docstring: what it does in one line, and examples.
    """

    def __init__(self, *, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, version=__version__, formatter_class=Help)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise FewShotError(f"{explained(message, types(self))}{_meant(message, self)} (--help lists the options)")


def types(parser: Parser) -> dict[str, Any]:
    """The type of each of the parser's settings, by name."""
    return {action.dest: hint for action in parser._actions if (hint := getattr(action, "_typehint", None)) is not None}


def add_settings(
    parser: Parser, settings: type, headings: Mapping[str, str] | None = None, without: Collection[str] = ()
) -> None:
    """One option for each field of a dataclass: `inner_lr` becomes `--inner-lr`, its docstring the help.

    **Arguments:**

    - `headings`: the titles of the help's groups, each by the first field of its group; a group ends where the next
      begins. Fields before the first heading are among the parser's own options.
    - `without`: fields that are no options.

    A field whose metadata say `flag: False` is no option either.

    Raises `FewShotError` for a field that has no default, or whose option there is already.
    """
    hints = get_type_hints(settings)
    documented = docstring_parser.parse_from_object(settings).params
    helps = {param.arg_name: (param.description or "").replace("\n", " ") for param in documented}
    group: Any = parser
    for field in fields(settings):
        if title := (headings or {}).get(field.name):
            group = parser.add_argument_group(title)
        if field.name in without or not field.metadata.get("flag", True):
            continue
        option = f"--{field.name.replace('_', '-')}"
        if field.default is MISSING:
            raise FewShotError(f"{settings.__name__}.{field.name} has no default; expected one for {option}")
        if option in parser._option_string_actions:
            raise FewShotError(
                f"{settings.__name__}.{field.name}: there is an option {option} already; rename the field"
            )
        hint = hints[field.name]
        choices = list(field.metadata.get("choices", ())) or _choices(hint)
        shown = _metavar(hint, choices)
        action = group.add_argument(option, type=hint, default=field.default, help=helps.get(field.name), **shown)
        if choices:
            action.completer = partial(_complete, choices)


def _metavar(hint: Any, choices: Sequence[str]) -> dict[str, str]:
    """What stands for a value of this type in the help; nothing where jsonargparse's own is as good."""
    if choices:
        return {"metavar": f"{{{','.join(choices)}}}" + (_other(hint) if _choices(hint) else "")}
    names = [name for part in get_args(hint) or (hint,) for kind, name in METAVARS if part is kind][:1]
    return {"metavar": names[0]} if names else {}


def _other(hint: Any) -> str:
    """What a setting of this type may be beside the words that it has choices of."""
    return "".join(f" or {name}" for kind, name in METAVARS if kind in get_args(hint))


def _choices(hint: Any) -> list[str]:
    """The words that a setting of this type may be, where it is one of some."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return [str(value) for literal in literals for value in get_args(literal)]


def _complete(choices: list[str], **_: object) -> list[str]:
    """What argcomplete proposes to a shell."""
    return choices


def run(command: Callable[[Sequence[str]], object], argv: Sequence[str] | None, several: bool = True) -> int:
    """Calls `command` with the arguments, as one process of a job where there is one and `several` are allowed.

    **Returns:** the exit status: 0, 2 for bad input, 128 and its number where a signal ended the run.
    """
    words = sys.argv[1:] if argv is None else argv

    def joined() -> int:
        if not several and distributed.announced() > 1:
            raise FewShotError("this command was started as several processes; expected one: start it without torchrun")
        with distributed.joined():
            return _status(lambda: command(words))

    with lasting_streams(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        status = _status(joined)
        if status == 0 and (reason := lost()):
            status = _fail(f"standard output cannot be written ({reason}), so what was printed is lost")
    if argv is None and distributed.was_joined:
        end_process(status)
    return status


def _status(work: Callable[[], object]) -> int:
    """The exit status of `work`, which returns one or nothing; its mistakes are said in one line."""
    try:
        status = work()
        return status if isinstance(status, int) else 0
    except FewShotError as error:
        if isinstance(error, PeerLost):
            return _fail(_own(str(error)))
        return _fail(str(error)) if distributed.is_first() else 2  # all processes have it, so one says it
    except OSError as error:
        return _fail(_own(str(error)))
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error)):
            return _fail(_own("the memory is full; lower meta_batch_size, hidden, inner_steps or image_size"))
        if comes_from_imported(error):
            return _fail(_own(f"code of your own failed ({said_by(error)})"))
        raise
    except KeyboardInterrupt as error:
        if distributed.is_first():
            print(str(error) or "interrupted", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


def _own(message: str) -> str:
    """A message that is of this process alone."""
    return f"process {distributed.rank()}: {message}" if distributed.size() > 1 else message


def _fail(message: str) -> int:
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return 2


def parse(parser: Parser, argv: Sequence[str]) -> Any:
    """The parsed namespace, `~` expanded; whatever jsonargparse prints or raises becomes a `FewShotError`."""
    _require_values(argv)
    files, flags = _files_apart(argv) if "--config" in parser._option_string_actions else ([], list(argv))
    given = _parsed(parser, [word for file in files for word in _flags(parser, Path(file))] + flags)
    for name in types(parser):
        if isinstance(given[name], Path):
            given[name] = expanded(given[name])
    return given


def said(argv: Sequence[str], name: str) -> str:
    """What the words, or a file that they name by `--config`, say last of one setting; empty where nothing."""
    _require_values(argv)
    files, flags = _files_apart(argv)
    option, found = f"--{name.replace('_', '-')}", ""
    for file in files:
        found = str(read_yaml(Path(file)).get(name, found))
    for word, after in zip(flags, [*flags[1:], ""], strict=False):
        found = after if word == option else word.removeprefix(f"{option}=") if word.startswith(f"{option}=") else found
    return found


def _files_apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files named by `--config`, and the other words."""
    files, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif word == "--config" and (file := next(words, None)) is not None:
            files.append(file)
        else:
            rest.append(word)
    return files, rest


def _flags(parser: Parser, file: Path) -> list[str]:
    """The settings of a YAML file as flags, each of them known and of its type."""
    read = read_yaml(file)
    nested = read.pop("inner_settings", {})  # as a run's config.yaml has the settings of somebody's rule
    read |= nested if isinstance(nested, dict) else {"inner_settings": nested}
    require_known(read, types(parser), str(file))
    flags = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in read.items()]
    try:
        _require_values(flags)
        _parsed(parser, flags)
    except FewShotError as error:
        raise FewShotError(f"{file}: {error}") from error
    return flags


def _text(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def _require_values(words: Sequence[str]) -> None:
    """Raises for an empty value, which no setting has; as a path it would be the current folder."""
    for before, word in zip(["", *words], words, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            option = word or (before if before.startswith("--") else "an argument")
            raise FewShotError(f"{option.rstrip('=')} is empty; expected a value")


def _parsed(parser: Parser, words: Sequence[str]) -> Any:
    for word in words:
        option, _, value = word.partition("=") if word.startswith("--") else ("", "", word)
        require_plain(option or shlex.quote(word)[:80], value)
    try:
        return parser.parse_args(list(words))
    except (TypeError, ValueError, OSError, RecursionError) as error:
        raise FewShotError(f"{explained(str(error), types(parser))} (--help lists the options)") from error


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if distributed.is_first():
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _meant(message: str, parser: Parser) -> str:
    """What may have been meant by the first option in `message` that there is not, or by a value without its option."""
    known = list(parser._option_string_actions)
    options = [word.partition("=")[0].rstrip(":") for word in message.split() if word.startswith("--")]
    if options:
        return nearest(options[0], known) if options[0] not in known else ""
    given = message.partition("unrecognized arguments: ")[2].split()[:1]
    meant = [
        f"--{name.replace('_', '-')} {given[0]}"
        for name, hint in types(parser).items()
        if given and given[0] in _choices(hint)
    ]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""
