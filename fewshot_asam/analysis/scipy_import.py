"""scipy, which only the analysis needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fewshot_asam.errors import FewShotError


def scipy_module(name: str) -> Any:
    """A module of scipy; raises `FewShotError` where it is not installed."""
    try:
        return import_module(f"scipy.{name}")
    except ImportError as error:
        raise FewShotError("scipy is missing; install it by: pip install 'fewshot_asam[analysis]'") from error
