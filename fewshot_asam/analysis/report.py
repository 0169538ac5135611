"""All that is measured of a trained learner, task by task, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewshot_asam import engine
from fewshot_asam.analysis.congruence import ascent_radius, gradient_cosine, validation_decrease
from fewshot_asam.analysis.curvature import hessian_trace, top_eigenvalues
from fewshot_asam.analysis.losses import TaskLosses, meta_loss, task_losses
from fewshot_asam.analysis.sharpness import relative_radius, sam_sharpness
from fewshot_asam.analysis.surface import filter_normalised_direction, loss_path, loss_plane
from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError
from fewshot_asam.learners import MetaLearner

RADII = (5e-4, 5e-3, 5e-2, 5e-1)
"""Of the sharpness and of Theorem 2: the paper's three, and one that is too large."""
WAY = tuple(index / 10 for index in range(-2, 16))
"""Positions on the path from the meta-parameters (0) to the adapted ones (1), and beyond."""
SIDE = tuple(index / 10 for index in range(-10, 11))
"""Positions along a direction of the planes."""
PROBES = 10
"""Random vectors of a trace."""


@dataclass(frozen=True)
class Analysis:
    """What was measured of one learner.

    **Arguments:**

    - `meta`: of the meta-loss at the meta-parameters: `eigenvalues` `[number]` and the estimates of the `trace`.
    - `tasks`: by name, float64 `[T]` or `[T, ...]`, the same tasks in each: see `of_task`.
    - `planes`: the first task's `support` and `query` loss around its adapted parameters, `[n, n]`, in steps `side`.
    - `radii`, `way`, `side`: what the last dimension of `sharpness_*` and `decrease_*`, of `path_*` and of the planes
      stands for.
    """

    meta: dict[str, Tensor]
    tasks: dict[str, Tensor]
    planes: dict[str, Tensor]
    radii: tuple[float, ...]
    side: tuple[float, ...]
    way: tuple[float, ...] = field(default=WAY)


def analyse(
    learner: MetaLearner,
    episodes: Episodes,
    steps: int,
    *,
    radii: Sequence[float] = RADII,
    eigenvalues: int = 5,
    meta_tasks: int = 4,
    side: Sequence[float] = SIDE,
    seed: int = 0,
    between: Callable[[], object] = lambda: None,
) -> Analysis:
    """Adapts to every task and measures its losses before and after.

    **Arguments:**

    - `episodes`: at least two tasks, on the model's device.
    - `steps`: inner steps, at least 1.
    - `radii`: at which sharpness and the decrease of the validation loss are measured.
    - `eigenvalues`: how many of each Hessian.
    - `meta_tasks`: the first tasks, so many of them, make the meta-loss whose Hessian is taken.
    - `side`: positions along each direction of the planes; empty for none.
    - `seed`: of augmented validation sets, directions and probes, which are the same for every learner.
    - `between`: called after each task.

    The model stays in the mode that it is in: for what a test sees, call `learner.eval()` first.
    """
    if steps < 1:
        raise FewShotError(f"steps is {steps}; expected at least 1, as nothing is adapted without one")
    device = episodes.support_x.device
    tasks = task_losses(learner, episodes, steps, torch.Generator(device).manual_seed(seed))
    rows = []
    for index, task in enumerate(tasks):
        rows.append(of_task(task, learner, episodes.query_y[index], radii, eigenvalues, seed))
        between()
    loss, params = meta_loss(learner, episodes[:meta_tasks], steps, torch.Generator(device).manual_seed(seed))
    return Analysis(
        meta={
            "eigenvalues": top_eigenvalues(loss, params, eigenvalues),
            "trace": hessian_trace(loss, params, PROBES, generator=torch.Generator().manual_seed(seed)),
        },
        tasks={name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        planes=_planes(tasks[0], side, seed) if side else {},
        radii=tuple(radii),
        side=tuple(side),
    )


def of_task(
    task: TaskLosses, learner: MetaLearner, labels: Tensor, radii: Sequence[float], eigenvalues: int, seed: int
) -> dict[str, Tensor]:
    """The quantities of one task, float64 on the CPU, scalars unless said otherwise.

    - `accuracy`: of the queries after adaptation.
    - `loss_{set}_{when}`, `eigenvalues_{set}_{when}` `[number]`, `trace_{set}_{when}` with `set` `support` or `query`
      and `when` `before` or `after`.
    - `sharpness_{set}` `[radii]`: of the adapted parameters, by `sam_sharpness`.
    - `path_{set}` `[way]`: the loss on the way from the parameters before to those after.
    - `cosine_before`, `cosine_after`: by `gradient_cosine` at the rule's radius.
    - `decrease_predicted`, `decrease_measured` `[radii]`: by `validation_decrease` before adaptation, with
      `rho1 = 2 * rho` and `rho2 = rho`.
    - `parameter_norm`, `gradient_norm`: `||theta||` and `||g||` before; `rho_over_norm`, `rho_times_gradient` of a
      rule that has a `rho`.
    """
    rule: Any = learner.rule
    rho, adaptive = ascent_radius(rule), bool(getattr(rule, "adaptive", False))
    rate = _rate(learner)
    found: dict[str, Any] = {"accuracy": (task.logits.argmax(-1) == labels).double().mean()}
    for name, loss in (("support", task.support), ("query", task.query)):
        for when, params in (("before", task.before), ("after", task.after)):
            generator = torch.Generator().manual_seed(seed)
            found[f"loss_{name}_{when}"] = loss_path(loss, params, params, [0.0])[0]
            found[f"eigenvalues_{name}_{when}"] = top_eigenvalues(loss, params, eigenvalues)
            found[f"trace_{name}_{when}"] = hessian_trace(loss, params, PROBES, generator=generator).mean()
        found[f"sharpness_{name}"] = sam_sharpness(loss, task.after, radii)
        found[f"path_{name}"] = loss_path(loss, task.before, task.after, WAY)
    for when, params in (("before", task.before), ("after", task.after)):
        found[f"cosine_{when}"] = gradient_cosine(task.support, task.validation, params, rho, adaptive=adaptive)
    steps = [validation_decrease(task.support, task.validation, task.before, rate, rho1=2 * r, rho2=r) for r in radii]
    found["decrease_predicted"] = [step.predicted for step in steps]
    found["decrease_measured"] = [step.measured for step in steps]
    unit = relative_radius(task.support, task.before, 1.0)
    found |= {"parameter_norm": 1 / unit.over_norm, "gradient_norm": unit.times_gradient}
    if hasattr(rule, "rho"):
        found |= {"rho_over_norm": rule.rho * unit.over_norm, "rho_times_gradient": rule.rho * unit.times_gradient}
    return {name: torch.as_tensor(value, dtype=torch.float64, device="cpu") for name, value in found.items()}


def _rate(learner: MetaLearner) -> float:
    """The inner learning rate of the first step; where rates are learned, the mean over the parameter tensors."""
    rates = engine.rates(learner.inner_loop, 0)
    return sum(float(torch.as_tensor(rate).mean()) for rate in rates.values()) / len(rates)


def _planes(task: TaskLosses, side: Sequence[float], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (filter_normalised_direction(task.after, generator) for _ in range(2))
    return {
        name: loss_plane(loss, task.after, (first, second), side, side)
        for name, loss in (("support", task.support), ("query", task.query))
    }
