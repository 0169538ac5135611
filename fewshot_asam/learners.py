"""MAML, Sharp-MAML_low and Agnostic-SAM as meta-learners: `clone` and `adapt` in a loop of your own, or batched.

learner = MetaAgnosticSAM(model, lr=0.1, rho=5e-4)
task = learner.clone()
task.adapt(lambda net: cross_entropy(net(x_s), y_s), steps=5)
loss = cross_entropy(task(x_q), y_q)            # gradients flow back to `model`
out = learner.meta_loss(episodes, steps=5)      # the same for a batch of tasks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fewshot_asam import engine as engines
from fewshot_asam.clones import Task, whole_steps
from fewshot_asam.engine import Batch, EngineName, ExecutionMode, InnerLoop, MetaOutput
from fewshot_asam.engine.functional import FunctionalModel, exclusive
from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError, require_one_of
from fewshot_asam.models import Adapt, adapted_names, require_replaceable, require_stateless, takes_support
from fewshot_asam.rules.inner_step import Rule
from fewshot_asam.rules.validation_sets import Validation
from fewshot_asam.verification.trials import Trials

Norm = Literal["transductive", "inductive"]
Run = Callable[[InnerLoop, Batch, int, ExecutionMode], MetaOutput]
_SWITCHES = {field.name for field in fields(Rule)} - {"name"}


class MetaLearner(nn.Module):
    """A model and the rule that adapts it to a task.

    **Arguments:**

    - `model`: any `nn.Module` from images to logits; its norm layers must not move running statistics.
    - `lr`: inner learning rate alpha; an `nn.Parameter` of one number is meta-learned with the model.
    - `rule`: the lower-level step with its switches.
    - `adapt`: which parameters the inner loop changes: `all` (MAML), `head` (ANIL: the last layer), `body` (BOIL: all
      but the last layer), `no_norm` (norm layers are meta-learned only, as in Sharp-MAML's code), or a list of names
      and patterns such as `["fc.*"]`. `adapted` says which they are.
    - `validation`: where Agnostic-SAM's `L_v` comes from in `meta_loss`: a `duplicate` of the support set (the paper's
      choice), an `augment`ed copy, or a `split` of it. With `duplicate` Agnostic-SAM differs from Sharp-MAML_low of
      radius `rho` only by a term of order `rho**2`.
    - `norm`: `transductive` (queries are normalised together) or `inductive` (with the support set's statistics).
    - `zero_head`: the head, the last layer or what is named as for `adapt`, starts every task from zeros and is not
      meta-learned (the zeroing trick of Kao et al., 2022): how a task numbers its classes then changes nothing.
    - `engine`: how `meta_loss` runs: `loop` over tasks, `vmap`, or `auto`, which chooses by device and model.
    - `torch_compile`: whether the inner gradient and the query loss are compiled by `torch.compile` for training.
    - `recompute`: whether the backward pass runs each inner step anew, so that memory does not grow with the steps.
    - `check`: whether a model that is not of this package is tried on its first images, in double precision: its
      gradient and second derivative against finite differences (about twenty passes of four images, once).

    All of them are attributes that may be set later. Several threads may use one learner.

    Raises `FewShotError` for values out of range and for models that cannot be adapted so; on the first images, for a
    model that PyTorch would differentiate wrongly or cannot differentiate, with the layer's name and what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | nn.Parameter,
        rule: Rule,
        *,
        adapt: Adapt | Sequence[str] = "all",
        validation: Validation = "duplicate",
        norm: Norm = "transductive",
        zero_head: bool | Sequence[str] = False,
        engine: EngineName = "auto",
        torch_compile: bool = False,
        recompute: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.rule = rule
        self.adapt = adapt
        self.validation = validation
        self.norm = norm
        self.zero_head = zero_head
        self.engine = engine
        self.torch_compile = torch_compile
        self.recompute = recompute
        self.check = check
        self._inner_loop: InnerLoop | None = None
        self._settings: tuple[Any, ...] = ()
        self._trials: Trials | None = None
        self.inner_loop  # noqa: B018  its own checks

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SWITCHES:
            raise FewShotError(f"{name} is of the learner's rule; set rule = dataclasses.replace(rule, {name}=...)")
        super().__setattr__(name, value)

    @property
    def inner_loop(self) -> InnerLoop:
        """The settings of the lower level as they are now; made anew, and checked, when one of them has changed."""
        settings = (self.model, self.lr, self.rule, self.adapt, self.validation, self.norm, self.zero_head)
        with exclusive:
            layout = [(name, value.requires_grad) for name, value in self.model.named_parameters()]
            known = len(self._settings) > 0 and layout == self._settings[-1]
            same = known and all(a is b for a, b in zip(settings, self._settings, strict=False))
            if self._inner_loop is None or not same:
                self._inner_loop, self._settings = _lower_level(*settings), (*settings, layout)
                self._trials = None
            return self._inner_loop

    @property
    def trials(self) -> Trials:
        """What is known of the model's derivatives."""
        inner_loop = self.inner_loop
        if self._trials is None:
            self._trials = Trials(inner_loop, self.adapt)
        self._trials.wanted = self.check
        return self._trials

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the parameters that the inner loop changes."""
        return self.inner_loop.adapted

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; never the values that another thread is trying in their place."""
        with exclusive:
            found = list(super().named_parameters(*args, **kwargs))
        yield from found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        with exclusive:
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        with exclusive:
            return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with exclusive:
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes what is compiled and known of its model for itself."""
        return {**self.__dict__, "_inner_loop": None, "_settings": (), "_trials": None}

    def forward(self, x: Tensor) -> Tensor:
        """The unadapted model's logits."""
        return self.inner_loop.model({}, x)  # type: ignore[no-any-return]

    def clone(self) -> Task:
        """A task that starts at the meta-parameters, its head at zero with `zero_head`; gradients flow back to them."""
        inner_loop = self.inner_loop
        return Task(inner_loop, engines.initial_parameters(inner_loop), self.trials)

    def meta_loss(self, episodes: Episodes, steps: int, generator: torch.Generator | None = None) -> MetaOutput:
        """Adapts to every task and evaluates its queries; `loss.backward()` gives the meta-gradient.

        **Arguments:**

        - `episodes`: on the model's device.
        - `steps`: inner steps, at least 0.
        - `generator`: for `validation="augment"`, on the same device.

        **Returns:** `MetaOutput`: `loss` (scalar), `logits` `[T, N*Q, N]`, `accuracy` `[T]`.
        """
        return self.batch_loss(self.batch(episodes, generator), steps)

    def batch_loss(self, tasks: Batch, steps: int) -> MetaOutput:
        """`meta_loss` of the tensors that `batch` gave, or of a part of them."""
        return self._run(engines.meta_loss, tasks, whole_steps(steps))

    def meta_backward(self, episodes: Episodes, steps: int, generator: torch.Generator | None = None) -> MetaOutput:
        """`meta_loss(...).loss.backward()` in less memory: task by task where the engine is `loop`."""
        if not torch.is_grad_enabled():
            raise FewShotError("meta_backward was called without gradients, under torch.no_grad(); use meta_loss there")
        return self._run(engines.meta_backward, self.batch(episodes, generator), whole_steps(steps))

    def _run(self, function: Run, tasks: Batch, steps: int) -> MetaOutput:
        if torch.is_inference_mode_enabled():  # the inner steps need gradients, which its tensors cannot have
            with torch.inference_mode(False), torch.no_grad():
                return self._run(function, tasks.copied(), steps)
        try:
            return function(self.inner_loop, tasks, steps, self.execution_mode(tasks))
        except (IndexError, RuntimeError, TypeError, ValueError):
            self._require_logits(tasks)
            raise

    def _require_logits(self, tasks: Batch) -> None:
        """Raises `FewShotError` for what are not logits, and for labels that the model has none for."""
        images = tasks.query[0][0]
        with torch.no_grad():
            logits = self(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise FewShotError(
                f"{type(self.model).__name__}.forward returned {found} for {len(images)} images; expected logits "
                f"[{len(images)}, ways]; use clone() and adapt() for any other output, with a loss of your own"
            )
        ways = logits.shape[-1]
        largest = max(int(labels.max()) for labels in (*tasks.inner[1::2], tasks.query[1]))
        if largest >= ways:
            raise FewShotError(f"labels go up to {largest}, but the model has {ways} logits; expected 0 to {ways - 1}")

    def batch(self, episodes: Episodes, generator: torch.Generator | None = None) -> Batch:
        """The tensors that the lower level and the queries need, validation sets drawn."""
        return engines.batch(self.inner_loop, episodes, generator)

    def execution_mode(self, tasks: Batch) -> ExecutionMode:
        """How these tasks are run; raises `FewShotError` where the model could not be differentiated rightly so."""
        images = tasks.inner[0]
        name = engines.choose(self.engine, self.model, images.device, images.shape[-1]).name
        mode = ExecutionMode(
            name, self.torch_compile and torch.is_grad_enabled(), self.recompute and torch.is_grad_enabled()
        )
        call: Any = ((images[0],), {})
        if self.engine == "auto" and name == "vmap" and not self.trials.vectorises(call):
            mode = replace(mode, batching="loop")
        self.trials.require(mode, call)
        return mode


def _lower_level(
    model: nn.Module,
    lr: float | Tensor,
    rule: Rule,
    adapt: Adapt | Sequence[str],
    validation: Validation,
    norm: Norm,
    zero_head: bool | Sequence[str],
) -> InnerLoop:
    """The settings, checked."""
    if not isinstance(rule, Rule):
        raise FewShotError(f"the rule is {rule!r}; expected a fewshot_asam.rules.inner_step.Rule")
    require_replaceable(model)
    require_stateless(model)
    require_one_of("validation", validation, get_args(Validation))
    require_one_of("norm", norm, get_args(Norm))
    _require_rate(lr)
    if norm == "inductive" and not takes_support(model):
        raise FewShotError(
            f"{type(model).__name__}.forward takes no `support`, the number of images that give the statistics, "
            "which norm 'inductive' needs; Conv4 and ResNet12 do. A model without batch norm needs no such mode"
        )
    adapted = adapted_names(model, adapt)
    zeroed = adapted_names(model, "head" if zero_head is True else zero_head) if zero_head else ()
    if not set(zeroed) <= set(adapted):
        raise FewShotError(
            f"with adapt {adapt!r} a head that starts every task from zeros would stay there; expected an adapt "
            "that includes the head, such as 'all', or zero_head False (--head-init default or zeros)"
        )
    return InnerLoop(FunctionalModel(model), rule, lr, adapted, validation, norm == "inductive", zeroed)


def _require_rate(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise FewShotError(
            f"the inner learning rate is a {lr.dtype} tensor of shape {list(lr.shape)}; expected one number"
        )
    value = float(lr.detach()) if isinstance(lr, Tensor) else lr
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise FewShotError(f"the inner learning rate is {lr!r}; expected a number above 0")
    if not math.isfinite(value) or (value <= 0 and not isinstance(lr, nn.Parameter)):
        raise FewShotError(f"the inner learning rate is {value}; expected a finite number above 0")


class MAML(MetaLearner):
    """Model-agnostic meta-learning (Finn et al. 2017): `theta' = theta - alpha * grad L_t(theta)`.

    **Arguments:** `model`, `lr`, `first_order` (FOMAML), and those of `MetaLearner`.
    """

    def __init__(
        self, model: nn.Module, lr: float | nn.Parameter, *, first_order: bool = False, **options: Any
    ) -> None:
        super().__init__(model, lr, Rule("maml", first_order=first_order), **options)


class SharpMAML(MetaLearner):
    """Sharp-MAML_low (Abbas et al. 2022): the lower level descends along the gradient at SAM's perturbed parameters.

    **Arguments:** `model`, `lr`, `rho` (radius), those of `MetaLearner`, and `Rule`'s switches.
    """

    def __init__(self, model: nn.Module, lr: float | nn.Parameter, *, rho: float = 5e-4, **options: Any) -> None:
        switches = _take(options, "through_perturbation", "adaptive", "first_order")
        super().__init__(model, lr, Rule("sharp_maml_low", rho=rho, **switches), **options)


class MetaAgnosticSAM(MetaLearner):
    """Agnostic-SAM at the lower level (Nguyen et al., equations 4 to 6).

    **Arguments:** `model`, `lr`, `rho`, `rho1` (None: `2 * rho`), `rho2` (None: `rho`), those of `MetaLearner`, and
    `Rule`'s switches.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | nn.Parameter,
        *,
        rho: float = 5e-4,
        rho1: float | None = None,
        rho2: float | None = None,
        **options: Any,
    ) -> None:
        switches = _take(
            options, "val_grad_point", "val_norm", "through_perturbation", "beta", "adaptive", "first_order"
        )
        super().__init__(model, lr, Rule("agnostic_sam", rho=rho, rho1=rho1, rho2=rho2, **switches), **options)


def _take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}
