"""The upper level: one meta-iteration, from a batch of tasks to a step of Adam, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewshot_asam.engine import Batch
from fewshot_asam.engine.cuda_graph import CudaGraphed, CudaGraphs
from fewshot_asam.learners import MetaLearner
from fewshot_asam.runtime import distributed
from fewshot_asam.training.config import TrainConfig

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
        adam, lambda index: _rate(config, max(index / config.iterations, spent())), last_epoch=iteration - 1
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
        return recorded(lambda batch: step(gradient(batch)))
    own_gradient = recorded(gradient)

    def together(batch: Batch) -> Tensor:
        own = batch.part(distributed.share(batch.num_tasks))
        flat = own_gradient(own) * (own.num_tasks / batch.num_tasks)
        distributed.all_reduce_sum(flat)
        return step(flat)

    return together


def _rate(config: TrainConfig, done: float) -> float:
    """What meta_lr is multiplied by after that part of the training."""
    return 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
