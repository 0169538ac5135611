"""Typed dataclasses to command lines, and every mistake to one line and exit status 2."""

from __future__ import annotations

import difflib
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from fewshot_asam import distributed
from fewshot_asam.distributed import PeerLost
from fewshot_asam.errors import FewShotError
from fewshot_asam.stop import Stopped


class Parser(ArgumentParser):
    """A parser whose mistakes are `FewShotError`s."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise FewShotError(_one_line(message, [option for action in self._actions for option in action.option_strings]))


def add_settings(parser: Parser, settings: type) -> None:
    """One option for each field of a dataclass: `inner_lr` becomes `--inner-lr`, its docstring the help."""
    hints = get_type_hints(settings)
    documented = docstring_parser.parse_from_object(settings).params
    helps = {param.arg_name: (param.description or "").replace("\n", " ").replace("%", "%%") for param in documented}
    for field in fields(settings):
        if field.default is MISSING:
            raise TypeError(f"{settings.__name__}.{field.name} needs a default")
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=hints[field.name],
            default=field.default,
            help=helps.get(field.name),
        )


def config_first(argv: Sequence[str]) -> list[str]:
    """The same arguments with `--config FILE` in front, so that every flag overrides the file."""
    front, rest = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            front += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word.startswith("--config="):
            front.append(word)
        else:
            rest.append(word)
    return front + rest


def run(command: Callable[[Sequence[str]], object], argv: Sequence[str] | None) -> int:
    """Calls `command` with the arguments, as one process of a job where there is one.

    **Returns:** the exit status: 0, 2 for bad input, 128 and its number where a signal ended the run.
    """
    warnings.showwarning = _show_warning
    try:
        with distributed.joined():
            command(sys.argv[1:] if argv is None else argv)
    except PeerLost as error:
        return _fail(str(error))
    except FewShotError as error:
        return _fail(str(error)) if distributed.is_first() else 2  # all processes have it, so one says it
    except OSError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return _fail("the memory is full; lower meta_batch_size, hidden, inner_steps or image_size")
    except KeyboardInterrupt as error:
        if distributed.is_first():
            print(str(error) or "interrupted", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    return 0


def _fail(message: str) -> int:
    where = f"process {distributed.rank()}: " if distributed.size() > 1 else ""
    with suppress(OSError):  # the disk may be full that this is written to
        print(f"error: {where}{' '.join(message.split())}", file=sys.stderr)
    return 2


def parse(parser: Parser, argv: Sequence[str]) -> Any:
    """The parsed namespace; whatever jsonargparse prints or raises becomes a `FewShotError`."""
    try:
        return parser.parse_args(list(argv))
    except (TypeError, ValueError, OSError) as error:
        raise FewShotError(_one_line(str(error), [])) from error


def existing_run(folder: str) -> Path:
    """A folder given on the command line that must hold a run."""
    if not (Path(folder) / "config.yaml").is_file():
        raise FewShotError(f"{folder} is not the folder of a run of train_maml (it has no config.yaml)")
    return Path(folder)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if distributed.is_first():
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(message: str, known: Sequence[str]) -> str:
    words = message.split()
    unknown = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
    close = difflib.get_close_matches(unknown, known, 1) if unknown and unknown not in known else []
    return " ".join(words) + (f"; did you mean {close[0]}?" if close else "") + " (--help lists the options)"
