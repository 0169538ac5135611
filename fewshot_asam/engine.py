"""How a batch of tasks is run: one by one, or vectorised. The numbers are the same, the speed is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fewshot_asam import inner
from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.inner import Gradient, Loss, Rule
from fewshot_asam.models import unvectorisable_layers
from fewshot_asam.perturb import Params
from fewshot_asam.validation import Validation, lower_level_sets

EngineName = Literal["auto", "loop", "vmap"]
Batch = tuple[Tensor, ...]

LARGEST_VECTORISED_SIDE = 32
"""Pixels. On a CPU, tasks on larger images fill the cores one by one; their graphs would not fit the cache together."""


@dataclass(frozen=True)
class LowerLevel:
    """What one task's adaptation needs to know, apart from its data.

    **Arguments:**

    - `model`: called as `model(x)`; in inductive mode as `model(x, support=n)`.
    - `adapted`: names of the parameters that the inner loop changes.
    - `lr`: inner learning rate alpha.
    - `inductive`: the support set alone gives the norm layers' statistics for the queries.
    """

    model: nn.Module
    rule: Rule
    lr: float
    adapted: tuple[str, ...]
    validation: Validation = "duplicate"
    inductive: bool = False


class MetaOutput(NamedTuple):
    """The queries of a batch of tasks: `loss` (scalar, mean over tasks), `logits` `[T, N*Q, N]`, `accuracy` `[T]`."""

    loss: Tensor
    logits: Tensor
    accuracy: Tensor


class Choice(NamedTuple):
    """An engine and, in words, why it was chosen."""

    name: Literal["loop", "vmap"]
    reason: str


def choose(engine: EngineName, model: nn.Module, device: torch.device, side: int) -> Choice:
    """Which engine runs `model` on images of `side` pixels on `device`.

    Raises `FewShotError` where `vmap` is asked for and would compute wrong second-order gradients.
    """
    require_one_of("engine", engine, get_args(EngineName))
    unsafe = unvectorisable_layers(model)
    if engine == "vmap" and unsafe:
        raise FewShotError(
            f"the second-order gradients of layer {unsafe[0]!r} ({_kind(model, unsafe[0])}) are wrong under vmap; "
            "use engine 'loop', or fewshot_asam.models.TaskNorm in its place"
        )
    if engine != "auto":
        return Choice(engine, "as asked")
    if unsafe:
        return Choice("loop", f"vmap differentiates layer {unsafe[0]!r} ({_kind(model, unsafe[0])}) wrongly")
    if device.type != "cpu":
        return Choice("vmap", f"one task would not fill the {device.type} device")
    if side <= LARGEST_VECTORISED_SIDE:
        return Choice("vmap", f"images of {side} pixels are too small to fill the cores one task at a time")
    return Choice("loop", f"images of {side} pixels fill the cores one task at a time")


def meta_loss(
    lower: LowerLevel,
    episodes: Episodes,
    steps: int,
    engine: EngineName = "auto",
    generator: torch.Generator | None = None,
) -> MetaOutput:
    """Adapts to each task's support set and evaluates its queries.

    `loss` can be differentiated with respect to the model's parameters; under `torch.no_grad` no graph is built.
    """
    if _choice(lower, episodes, engine).name == "vmap":
        losses, logits = _vectorised(lower, _batch(lower, episodes, generator), steps)
    else:
        outputs = list(_one_by_one(lower, _batch(lower, episodes, generator), steps))
        losses, logits = (torch.stack(column) for column in zip(*outputs, strict=True))
    return MetaOutput(losses.mean(), logits, accuracy(logits, episodes.query_y))


def meta_backward(
    lower: LowerLevel,
    episodes: Episodes,
    steps: int,
    engine: EngineName = "auto",
    generator: torch.Generator | None = None,
) -> MetaOutput:
    """`meta_loss(...).loss.backward()`, but one by one each task's graph is freed before the next is built.

    **Returns:** the output without its graph; gradients are added to the parameters' `.grad`.
    """
    if _choice(lower, episodes, engine).name == "vmap":
        output = meta_loss(lower, episodes, steps, "vmap", generator)
        output.loss.backward()  # type: ignore[no-untyped-call]
        return MetaOutput(*(value.detach() for value in output))
    losses, logits = [], []
    for loss, task_logits in _one_by_one(lower, _batch(lower, episodes, generator), steps):
        (loss / episodes.tasks).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        logits.append(task_logits.detach())
    stacked = torch.stack(logits)
    return MetaOutput(torch.stack(losses).mean(), stacked, accuracy(stacked, episodes.query_y))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The part of right answers in each task: `[T, n, N]`, `[T, n]` -> `[T]`."""
    return (logits.detach().argmax(-1) == labels).to(logits.dtype).mean(-1)


def predict(model: nn.Module, params: Params, x: Tensor, support: Tensor | None = None) -> Tensor:
    """The model's logits with `params` in place of its own; `support` alone gives the norm's statistics if given."""
    if support is None:
        return functional_call(model, params, (x,))  # type: ignore[no-any-return]
    both = functional_call(model, params, (torch.cat([support, x]),), {"support": len(support)})
    return both[len(support) :]  # type: ignore[no-any-return]


def _kind(model: nn.Module, layer: str) -> str:
    return type(model.get_submodule(layer)).__name__


def _choice(lower: LowerLevel, episodes: Episodes, engine: EngineName) -> Choice:
    return choose(engine, lower.model, episodes.support_x.device, episodes.support_x.shape[-1])


def _batch(lower: LowerLevel, episodes: Episodes, generator: torch.Generator | None) -> Batch:
    """Queries, support images, training and, where it is not a duplicate, validation sets of all tasks."""
    train, val = lower_level_sets(episodes.support_x, episodes.support_y, lower.validation, generator)
    return (episodes.query_x, episodes.query_y, episodes.support_x, *train, *(val or ()))


def _adapted(lower: LowerLevel) -> Params:
    named = dict(lower.model.named_parameters())
    return {name: named[name] for name in lower.adapted}


def _run_task(lower: LowerLevel, params: Params, batch: Batch, steps: int, gradient: Gradient) -> tuple[Tensor, Tensor]:
    """One task from the initial parameters to its query loss and logits."""
    query_x, query_y, support_x, train_x, train_y, *val = batch
    train_loss = _loss(lower.model, train_x, train_y)
    val_loss = _loss(lower.model, *val) if val else None
    params = inner.adapt(lower.rule, params, train_loss, val_loss, lower.lr, steps, gradient)
    logits = predict(lower.model, params, query_x, support_x if lower.inductive else None)
    return F.cross_entropy(logits, query_y), logits


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    return lambda params: F.cross_entropy(predict(model, params, x), y)


def _one_by_one(lower: LowerLevel, batch: Batch, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    params = _adapted(lower)
    for task in zip(*batch, strict=True):
        yield _run_task(lower, params, task, steps, inner.autograd_gradient)


def _vectorised(lower: LowerLevel, batch: Batch, steps: int) -> tuple[Tensor, Tensor]:
    def run(params: Params, task: Batch) -> tuple[Tensor, Tensor]:
        return _run_task(lower, params, task, steps, inner.functional_gradient)

    losses, logits = torch.func.vmap(run, in_dims=(None, 0), randomness="different")(_adapted(lower), batch)
    return losses, logits
