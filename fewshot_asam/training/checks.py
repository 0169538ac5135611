"""What single settings may be: counts, sizes, seeds, paths and names."""

from __future__ import annotations

import re
from typing import Literal, NoReturn, get_args

from fewshot_asam.data import DATASETS
from fewshot_asam.errors import FewShotError
from fewshot_asam.models import MODELS, Adapt
from fewshot_asam.runtime.yaml_settings import nearest

LARGEST_COUNT = 10**9
LARGEST_SIZE = 10_000
"""Pixels of a side, filters of a layer, inner steps or tasks of a meta-batch: more fit no memory."""
LARGEST_RATE = 1e30
"""What fits a single-precision number with room to spare."""
Asked = int | Literal["auto"]
"""A number of processes, or the best one."""
MOST_PROCESSES = 1024
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes of a path that are no UTF-8."""


def require_count(name: str, value: int, least: int = 1, why: str = "") -> None:
    """Raises `FewShotError` where there are fewer than `least`, or more than anyone waits for."""
    if not least <= value <= LARGEST_COUNT:
        raise FewShotError(f"{name} is {value}; expected at least {least}{why} and at most {LARGEST_COUNT:,}")


def require_tasks(name: str, value: int) -> None:
    """Raises `FewShotError` where so many test tasks give no interval."""
    require_count(name, value, 2, ", for an interval")


def require_processes(asked: Asked) -> None:
    """Raises `FewShotError` for what is no number of processes."""
    if asked != "auto" and not 1 <= asked <= MOST_PROCESSES:
        raise FewShotError(f"processes is {asked}; expected auto, or 1 to {MOST_PROCESSES:,}")


def require_seed(name: str, value: int) -> None:
    """Raises `FewShotError` where PyTorch's generators take no such seed."""
    if not 0 <= value < 2**63:
        raise FewShotError(f"{name} is {value}; expected at least 0 and below 2**63")


def require_writable(name: str, text: str) -> None:
    """Raises `FewShotError` for what is no text that a file can hold on one line."""
    if UNWRITABLE.search(text):
        raise FewShotError(f"{name} is {text!r}; expected what can be written as text")


def require_dataset(name: str, setting: str = "dataset") -> None:
    """Raises `FewShotError` where no dataset has this name."""
    if name not in DATASETS:
        _refuse(setting, name, tuple(DATASETS))


def require_model(name: str, init: str) -> None:
    """Raises `FewShotError` for what names no model, and for initial weights that it does not have."""
    if name in MODELS:
        return
    if ":" not in name:
        _refuse("model", name, tuple(MODELS), "package.module:factory")
    if init != "pytorch":
        raise FewShotError(
            f"init is {init!r}, but model {name!r} draws initial weights of its own; init is of "
            f"{' and '.join(MODELS)} alone: leave it out"
        )


def adapt_patterns(adapt: tuple[str, ...] | str) -> tuple[str, ...] | str:
    """The setting `adapt`, one pattern as a list of one; raises `FewShotError` for a word that is none."""
    if not isinstance(adapt, str) or adapt in get_args(Adapt):
        return adapt
    if not re.search(r"[.*?\[]", adapt):
        _refuse("adapt", adapt, get_args(Adapt), "a pattern of parameter names such as 'head.*'")
    return (adapt,)


def _refuse(name: str, value: str, known: tuple[str, ...], other: str = "") -> NoReturn:
    expected = f"one of {', '.join(known)}" + (f", or {other}" if other else "")
    raise FewShotError(f"{name} is {value!r}; expected {expected}{nearest(value, known)}")
