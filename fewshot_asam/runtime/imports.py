"""Names for people's own code: `package.module:name`, looked for in the current folder and among what is installed."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.yaml_settings import nearest

_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_REFERENCE = re.compile(f"{_DOTTED}:{_DOTTED}")
_packages: set[str] = set()
"""Whose code has been asked for."""


def imported(reference: str, what: str) -> Any:
    """What `package.module:name` stands for; importing it runs the module's code.

    Raises `FewShotError` in which `what` says what it was wanted for: where the name has another form, the module
    cannot be imported or has no such name.
    """
    if not _REFERENCE.fullmatch(reference):
        raise FewShotError(f"{what} is {reference!r}; expected package.module:name")
    module, _, name = reference.partition(":")
    _packages.add(module.partition(".")[0])
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # for good, as the module may import others later
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _failed(reference, what, error) from error
        raise FewShotError(
            f"{what} is {reference!r}, but there is no module {error.name!r}, neither in the current folder {here} nor "
            "installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed(reference, what, error) from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = nearest(part, [known for known in dir(found) if not known.startswith("_")])
            raise FewShotError(f"{what} is {reference!r}, but {module} has no {name!r}{near}")
        found = getattr(found, part)
    return found


def comes_from_imported(error: BaseException) -> bool:
    """Whether code that `imported` found was running when the exception was raised."""
    return _frame(error) is not None


def said_by(error: BaseException) -> str:
    """An exception of somebody's own code: its kind, what it says and which line of that code it came from."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:  # which says itself where
        return text
    frame = _frame(error) or frames[-1]
    return f"{text}, {Path(frame.filename).name} line {frame.lineno}"


def _frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line of imported code that the exception passed through."""
    calls = traceback.walk_tb(error.__traceback__)
    theirs = [call for call in calls if call[0].f_globals.get("__name__", "").partition(".")[0] in _packages]
    return traceback.StackSummary.extract(iter(theirs[-1:]))[0] if theirs else None


def _failed(reference: str, what: str, error: BaseException) -> FewShotError:
    return FewShotError(f"{what} is {reference!r}, which cannot be imported ({said_by(error)})")
