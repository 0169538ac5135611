"""learn2learn as its users write it: the loop of its examples, and the two rules transcribed from their equations.

The loop is `clone`, `adapt` with a loss and `backward`, task by task, on learn2learn's own `CNN4` in `train()` mode. In
two things it is kinder than the examples: the loss is not fetched from the device after each task, and no accuracy is
computed.

The transcriptions are eager and without a trick: each gradient is a forward and a backward pass of its own with
`create_graph=True`, a perturbed network is learn2learn's clone moved by learn2learn's `update_module`, and the
second-order meta-gradient flows through the perturbation and its norm. Agnostic-SAM's validation set is a set of its
own, as in the equations, although the paper makes it a duplicate of the support set: four gradients a step.

Nothing of fewshot_asam is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.presets import Preset

LR = 0.01
"""Inner learning rate of all contestants, Finn's for Mini-ImageNet. No time depends on it; with 0.1, untrained weights
diverge on random images, and float32 losses of equal computations could not be compared."""

Gradients = list[Tensor]
Step = Callable[[ModuleType, nn.Module, Tensor, Tensor, float], Gradients]


def maml(l2l: ModuleType, net: nn.Module, x: Tensor, y: Tensor, rho: float) -> Gradients:
    """The gradient of one MAML step, which learn2learn's own `adapt` takes: `grad L(theta)`."""
    return gradients(net, x, y)


def sharp_maml_low(l2l: ModuleType, net: nn.Module, x: Tensor, y: Tensor, rho: float) -> Gradients:
    """`grad L(theta + rho * g / ||g||)`."""
    g = gradients(net, x, y)
    return gradients(moved(l2l, net, along(g, rho)), x, y)


def agnostic_sam(l2l: ModuleType, net: nn.Module, x: Tensor, y: Tensor, rho: float) -> Gradients:
    """Equations (4) to (6) with `rho1 = 2 * rho`, `rho2 = rho` and the support set as validation set."""
    val_x, val_y = x, y
    g = gradients(net, x, y)
    v = gradients(net, val_x, val_y)
    v = gradients(moved(l2l, net, along(v, rho)), val_x, val_y)
    perturbation = [a - b for a, b in zip(along(g, 2 * rho), along(v, rho), strict=True)]
    return gradients(moved(l2l, net, perturbation), x, y)


STEPS: dict[str, Step] = {"maml": maml, "sharp_maml_low": sharp_maml_low, "agnostic_sam": agnostic_sam}


def adapt(l2l: Any, step: Step, learner: Any, x: Tensor, y: Tensor, rho: float) -> None:
    """One step of a clone that learn2learn's `MAML.clone` made, in place and differentiable."""
    learner.module = l2l.algorithms.maml_update(learner.module, learner.lr, step(l2l, learner.module, x, y, rho))


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """Of the mean cross-entropy, with respect to the network's parameters, with their graph."""
    return list(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()), create_graph=True))


def along(gradient: Gradients, radius: float) -> Gradients:
    """`radius * gradient / ||gradient||`, with one norm over all tensors."""
    norm = torch.stack([value.square().sum() for value in gradient]).sum().sqrt()
    return [radius / norm * value for value in gradient]


def moved(l2l: Any, net: nn.Module, perturbation: Gradients) -> nn.Module:
    """A clone of the network, moved: differentiable back to its parameters."""
    clone: nn.Module = l2l.update_module(l2l.clone_module(net), updates=perturbation)
    return clone


class Batch(Protocol):
    """What is used of `Episodes`: for each of the tasks a tensor."""

    @property
    def support_x(self) -> Tensor | tuple[Tensor, ...]: ...
    @property
    def support_y(self) -> Tensor | tuple[Tensor, ...]: ...
    @property
    def query_x(self) -> Tensor | tuple[Tensor, ...]: ...
    @property
    def query_y(self) -> Tensor | tuple[Tensor, ...]: ...


def build_model(l2l: Any, preset: Preset) -> nn.Module:
    """learn2learn's own Conv4, whose norm layers keep running statistics as its users leave them."""
    model: nn.Module = l2l.vision.models.CNN4(
        preset.ways,
        hidden_size=preset.hidden,
        channels=preset.channels,
        max_pool=True,
        layers=4,
        embedding_size=preset.hidden * (preset.side // 16) ** 2,
    )
    return model.train()


def meta_gradient(l2l: Any, maml: Any, batch: Batch, steps: int, step: Step | None = None, rho: float = 0.0) -> Tensor:
    """The gradients of the mean over tasks, left in `.grad`; returns the mean loss.

    **Arguments:**

    - `maml`: learn2learn's `MAML`.
    - `step`: one of `STEPS`; None for learn2learn's own `adapt`.
    """
    total = torch.zeros((), device=batch.query_x[0].device)
    for x, y, query_x, query_y in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        learner = maml.clone()
        for _ in range(steps):
            if step is None:
                learner.adapt(F.cross_entropy(learner(x), y))
            else:
                adapt(l2l, step, learner, x, y, rho)
        loss = F.cross_entropy(learner(query_x), query_y)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    for parameter in maml.parameters():
        parameter.grad.mul_(1 / len(batch.support_x))
    return total / len(batch.support_x)
