"""The upper level: one meta-iteration, from a batch of tasks to a step of Adam, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewshot_asam.engine import Batch
from fewshot_asam.engine.cuda_graph import CudaGraphed, CudaGraphs
from fewshot_asam.learners import MetaLearner
from fewshot_asam.rules.perturbations import sam
from fewshot_asam.runtime import distributed
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.schedules import meta_rate

Iteration = Callable[[Batch], Tensor]
"""One meta-iteration; returns `[3]` on the device: mean query loss, mean accuracy, norm of the meta-gradient."""


def trained(learner: MetaLearner) -> list[nn.Parameter]:
    """The meta-parameters: all that the learner has, its model's and others, but frozen ones."""
    return [parameter for parameter in learner.parameters() if parameter.requires_grad]


def optimizer(learner: MetaLearner, config: TrainConfig) -> torch.optim.Adam:
    """Adam, with its learning rate on the device where iterations may be recorded there."""
    parameters = trained(learner)
    if parameters[0].device.type != "cuda":
        return torch.optim.Adam(parameters, lr=config.meta_lr)
    return torch.optim.Adam(parameters, lr=torch.tensor(config.meta_lr, device=parameters[0].device), capturable=True)


def schedule(
    adam: torch.optim.Optimizer, config: TrainConfig, iteration: int = 0, spent: Callable[[], float] = lambda: 0.0
) -> torch.optim.lr_scheduler.LRScheduler:
    """The course of the learning rate over the iterations, as it is after so many of them.

    - `spent`: the part of `max_minutes` that is over: cosine falls to 0 at their end, if that comes first.
    """
    return torch.optim.lr_scheduler.LambdaLR(
        adam,
        lambda index: meta_rate(config.schedule, max(index / config.iterations, spent())),
        last_epoch=iteration - 1,
    )


def iteration(learner: MetaLearner, adam: torch.optim.Optimizer, config: TrainConfig) -> Iteration:
    """The meta-iteration, recorded as a CUDA graph where it runs on a GPU and that is wanted.

    Several processes of one job are given the same meta-batch: each computes the gradient of its share, and one flat
    tensor is summed over them, so all take the same step. What is summed is not recorded.
    """
    parameters = trained(learner)

    def gradient(batch: Batch) -> Tensor:
        """The meta-gradient, the loss and the accuracy of some tasks, `[parameters + 2]`."""
        adam.zero_grad()
        output = learner.batch_backward(batch, config.inner_steps)
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        return torch.cat([g.flatten() for g in (*gradients, output.loss, output.accuracy.mean())])

    def step(flat: Tensor) -> Tensor:
        *gradients, loss, accuracy = torch.split(flat, [*(p.numel() for p in parameters), 1, 1])
        for parameter, value in zip(parameters, gradients, strict=True):
            parameter.grad = value.view_as(parameter).to(parameter.dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad or math.inf)
        adam.step()
        return torch.cat([loss, accuracy, norm[None]])

    def recorded(body: Iteration) -> Iteration:
        wanted = config.cuda_graph and parameters[0].device.type == "cuda"
        return CudaGraphed(body, CudaGraphs()) if wanted else body

    if distributed.size() == 1:
        alone = _sharpness_aware(gradient, parameters, config.outer_rho)
        return recorded(lambda batch: step(alone(batch)))
    own_gradient = recorded(gradient)

    def summed(batch: Batch) -> Tensor:
        own = batch.part(distributed.share(batch.num_tasks))
        flat = own_gradient(own) * (own.num_tasks / batch.num_tasks)
        distributed.all_reduce_sum(flat)
        return flat

    together = _sharpness_aware(summed, parameters, config.outer_rho)
    return lambda batch: step(together(batch))


def _sharpness_aware(gradient: Iteration, parameters: Sequence[Tensor], rho: float) -> Iteration:
    """The gradient `rho` further along itself, by one norm over all parameters (Sharp-MAML_up, Abbas et al. 2022).

    Loss and accuracy are those at the parameters themselves.
    """
    if rho == 0:
        return gradient

    def further(batch: Batch) -> Tensor:
        here = gradient(batch)
        *slopes, _ = torch.split(here, [*(p.numel() for p in parameters), 2])
        ascent = sam({}, {str(i): slope for i, slope in enumerate(slopes)}, rho)
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter, move in zip(parameters, ascent.values(), strict=True):
                    parameter += move.view_as(parameter)
            there = gradient(batch)
        finally:  # where another process is lost, these weights are saved
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
        return torch.cat([there[:-2], here[-2:]])

    return further
