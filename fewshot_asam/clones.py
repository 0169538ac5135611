"""One task's adaptation in a loop of one's own: what `MetaLearner.clone` gives, and the network that closures get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewshot_asam import engine
from fewshot_asam.engine import InnerLoop
from fewshot_asam.engine.functional import FunctionalModel
from fewshot_asam.engine.gradients import autograd_gradient, found_gradients
from fewshot_asam.engine.inner_loop import require_all, step
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules import Gradient, rule_name
from fewshot_asam.rules.graph import graph
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.perturbations import Params, descended
from fewshot_asam.verification.trials import Trials


@dataclass(frozen=True)
class Network:
    """The model with other values for its adapted parameters: call it as you would call the model.

    Layers, methods and values of the model are there too, with these parameters: `net.features(x)`.
    """

    model: FunctionalModel
    params: Params
    trials: Trials

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the model returns for these arguments."""
        self.trials.require(engine.ExecutionMode("loop"), (args, kwargs))
        return self.model(self.params, *args, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """What the model has by that name; raises `AttributeError` where it has nothing."""
        if name.startswith("__"):  # of protocols such as copying, which look for them on any object
            raise AttributeError(name)
        return self.model.attribute(self.params, name, self.trials.require_part)


Closure = Callable[[Network], Tensor]


class Task:
    """One task's copy of the meta-parameters, made by `MetaLearner.clone`.

    Its adapted parameters are in `params`, by name; what is computed from them can be differentiated back to the
    model's own parameters. Layers, methods and values of the model are attributes of the task, with its parameters.
    """

    def __init__(self, inner_loop: InnerLoop, params: Params, trials: Trials) -> None:
        self._inner_loop = inner_loop
        self._trials = trials
        self._state = inner_loop.rule.init(params)
        self._steps = 0
        self.params = params

    def __call__(self, *args: Any, support: Any = None, **kwargs: Any) -> Tensor:
        """What the adapted model returns for these arguments.

        An inductive learner is called as `task(x, support=images)`: the norm uses the statistics of those images.
        """
        if not self._inner_loop.inductive:
            given = kwargs if support is None else {**kwargs, "support": support}
            return self._network(self.params)(*args, **given)
        if support is None or len(args) != 1 or kwargs:
            raise FewShotError(
                "an inductive learner predicts with the support set's statistics; pass support=images: "
                "task(x, support=images)"
            )
        return engine.predict(self._inner_loop.model, self.params, args[0], support)

    def __getattr__(self, name: str) -> Any:
        """As of the network that closures get."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._network(self.params), name)

    def parameters(self) -> Iterator[Tensor]:
        """The model's parameters as this task has them, in the model's order."""
        for name, value in self._inner_loop.model.parameters().items():
            yield self.params.get(name, value)

    def adapt(
        self,
        loss: Closure | Tensor,
        steps: int = 1,
        *,
        validation: Closure | None = None,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
    ) -> Task:
        """`steps` lower-level steps, in place.

        **Arguments:**

        - `loss`: a closure from a `Network` to the training loss, which the rule calls as often as it needs; MAML also
          takes a loss that was computed with this task, for one step, as in learn2learn.
        - `validation`: a closure for `L_v` of Agnostic-SAM; left out, it is a duplicate of `loss`.
        - `first_order`: instead of the learner's, for these steps.
        - `allow_unused`: as in learn2learn, where False refuses parameters that the loss does not depend on; here they
          stay as they are.

        **Returns:** the task itself. Raises `FewShotError` for a loss tensor with a rule that needs a closure, and
        for a loss that has no gradient.
        """
        inner_loop = with_options(self._inner_loop, first_order, allow_unused)
        if torch.is_inference_mode_enabled():
            raise FewShotError("adapt was called in inference mode, which takes no gradients; use torch.no_grad()")
        if isinstance(loss, Tensor):
            self.params = self._descended(inner_loop, loss, whole_steps(steps))
            return self
        if not callable(loss):
            raise FewShotError(f"adapt was given {loss!r}; expected a closure from a network to its loss")
        if validation is None and inner_loop.validation != "duplicate" and inner_loop.rule.needs_validation:
            raise FewShotError(f"validation is {inner_loop.validation!r}, but adapt was given no validation= closure")
        train = self._gradient(inner_loop, loss)
        val = train if validation is None else self._gradient(inner_loop, validation)
        for _ in range(whole_steps(steps)):
            lr = engine.rates(inner_loop, self._steps)
            self.params, self._state = step(inner_loop, (self.params, self._state), (train, val), lr)
            self._steps += 1
        return self

    def _gradient(self, inner_loop: InnerLoop, closure: Closure) -> Gradient:
        def gradient(params: Params) -> Params:
            require_all(inner_loop, params)
            with graph(not inner_loop.first_order):
                return autograd_gradient(lambda at: closure(self._network(at)), params)

        return gradient

    def _network(self, params: Params) -> Network:
        return Network(self._inner_loop.model, params, self._trials)

    def _descended(self, inner_loop: InnerLoop, loss: Tensor, steps: int) -> Params:
        if not isinstance(inner_loop.rule, MAMLRule) or steps != 1:
            raise FewShotError(
                f"{rule_name(inner_loop.rule)} with {steps} steps evaluates the loss more than once and was given a "
                "loss tensor; pass a closure: task.adapt(lambda net: loss_fn(net(x), y), steps=...)"
            )
        grads = found_gradients(loss, self.params, create_graph=not inner_loop.first_order)
        lr = engine.rates(inner_loop, self._steps)
        self._steps += 1
        return descended(self.params, grads, lr)


def with_options(inner_loop: InnerLoop, first_order: bool | None, allow_unused: bool | None) -> InnerLoop:
    """The inner loop with what learn2learn's `clone` and `adapt` take besides."""
    if allow_unused is False:
        raise FewShotError(
            "allow_unused is False, but parameters that the loss does not depend on are left as they are here; "
            "leave it out"
        )
    if first_order is None or first_order == inner_loop.first_order:
        return inner_loop
    return replace(inner_loop, first_order=first_order, prepared={})


def whole_steps(steps: int) -> int:
    """The number of inner steps; raises `FewShotError` where it is none."""
    if isinstance(steps, bool):
        raise FewShotError(f"{steps} was given for the inner steps; expected first_order={steps}, by its name")
    if not isinstance(steps, int):
        raise FewShotError(f"{steps!r} inner steps were asked for; expected a whole number")
    if steps < 0:
        raise FewShotError(f"{steps} inner steps were asked for; expected at least 0")
    return steps
