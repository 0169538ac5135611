"""What a record of the ledger must hold, so that whoever reads it meets no surprise."""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, get_args

import numpy as np

from fewshot_asam.reproduce.plan import MOST_TASKS
from fewshot_asam.rules import rule_names
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.trained import WeightsName

Counts = np.ndarray[Any, np.dtype[np.uint16]]
SETTINGS = {field.name for field in fields(TrainConfig)}
_CELL = re.compile(r".+-seed(\d{1,19})-[0-9a-f]{10}")
ROUNDING = 1e-5
"""Of the means that stand beside the answers they are computed from."""


class Kind(NamedTuple):
    """What a value must be, in words and as a test."""

    what: str
    holds: Callable[[Any], bool]


def _number(least: float, most: float = math.inf) -> Kind:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most and value < math.inf

    return Kind(f"a number from {least:g}" + (f" to {most:g}" if most < math.inf else ""), holds)


def _whole(least: int, most: int) -> Kind:
    return Kind(
        f"a whole number from {least:,} to {most:,}", lambda value: type(value) is int and least <= value <= most
    )


def _list(each: Kind) -> Kind:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and all(map(each.holds, value))

    return Kind(f"a list, each {each.what}", holds)


TEXT = Kind(
    "a line of text", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[^\x00-\x1f]{0,5000}", value))
)
WORD = Kind("text", lambda value: isinstance(value, str) and value.isascii())
TABLE = Kind("names and values", lambda value: isinstance(value, dict))
COUNT = _whole(1, 10**9)
PART = _number(0, 1)
COSINE = _number(-1.001, 1.001)
TIME = _number(0, 1e9)

HEAD = {
    "cell": Kind("a run's name, seed and digest", lambda value: TEXT.holds(value) and bool(_CELL.fullmatch(value))),
    "seed": _whole(0, 2**63 - 1),
    "settings": TABLE,
    "tests": _list(TABLE),
}
TRAINING = {
    **{"commit": TEXT, "device": TEXT, "engine": TEXT, "threads": COUNT, "versions": TABLE},
    **{"iterations": COUNT, "best_iteration": COUNT, "wall_seconds": _number(1e-3, 1e9), "validation": TABLE},
}
COURSE = {"iteration": _list(COUNT), "seconds": _list(TIME), "accuracy": _list(PART)}
CONGRUENCE = {"congruence_before": _list(COSINE), "congruence_after": _list(COSINE)}
TEST = {
    "inner": Kind(f"one of {', '.join(rule_names())}", lambda value: value in rule_names() or ":" in str(value)),
    **{"inner_steps": _whole(1, 10_000), "inner_lr": _number(0, 1e30)},
    **{"tasks": _whole(2, MOST_TASKS), "query_images": _whole(1, 65_535), "right": WORD},
}
WEIGHTS = {"weights": Kind("best or last", lambda value: value in get_args(WeightsName))}
LAST_TEST = {"last_test_accuracy": PART, "last_test_ci95": PART, "test_tasks": COUNT}
MEAN = {"mean": PART, "ci95": PART}


def cell_problem(record: Mapping[str, Any]) -> str:
    """What is wrong with a cell's record, or nothing."""
    if found := _first(record, HEAD) or _settings_problem(record):
        return found
    if "diverged" in record:
        return _first(record, {"diverged": TEXT})
    if found := _first(record, TRAINING | (LAST_TEST if "last_test_accuracy" in record else {})) or _first(
        record["versions"], {"torch": TEXT}, "versions: "
    ):
        return found
    return _course_problem(record) or next(filter(None, (_of_cell(test, record) for test in record["tests"])), "")


def test_problem(test: Mapping[str, Any]) -> str:
    """What is wrong with the record of a test, or nothing."""
    if found := _first(test, TEST | (WEIGHTS if "weights" in test else {})):
        return found
    tasks, images = test["tasks"], test["query_images"]
    right = unpacked(test["right"], tasks)
    if right is None or right.max() > images:
        return f"right does not hold {tasks:,} numbers from 0 to {images}, as tasks and query_images say"
    means = {name: _mean_problem(name, test, right) for name in test if re.fullmatch(r"of_\d{1,9}", name)}
    return next(filter(None, means.values()), "")


def _mean_problem(name: str, test: Mapping[str, Any], right: Counts) -> str:
    if found := _first(test, {name: TABLE}) or _first(test[name], MEAN, f"{name}: "):
        return found
    first, mean = int(name.removeprefix("of_")), test[name]["mean"]
    same = 2 <= first <= len(right) and abs(mean - right[:first].mean() / test["query_images"]) < ROUNDING
    return "" if same else f"{name}: mean is {mean}, which is not that of the answers in right"


def unpacked(text: str, tasks: int) -> Counts | None:
    """The numbers of right answers in each task that `ledger.pack` wrote; None where they are not so many."""
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 2 * tasks + 1)
    except (ValueError, zlib.error):
        return None
    return np.frombuffer(content, "<u2") if len(content) == 2 * tasks else None


def _first(record: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> str:
    for name, kind in kinds.items():
        if name not in record:
            return f"{where}{name} is missing"
        if not kind.holds(record[name]):
            return f"{where}{name} is {record[name]!r:.80}; expected {kind.what}"
    return ""


def _settings_problem(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    if unknown := sorted(settings.keys() - SETTINGS):
        return f"settings: there is no setting {unknown[0]!r:.80}"
    if found := _first(settings, {name: COUNT for name in ("ways", "queries", "iterations")}, "settings: "):
        return found
    match = _CELL.fullmatch(record["cell"])
    return "" if match and int(match[1]) == record["seed"] else f"seed is {record['seed']}, but cell {record['cell']}"


def _course_problem(record: Mapping[str, Any]) -> str:
    course = record["validation"]
    kinds = COURSE | {name: kind for name, kind in CONGRUENCE.items() if name in course}
    if found := _first(course, kinds, "validation: "):
        return found
    iterations = course["iteration"]
    if any(len(course[name]) != len(iterations) for name in kinds) or len(set(iterations)) < len(iterations):
        return "validation: its lists are not of one length, an iteration each"
    if record["best_iteration"] not in iterations:
        return f"best_iteration is {record['best_iteration']}; expected one of validation's"
    return ""


def _of_cell(test: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    images = record["settings"]["ways"] * record["settings"]["queries"]
    if found := test_problem(test):
        return f"tests: {found}"
    return "" if test["query_images"] == images else f"tests: query_images is {test['query_images']}; expected {images}"
