"""One task's adaptation in a loop of one's own: what `MetaLearner.clone` gives, and the network that closures get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewshot_asam import engine
from fewshot_asam.engine import InnerLoop
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules import inner_step
from fewshot_asam.rules.inner_step import Loss
from fewshot_asam.rules.perturbations import Params
from fewshot_asam.verification.trials import Trials


@dataclass(frozen=True)
class Network:
    """The model with other values for its adapted parameters: call it as you would call the model."""

    model: FunctionalModel
    params: Params
    trials: Trials

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the model returns for these arguments."""
        self.trials.require(engine.ExecutionMode("loop"), (args, kwargs))
        return self.model(self.params, *args, **kwargs)  # type: ignore[no-any-return]


Closure = Callable[[Network], Tensor]


class Task:
    """One task's copy of the meta-parameters, made by `MetaLearner.clone`.

    Its adapted parameters are in `params`, by name; what is computed from them can be differentiated back to the
    model's own parameters.
    """

    def __init__(self, inner_loop: InnerLoop, params: Params, trials: Trials) -> None:
        self._inner_loop = inner_loop
        self._trials = trials
        self.params = params
        self._memory: Params = {}

    def __call__(self, *args: Any, support: Tensor | None = None, **kwargs: Any) -> Tensor:
        """What the adapted model returns for these arguments.

        An inductive learner is called as `task(x, support=images)`: the norm uses the statistics of those images.
        """
        if not self._inner_loop.inductive:
            return self._network(self.params)(*args, **kwargs)
        if support is None:
            raise FewShotError("an inductive learner predicts with the support set's statistics; pass support=images")
        return engine.predict(self._inner_loop.model, self.params, args[0], support)

    def adapt(self, loss: Closure | Tensor, steps: int = 1, *, validation: Closure | None = None) -> Task:
        """`steps` lower-level steps, in place.

        **Arguments:**

        - `loss`: a closure from a `Network` to the training loss, which the rule calls as often as it needs; MAML also
          takes a loss that was computed with this task, for one step, as in learn2learn.
        - `validation`: a closure for `L_v` of Agnostic-SAM; left out, it is a duplicate of `loss`.

        **Returns:** the task itself. Raises `FewShotError` for a loss tensor with a rule that needs a closure.
        """
        inner_loop = self._inner_loop
        if torch.is_inference_mode_enabled():
            raise FewShotError("adapt was called in inference mode, which takes no gradients; use torch.no_grad()")
        if isinstance(loss, Tensor):
            self.params = self._step_down(loss, steps)
            return self
        if validation is None and inner_loop.validation != "duplicate" and inner_loop.rule.name == "agnostic_sam":
            raise FewShotError(f"validation is {inner_loop.validation!r}, but adapt was given no validation= closure")
        train_loss = self._loss(loss)
        val_loss = None if validation is None else self._loss(validation)
        for _ in range(whole_steps(steps)):
            self.params, self._memory = inner_step.step(
                inner_loop.rule,
                self.params,
                self._memory,
                train_loss,
                val_loss,
                inner_loop.lr,
                inner_step.autograd_gradient,
            )
        return self

    def _loss(self, closure: Closure) -> Loss:
        return lambda params: closure(self._network(params))

    def _network(self, params: Params) -> Network:
        return Network(self._inner_loop.model, params, self._trials)

    def _step_down(self, loss: Tensor, steps: int) -> Params:
        if self._inner_loop.rule.name != "maml" or steps != 1:
            raise FewShotError(
                f"{self._inner_loop.rule.name} with {steps} steps evaluates the loss more than once and was given a "
                "loss tensor; pass a closure: task.adapt(lambda net: loss_fn(net(x), y), steps=...)"
            )
        grads = torch.autograd.grad(
            loss,
            list(self.params.values()),
            create_graph=not self._inner_loop.rule.first_order,
            allow_unused=True,
            materialize_grads=True,
        )
        return inner_step.descended(self.params, dict(zip(self.params, grads, strict=True)), self._inner_loop.lr)


def whole_steps(steps: int) -> int:
    """The number of inner steps; raises `FewShotError` where it is none."""
    if not isinstance(steps, int):
        raise FewShotError(f"{steps!r} inner steps were asked for; expected a whole number")
    if steps < 0:
        raise FewShotError(f"{steps} inner steps were asked for; expected at least 0")
    return steps
