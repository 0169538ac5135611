"""Which mode a model's tasks are run: by device and model, and by the clock where that is cheap."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.models import fuses
from fewshot_asam.models.gpu_kernels import Kernels

Batching = Literal["loop", "vmap"]
EngineName = Literal["auto", "loop", "vmap"]

LARGEST_VECTORISED_SIDE = 32
"""Pixels. On a CPU, tasks on larger images fill the cores one by one; their graphs would not fit the cache together."""
CHEAP = 1.0
"""Seconds that a meta-batch may take for both engines to be timed."""
REPEATS = 3
MARGIN = 1.25
"""The other engine is taken where it is faster by this factor, so that runs rarely differ by chance."""


class Choice(NamedTuple):
    """An engine and, in words, why it was chosen; and how blocks are to run on a GPU, if not as they do."""

    name: Batching
    reason: str
    kernels: Kernels | None = None


def choose(engine: EngineName, model: nn.Module, device: torch.device, side: int) -> Choice:
    """Which engine runs `model` on images of `side` pixels on `device`, by rule."""
    require_one_of("engine", engine, get_args(EngineName))
    if engine != "auto":
        return Choice(engine, "as asked")
    if device.type != "cpu":
        return Choice("vmap", f"one task would not fill the {device.type} device")
    if fuses(model):
        return Choice("loop", "its fused blocks fill the cores one task at a time")
    if side <= LARGEST_VECTORISED_SIDE:
        return Choice("vmap", f"images of {side} pixels are too small to fill the cores one task at a time")
    return Choice("loop", f"images of {side} pixels fill the cores one task at a time")


def measured(by_rule: Choice, iterate: Callable[[Batching], Any]) -> Choice:
    """The faster engine for one iteration.

    The one `by_rule` where that takes longer than `CHEAP` seconds, or where the other cannot run the model.
    """
    if _seconds(iterate, by_rule.name) > CHEAP:
        return by_rule
    other: Batching = "vmap" if by_rule.name == "loop" else "loop"
    try:
        _seconds(iterate, other)
    except FewShotError:
        return by_rule
    pairs = [(_seconds(iterate, by_rule.name), _seconds(iterate, other)) for _ in range(REPEATS)]
    chosen, rival = (min(column) for column in zip(*pairs, strict=True))
    reason = f"measured, a meta-batch: {by_rule.name} {1000 * chosen:.0f} ms, {other} {1000 * rival:.0f} ms"
    return Choice(other if rival * MARGIN < chosen else by_rule.name, reason)


def _seconds(iterate: Callable[[Batching], Any], name: Batching) -> float:
    started = time.perf_counter()
    iterate(name)
    return time.perf_counter() - started
