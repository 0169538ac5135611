"""What the settings of rules have in common."""

from __future__ import annotations

from fewshot_asam.errors import FewShotError


def require_radius(name: str, value: float | None) -> None:
    """Raises `FewShotError` for what is no radius; None stands for one that follows from others."""
    if value is not None and not 0 <= value < float("inf"):
        raise FewShotError(f"{name} is {value}; expected a finite radius of at least 0")
