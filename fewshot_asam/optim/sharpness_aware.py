"""What the sharpness-aware optimizers have in common: gradients taken at other weights than those that are changed.

A step takes several gradients. After each of them one method is called: `first_step`, `second_step` and so on. All but
the last move the weights to where the next gradient is taken; the last one puts them back and lets the base optimizer
step with the last gradient. `step` calls closures and these methods in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fewshot_asam.errors import FewShotError
from fewshot_asam.optim.running_statistics import StillStatistics
from fewshot_asam.rules.checks import require_radius
from fewshot_asam.rules.perturbations import Params, Radius
from fewshot_asam.rules.trees import scaled, squared_norm

Closure: TypeAlias = Callable[[], Any]
"""As PyTorch's own: clears the gradients, computes the loss, calls `backward` and returns the loss."""
Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]
NAMES = ("first_step", "second_step", "third_step", "fourth_step")


class SharpnessAware(Optimizer):
    """A base optimizer that steps with a gradient taken at other weights; see `SAM` for the arguments."""

    def __init__(
        self,
        params: Parameters,
        base: type[Optimizer] | Optimizer,
        radii: dict[str, float | None],
        adaptive: bool,
        scaler: GradScaler | None,
        no_sync: Callable[[], AbstractContextManager[Any]],
        options: dict[str, Any],
    ) -> None:
        self.base = _based(params, base, options)
        self.adaptive, self.scaler, self.no_sync = adaptive, scaler, no_sync
        self._still = StillStatistics()
        self._begin_anew()
        super().__init__(self.base.param_groups, radii)
        self.param_groups = self.base.param_groups

    def _begin_anew(self) -> None:
        self._taken = 0
        """gradients of the present step"""
        self._saved: list[Tensor] = []
        self._remembered: dict[str, Params] = {}
        """what becomes state if the step is made"""
        self._overflow = False
        self._still.release()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all but the step that has begun and what a scheduler put in the place of `step`."""
        return {name: value for name, value in self.__dict__.items() if name != "step" and not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._still = StillStatistics()
        self._begin_anew()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have radii of its own; see `torch.optim.Optimizer`."""
        if not _is_one(param_group, self.base):
            self.base.add_param_group(param_group)
        for name, value in self.defaults.items():
            require_radius(name, param_group.setdefault(name, value))

    def state_dict(self) -> dict[str, Any]:
        """The groups, this optimizer's own state and, as `base_state`, that of the base optimizer."""
        return {**super().state_dict(), "base_state": self.base.state_dict()["state"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; raises `FewShotError` where it is another optimizer's."""
        if not {"state", "param_groups", "base_state"} <= state_dict.keys():
            raise FewShotError(
                f"the state dict has {', '.join(map(str, state_dict))}; expected state, param_groups and base_state, "
                f"as state_dict of {type(self).__name__} gives them"
            )
        self.restore()
        self.base.load_state_dict({"state": state_dict["base_state"], "param_groups": state_dict["param_groups"]})
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back where the step began and forgets its gradients, as if it had not been begun.

        A step by hand that is given up needs this: until then the running statistics of norm layers stand still.
        """
        if self._saved:
            torch._foreach_copy_(self._parameters(), self._saved)
        self._begin_anew()

    def _run(self, closures: Sequence[Closure]) -> Any:
        """Calls the closures, each followed by its method. **Returns:** the first one's loss."""
        self._expect(0)
        loss = None
        try:
            for number, closure in enumerate(closures):
                last = number == len(closures) - 1
                with torch.enable_grad(), nullcontext() if last else self.no_sync():
                    found = closure()
                loss = found if number == 0 else loss
                getattr(self, NAMES[number])()
                if self._overflow:
                    self._finish()
                    break
        except BaseException:
            self.restore()
            raise
        return loss

    def _expect(self, taken: int) -> None:
        """Raises `FewShotError` unless so many gradients of the step were taken."""
        if taken != self._taken:
            due, called = NAMES[self._taken], NAMES[taken]
            self.restore()
            raise FewShotError(
                f"{called} was called where {due} is due; expected them in order, each after its own backward pass: "
                "the weights are put back, begin the step again"
            )

    def _gradient(self, taken: int) -> Params:
        """The gradients by the parameters' numbers, zeros where there are none; not scaled any more.

        From here on the running statistics of norm layers stand still.
        """
        self._expect(taken)
        parameters = self._parameters()
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
            self.restore()
            raise FewShotError("a gradient is sparse; expected dense ones: build the embedding with sparse=False")
        self._taken += 1
        self._still.hold()
        found = {str(number): torch.zeros_like(p) if p.grad is None else p.grad for number, p in enumerate(parameters)}
        if self.scaler is None or not self.scaler.is_enabled():
            return found
        found = scaled(found, 1 / self.scaler.get_scale())
        if not self._overflow and not squared_norm(found).isfinite():
            self._overflow = True
            self.scaler.unscale_(self.base)  # which notes the overflow for `scaler.update`
        return found

    def _move(self, perturbation: Params, zero_grad: bool) -> None:
        """To the weights at the beginning of the step, perturbed so; nowhere after an overflow."""
        parameters = self._parameters()
        if not self._overflow:
            if not self._saved:
                self._saved = [p.clone() for p in parameters]
            else:
                torch._foreach_copy_(parameters, self._saved)
            torch._foreach_add_(parameters, list(perturbation.values()))
        if zero_grad:
            self.zero_grad()

    def _last(self, taken: int, zero_grad: bool) -> None:
        """The weights put back, and the base optimizer's step with the gradients that are there."""
        self._gradient(taken)
        self._finish()
        if zero_grad:
            self.zero_grad()

    def _finish(self) -> None:
        remembered, made = self._remembered, not self._overflow
        self.restore()
        if self.scaler is None:
            self.base.step()
        else:
            self.scaler.step(self.base)
        self._opt_called = True  # or else a scheduler would warn of a loop that does not call `step`
        for name, values in remembered.items() if made else ():
            for parameter, value in zip(self._parameters(), values.values(), strict=True):
                self.state[parameter][name] = value

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _stored(self, name: str) -> Params:
        """What was remembered under this name, by the parameters' numbers; empty before the first step."""
        parameters = self._parameters()
        if not any(name in self.state[p] for p in parameters):
            return {}
        return {str(i): self.state[p].get(name, torch.zeros_like(p)) for i, p in enumerate(parameters)}

    def _weights(self) -> Params:
        """The weights at the beginning of the step, by number."""
        return {str(number): value for number, value in enumerate(self._saved or self._parameters())}

    def _radius(self, of: Callable[[Mapping[str, Any]], float]) -> Radius:
        """One radius, or one by parameter where groups differ."""
        radii = [of(group) for group in self.param_groups for p in group["params"] if p.requires_grad]
        return radii[0] if len(set(radii)) == 1 else {str(number): radius for number, radius in enumerate(radii)}


def _based(params: Parameters, base: type[Optimizer] | Optimizer, options: dict[str, Any]) -> Optimizer:
    """The base optimizer, made where a class was given."""
    if not isinstance(base, Optimizer):
        return base(params, **options)
    if options:
        raise FewShotError(
            f"{', '.join(options)} is given, but the base optimizer is made already; give it its options there"
        )
    groups = list(params)
    if any(isinstance(one, dict) and one.keys() != {"params"} and not _is_one(one, base) for one in groups):
        raise FewShotError(
            "a group is given settings, but the base optimizer is made already; give them to its own group: pass "
            "optimizer.param_groups"
        )
    given = [p for one in groups for p in (one["params"] if isinstance(one, dict) else [one])]
    if {id(p) for p in given} != {id(p) for group in base.param_groups for p in group["params"]}:
        raise FewShotError(
            "the base optimizer was made of other parameters than those given; expected the same: pass "
            "optimizer.param_groups"
        )
    return base


def _is_one(group: dict[str, Any], base: Optimizer) -> bool:
    return any(group is own for own in base.param_groups)
