"""The contestants: each is a function that computes one whole meta-gradient and returns the mean query loss.

All start from the same weights and see the same episodes, so that their losses can be compared as they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import learn2learn_reference
from benchmarks.peer_packages import import_learn2learn
from benchmarks.presets import PRESETS, Preset, episodes
from fewshot_asam.engine import Batch
from fewshot_asam.engine.cuda_graph import CudaGraphed, CudaGraphs
from fewshot_asam.episodes import Episodes
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.rules import rule_class

_shared = ExitStack()
NAMES = {"blocks": "features", "norm": "normalize", "head": "classifier"}
"""Our names of Conv4's parts to learn2learn's; both call a convolution `conv`."""


@dataclass(frozen=True)
class Contestant:
    """Whose implementation of which rule.

    **Arguments:**

    - `author`: `ours`, `learn2learn` (its own `MAML`) or `transcription` (the rule written in its style).
    - `rule`, `rho`, `through_perturbation`: as the rule's; learn2learn's `MAML` has no other.
    - `engine`, `processes`: ours alone. As `train_maml` does, it shares the tasks among all cores on a CPU.
    """

    author: str
    rule: str = "maml"
    rho: float = 5e-4
    through_perturbation: bool = True
    engine: str = "auto"
    processes: int | Literal["auto"] = "auto"

    @property
    def keeps_memory(self) -> bool:
        """Whether its users' processes call `keep_freed_memory`, as `train_maml` does."""
        return self.author == "ours"


class Built(NamedTuple):
    """`run` computes a meta-gradient, left in the `.grad` of `model`'s parameters, and returns the loss."""

    run: Callable[[], float]
    model: nn.Module


def build(contestant: Contestant, preset: Preset, batch: Episodes) -> Built:
    """A contestant on the device and in the precision of `batch`; its weights depend on the preset alone."""
    ours = _ours(preset).to(batch.support_x)
    if contestant.author == "ours":
        return _our_run(contestant, ours, batch, preset.steps)
    theirs = learn2learn_reference.build_model(import_learn2learn(), preset).to(batch.support_x)
    copy_weights(ours, theirs)
    return _their_run(contestant, theirs, batch, preset.steps)


def make(contestant: Contestant, preset: Preset, batch: Episodes) -> Callable[[], float]:
    """`build`'s function alone."""
    return build(contestant, preset, batch).run


def from_order(
    contestant: dict[str, Any], preset: dict[str, Any], device: str, warm_up: bool = False
) -> Callable[[], dict[str, float]]:
    """What a worker runs: a contestant and a preset as their fields; `warm_up` runs the smoke preset before."""
    wanted = Contestant(**contestant)
    if warm_up:
        make(wanted, PRESETS["smoke"], episodes(PRESETS["smoke"], device))()
    run = make(wanted, Preset(**preset), episodes(Preset(**preset), device))
    return lambda: {"loss": run()}


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give learn2learn's model our weights; its convolutions' biases, dead before a batch norm, become zero."""
    values = {their_name(name): value for name, value in ours.named_parameters()}
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.copy_(values.pop(name) if name in values else torch.zeros_like(value))
    assert not values, f"learn2learn's model lacks {', '.join(values)}"


def their_name(name: str) -> str:
    """learn2learn's name of one of our parameters."""
    return ".".join(NAMES.get(part, part) for part in name.split("."))


def deviation(contestant: Contestant, preset: Preset, dtype: torch.dtype, engine: str = "auto") -> float:
    """The largest deviation of a rival's meta-gradient from ours, relative to each tensor's largest entry.

    A tensor of ours whose entries are all below 1e-6 is compared with that.
    """
    batch = episodes(preset, dtype=dtype)
    us = Contestant("ours", contestant.rule, contestant.rho, engine=engine)
    built = {us: build(us, preset, batch), contestant: build(contestant, preset, batch)}
    losses = [one.run() for one in built.values()]
    worst = abs(losses[0] - losses[1]) / abs(losses[0])
    theirs = dict(built[contestant].model.named_parameters())
    for name, value in built[us].model.named_parameters():
        expected, found = _gradient(value), _gradient(theirs[their_name(name)])
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item())
    return worst


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _ours(preset: Preset) -> nn.Module:
    return build_model("conv4", preset.ways, preset.image_shape, preset.hidden, seed=0)


def _our_run(contestant: Contestant, model: nn.Module, batch: Episodes, steps: int) -> Built:
    switches: Any = {"rho": contestant.rho, "through_perturbation": contestant.through_perturbation}
    rule, engine = contestant.rule, contestant.engine
    kind: Any = rule_class(rule)
    own = {field.name: switches[field.name] for field in fields(kind) if field.name in switches}
    learner = MetaLearner(model, learn2learn_reference.LR, kind(**own), engine=engine)  # type: ignore[arg-type]

    def meta_gradient(tasks: Batch) -> Tensor:
        learner.zero_grad()
        return learner.batch_backward(tasks, steps).loss

    on_gpu = batch.support_x.device.type == "cuda"
    if not on_gpu:
        share_for_good(learner, contestant.processes)
    iterate = CudaGraphed(meta_gradient, CudaGraphs()) if on_gpu else meta_gradient
    return Built(lambda: iterate(learner.batch(batch)).item(), model)


def share_for_good(learner: MetaLearner, processes: int | Literal["auto"]) -> None:
    """Shares the learner's tasks among processes that end with this one."""
    _shared.enter_context(learner.side_by_side(processes))


def _their_run(contestant: Contestant, model: nn.Module, batch: Episodes, steps: int) -> Built:
    l2l: Any = import_learn2learn()
    maml = l2l.algorithms.MAML(model, lr=learn2learn_reference.LR)
    step = None if contestant.author == "learn2learn" else learn2learn_reference.STEPS[contestant.rule]

    def run() -> float:
        maml.zero_grad()
        return learn2learn_reference.meta_gradient(l2l, maml, batch, steps, step, contestant.rho).item()

    return Built(run, model)
