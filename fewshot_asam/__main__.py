"""`python -m fewshot_asam`: lists the commands, and runs them: `python -m fewshot_asam train --help`."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from fewshot_asam import cli
from fewshot_asam.cli.surroundings import COMMANDS, QUESTIONS, lasting_streams
from fewshot_asam.version import __version__

FOLDER = Path(cli.__file__).parent
NAMES = {command.removesuffix("_maml"): command for command in COMMANDS}


def main(words: Sequence[str]) -> int:
    """Answers, or hands over to a command. **Returns:** the exit status."""
    first = words[0] if words else "--help"
    if command := NAMES.get(first.removesuffix("_maml")):
        sys.argv = [str(FOLDER / command), *words[1:]]
        status: int = import_module(f"fewshot_asam.cli.{command}").main()
        return status
    with lasting_streams():
        if first in QUESTIONS:
            print(f"fewshot_asam {__version__}" if first == "--version" else _overview())
            return 0
        close = difflib.get_close_matches(first, NAMES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: there is no command {first!r}; expected one of {', '.join(NAMES)}{hint}", file=sys.stderr)
        return 2


def _overview() -> str:
    width = 2 + max(map(len, NAMES))
    lines = [f"  {name:<{width}}{_summary(command)}" for name, command in NAMES.items()]
    return "\n".join(
        [
            "usage: python -m fewshot_asam COMMAND [options]",
            "\nFew-shot meta-learning with MAML, Sharp-MAML_low and Agnostic-SAM.\n",
            "commands:",
            *lines,
            "\nCOMMAND --help says more. Each is also a program of its own: " + ", ".join(NAMES.values()) + ".",
        ]
    )


def _summary(command: str) -> str:
    """The first line of a command's docstring, read from its source: importing it would import PyTorch."""
    module = ast.parse((FOLDER / f"{command}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(module) or "").partition("\n")[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
