"""How far a run has come: what a checkpoint holds beside tensors."""

from __future__ import annotations

from dataclasses import dataclass

from fewshot_asam.engine.candidates import parsed
from fewshot_asam.training.checks import LARGEST_COUNT, LARGEST_RATE


@dataclass
class Progress:
    """Counts of what was done, and the best of it."""

    iteration: int = 0
    validated: int = 0
    """the iteration of the last validation"""
    rows: int = 0
    """lines of metrics.jsonl"""
    best_accuracy: float = -1.0
    best_iteration: int = 0
    seconds: float = 0.0
    engine: str = ""
    """what `auto` chose, so that a resumed run goes on in the same way"""

    def problem(self) -> str:
        """Why no run can have come so far; empty where one can."""
        bounds = {
            "iteration": (0, LARGEST_COUNT),
            "validated": (0, self.iteration),
            "best_iteration": (0, self.validated),
            "rows": (0, 2 * self.iteration),
            "best_accuracy": (0, 1) if self.best_iteration else (-1, -1),
            "seconds": (0, LARGEST_RATE),
        }
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                return f"{name} is {getattr(self, name)}, not within {least} and {most}"
        known = self.engine in ("", "auto") or parsed(self.engine) is not None
        return "" if known else f"engine is {self.engine!r}"
