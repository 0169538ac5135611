"""Against learn2learn's own `MAML`: parameters, losses and meta-gradients over several steps on one model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewshot_asam import MAML
from fewshot_asam.models import build_model, drop_running_statistics
from peers import import_learn2learn
from problems import SHAPE, deviation, episodes

STEPS = 4


def models() -> dict[str, nn.Module]:
    """Ours, and learn2learn's own four-block network, whose `nn.BatchNorm2d` keeps running statistics."""
    l2l = import_learn2learn()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = l2l.vision.models.CNN4(3, hidden_size=4, channels=1, max_pool=True, layers=4, embedding_size=4)
    return {"conv4": build_model("conv4", 3, SHAPE, 4, seed=0).double(), "CNN4": theirs.double()}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["conv4", "CNN4"])
def test_equals_learn2learn(name: str, first_order: bool) -> None:
    l2l: Any = import_learn2learn()
    model, batch = models()[name], episodes(tasks=3)
    ours = MAML(drop_running_statistics(copy.deepcopy(model)), 0.2, first_order=first_order)
    theirs = l2l.algorithms.MAML(copy.deepcopy(model), lr=0.2, first_order=first_order)
    worst, total = 0.0, torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        task, learner = ours.clone(), theirs.clone()
        for _ in range(STEPS):
            task.adapt(lambda net, x=x, y=y: F.cross_entropy(net(x), y))
            learner.adapt(F.cross_entropy(learner(x), y))
            for mine, other in zip(task.params.values(), learner.parameters(), strict=True):
                worst = max(worst, ((mine - other).abs().max() / (1e-6 + other.abs().max())).item())
        losses = F.cross_entropy(task(query_x), query_y), F.cross_entropy(learner(query_x), query_y)
        worst = max(worst, deviation(*losses))
        total = total + losses[1] / batch.num_tasks
    total.backward()
    expected = torch.cat([value.grad.flatten() for value in theirs.parameters()])
    for engine in ("loop", "vmap") if name == "conv4" else ("loop",):
        ours.engine = engine
        ours.zero_grad()
        output = ours.meta_backward(batch, STEPS)
        worst = max(worst, deviation(output.loss, total.detach()))
        gradient = torch.cat([value.grad.flatten() for value in ours.parameters() if value.grad is not None])
        worst = max(worst, deviation(gradient, expected))
    print(f"\nlearn2learn, {name}, first_order={first_order}: largest deviation {worst:.1e}")
    assert worst < 1e-8
