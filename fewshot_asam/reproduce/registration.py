"""Registration: what a plan commits itself to before its first run, and what its runs' records say of that."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.yaml_settings import require_known

KEYS = ("runs", "hypotheses", "tests", "stopping", "margin")
"""What a registration must say."""
NOT_DIGESTED = ("deviations", "superseded")
"""What may be added to a registered plan later: it tells what became of it."""
DIGITS = 12
"""Hexadecimal digits of a plan's digest."""
UNCOMMITTED = "uncommitted"


class Registration(NamedTuple):
    """What a plan commits itself to.

    - `runs`: how many different runs it has; there is no verdict before all of them are done.
    - `hypotheses`, `tests`, `stopping`: in words, for the page.
    - `margin`: points of accuracy below which a difference does not matter; the equivalence tests' bound.
    """

    runs: int
    hypotheses: tuple[str, ...]
    tests: str
    stopping: str
    margin: float


class Stamp(NamedTuple):
    """Under which plan a run was made: its name, the digest of what it said, and the commit that the file was of."""

    plan: str
    digest: str
    commit: str


def read_registration(said: object, origin: str) -> Registration:
    """A registration from a plan's file; raises `FewShotError` naming what is wrong in it."""
    if not isinstance(said, dict):
        raise FewShotError(f"{origin} is {said!r}; expected {', '.join(KEYS)}")
    require_known(said, KEYS, origin)
    if missing := [name for name in KEYS if name not in said]:
        raise FewShotError(f"{origin} lacks {', '.join(missing)}; expected {', '.join(KEYS)}")
    runs, margin = said["runs"], said["margin"]
    if type(runs) is not int or runs < 1:
        raise FewShotError(f"{origin}: runs is {runs!r}; expected the number of different runs")
    if type(margin) not in (int, float) or not 0 < margin < 100:
        raise FewShotError(f"{origin}: margin is {margin!r}; expected points of accuracy above 0 and below 100")
    hypotheses = texts(said["hypotheses"], f"{origin}: hypotheses")
    tests, stopping = (texts([said[name]], f"{origin}: {name}")[0] for name in ("tests", "stopping"))
    return Registration(runs, hypotheses, tests, stopping, float(margin))


def texts(value: object, origin: str) -> tuple[str, ...]:
    """A list of texts; raises `FewShotError` for anything else."""
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        raise FewShotError(f"{origin} is {value!r}; expected text")
    return tuple(value)


def digest(plan: Mapping[str, Any]) -> str:
    """The first digits of a SHA-256 of all that a plan's file says, in any order and apart from `NOT_DIGESTED`."""
    said = {name: value for name, value in plan.items() if name not in NOT_DIGESTED}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:DIGITS]


@cache
def commit_of(file: Path) -> str:
    """The last commit that changed a file, as it was when this was first asked.

    `UNCOMMITTED` where it differs from that, is in no commit or in no repository.
    """
    folder, name = str(file.resolve().parent), file.name
    try:
        last, changes = (
            subprocess.run(["git", "-C", folder, *words, "--", name], capture_output=True, text=True, check=True)
            for words in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return UNCOMMITTED
    return UNCOMMITTED if changes.stdout.strip() else last.stdout.strip() or UNCOMMITTED
