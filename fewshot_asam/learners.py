"""MAML, Sharp-MAML_low and Agnostic-SAM as meta-learners: `clone` and `adapt` in a loop of your own, or batched.

learner = MetaAgnosticSAM(model, lr=0.1, rho=5e-4)
task = learner.clone()
task.adapt(lambda net: cross_entropy(net(x_s), y_s), steps=5)
loss = cross_entropy(task(x_q), y_q)            # gradients flow back to `model`
out = learner.meta_loss(episodes, steps=5)      # the same for a batch of tasks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import engine as engines
from fewshot_asam.clones import Task, whole_steps, with_options
from fewshot_asam.engine import Batch, EngineName, ExecutionMode, InnerLoop, MetaOutput, Objective
from fewshot_asam.engine.functional import exclusive
from fewshot_asam.engine.side_by_side import SideBySide
from fewshot_asam.episodes import Episodes
from fewshot_asam.errors import FewShotError
from fewshot_asam.models import Adapted, running_norms
from fewshot_asam.rules import Rule
from fewshot_asam.rules.agnostic_sam import AgnosticSAMRule
from fewshot_asam.rules.maml import MAMLRule
from fewshot_asam.rules.sharp_maml_low import SharpMAMLRule
from fewshot_asam.rules.validation_sets import Validation
from fewshot_asam.runtime.cores import usable_cores
from fewshot_asam.runtime.forks import AVAILABLE
from fewshot_asam.verification.settings import InnerRate, Norm, checked_inner_loop
from fewshot_asam.verification.trials import Trials

Run = Callable[[InnerLoop, Batch, int, ExecutionMode], MetaOutput]
StepWeights = Sequence[float] | Tensor
_SWITCHES = {field.name for kind in (SharpMAMLRule, AgnosticSAMRule) for field in fields(kind)}


class MetaLearner(nn.Module):
    """A model and the rule that adapts it to a task.

    **Arguments:**

    - `model`: any `nn.Module` from images to logits; its norm layers must not move running statistics.
    - `lr`: inner learning rate alpha; an `nn.Parameter` of one number is meta-learned with the model, and so are
      `LearnedRates`, which are of this learner's `parameters()` and `state_dict()` too.
    - `rule`: the lower-level step with its settings, one of `fewshot_asam.rules` or one's own.
    - `adapt`: which parameters the inner loop changes: `all` (MAML), `head` (ANIL: the last layer), `body` (BOIL: all
      but the last layer), `no_norm` (norm layers are meta-learned only, as in Sharp-MAML's code), a list of names and
      patterns such as `["fc.*"]`, or a function of a parameter's name and the parameter. `adapted` says which they are.
    - `validation`: where Agnostic-SAM's `L_v` comes from in `meta_loss`: a `duplicate` of the support set (the paper's
      choice), a changed copy (`augment`), a `split` of it, or the queries of another task of the batch (`other_task`).
      With `duplicate` Agnostic-SAM differs from Sharp-MAML_low of radius `rho` only by a term of order `rho**2`.
    - `norm`: `transductive` (queries are normalised together) or `inductive` (with the support set's statistics).
    - `zero_head`: the head, the last layer or what is named as for `adapt`, starts every task from zeros and is not
      meta-learned (the zeroing trick of Kao et al., 2022): how a task numbers its classes then changes nothing.
    - `first_order`: the inner gradients are constants (FOMAML, and the same of the other rules).
    - `loss`: a function of predictions and labels, of support and query sets alike.
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
        lr: InnerRate,
        rule: Rule,
        *,
        adapt: Adapted = "all",
        validation: Validation = "duplicate",
        norm: Norm = "transductive",
        zero_head: bool | Sequence[str] = False,
        first_order: bool = False,
        loss: Objective = F.cross_entropy,
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
        self.first_order = first_order
        self.loss = loss
        self.engine = engine
        self.torch_compile = torch_compile
        self.recompute = recompute
        self.check = check
        self._inner_loop: InnerLoop | None = None
        self._settings: tuple[Any, ...] = ()
        self._trials: Trials | None = None
        self._other: tuple[InnerLoop, InnerLoop] | None = None
        self._processes: SideBySide | None = None
        self.inner_loop  # noqa: B018  its own checks

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SWITCHES:
            raise FewShotError(f"{name} is of the learner's rule; set rule = dataclasses.replace(rule, {name}=...)")
        if name == "model" and not isinstance(value, nn.Module):
            raise FewShotError(f"model is {value!r}; expected an nn.Module")
        if name in ("lr", "rule", "loss"):  # which may have been a parameter or a module until now
            for place in (self.__dict__, self._parameters, self._modules):
                place.pop(name, None)
        super().__setattr__(name, value)

    @property
    def inner_loop(self) -> InnerLoop:
        """The settings of the lower level as they are now; made anew, and checked, when one of them has changed."""
        settings = (
            *(self.model, self.lr, self.rule, self.adapt, self.validation, self.norm, self.zero_head),
            *(self.first_order, self.loss),
        )
        with exclusive:
            layout = [(name, value.requires_grad) for name, value in self.model.named_parameters()]
            layout += [(name, layer.training) for name, layer in running_norms(self.model)]
            known = len(self._settings) > 0 and layout == self._settings[-1]
            same = known and all(a is b for a, b in zip(settings, self._settings, strict=False))
            if self._inner_loop is None or not same:
                self._inner_loop, self._settings = checked_inner_loop(*settings), (*settings, layout)
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
        of_its_own = dict.fromkeys(("_inner_loop", "_trials", "_other", "_processes"))
        return {**self.__dict__, **of_its_own, "_settings": ()}

    def forward(self, x: Tensor) -> Tensor:
        """The unadapted model's logits."""
        return self.inner_loop.model({}, x)  # type: ignore[no-any-return]

    def clone(self, first_order: bool | None = None, allow_unused: bool | None = None) -> Task:
        """A task that starts at the meta-parameters, its head at zero with `zero_head`; gradients flow back to them.

        The arguments are learn2learn's; see `Task.adapt`.
        """
        inner_loop = with_options(self.inner_loop, first_order, allow_unused)
        return Task(inner_loop, engines.initial_parameters(inner_loop), self.trials)

    def meta_loss(
        self,
        episodes: Episodes,
        steps: int,
        generator: torch.Generator | None = None,
        *,
        loss: Objective | None = None,
        step_weights: StepWeights | None = None,
    ) -> MetaOutput:
        """Adapts to every task and evaluates its queries; `loss.backward()` gives the meta-gradient.

        **Arguments:**

        - `episodes`: on the model's device.
        - `steps`: inner steps, at least 0.
        - `generator`: for `validation="augment"`, on the same device.
        - `loss`: instead of the learner's, here.
        - `step_weights`: `[steps]`: the loss is the weighted sum of the query losses after each inner step (the
          multi-step loss of MAML++, Antoniou et al. 2019); without it, the one after the last step.

        **Returns:** `MetaOutput`: `loss` (scalar), `logits` `[T, N*Q, N]`, `accuracy` `[T]`.
        """
        return self.batch_loss(self.batch(episodes, generator, step_weights), steps, loss)

    def batch_loss(self, batch: Batch, steps: int, loss: Objective | None = None) -> MetaOutput:
        """`meta_loss` of the tensors that `batch` gave, or of a part of them."""
        return self._run(engines.meta_loss, batch, whole_steps(steps), loss)

    def meta_backward(
        self,
        episodes: Episodes,
        steps: int,
        generator: torch.Generator | None = None,
        *,
        loss: Objective | None = None,
        step_weights: StepWeights | None = None,
    ) -> MetaOutput:
        """`meta_loss(...).loss.backward()` in less memory: task by task where the engine is `loop`."""
        return self.batch_backward(self.batch(episodes, generator, step_weights), steps, loss)

    def batch_backward(self, batch: Batch, steps: int, loss: Objective | None = None) -> MetaOutput:
        """`meta_backward` of the tensors that `batch` gave, or of a part of them."""
        if not torch.is_grad_enabled():
            raise FewShotError("meta_backward was called without gradients, under torch.no_grad(); use meta_loss there")
        return self._run(engines.meta_backward, batch, whole_steps(steps), loss)

    @contextmanager
    def side_by_side(self, processes: int | Literal["auto"] = "auto") -> Iterator[int]:
        """Within, so many processes of one thread each, this one included, share the tasks of a batch on a CPU.

        **Arguments:**

        - `processes`: `auto` takes one for each core that this process may use; its affinity, a container's CPU quota
          and `OMP_NUM_THREADS` are heeded.

        **Returns:** their number, by `as`.

        `meta_backward` is shared, and so are `evaluate` and `meta_loss` under `torch.no_grad`, but not a `meta_loss`
        with a graph. The numbers are those of one thread, bit for bit where tasks are run one by one and the model
        draws nothing. Where a gradient belongs to another tensor, such as a parameter of the loss or of the rule, an
        image, or a `lr` that is no parameter, this process computes the tasks alone.

        The others are forks of this process, made here, and made again when a setting of the learner has changed. They
        see the parameters, the buffers and each layer's mode of the moment; a model that is changed in another way, as
        in the probability of a dropout layer, they see as it was. Linux alone: elsewhere `auto` is 1, and any other
        number raises `FewShotError`, as it does where the system allows no more processes.
        """
        if processes == "auto":
            processes = usable_cores(torch.get_num_threads()).number if AVAILABLE else 1
        if processes < 1:
            raise FewShotError(f"processes is {processes}; expected auto, or at least 1")
        if processes == 1 or self._processes is not None:
            yield 1 if self._processes is None else self._processes.count
            return
        try:
            shared = SideBySide(self, lambda: self.inner_loop, processes)
        except OSError as error:
            raise FewShotError(
                f"processes is {processes}, but the system does not allow as many ({error}); use 1"
            ) from error
        with shared:
            self._processes = shared
            try:
                yield processes
            finally:
                self._processes = None

    def _run(self, function: Run, batch: Batch, steps: int, loss: Objective | None) -> MetaOutput:
        if torch.is_inference_mode_enabled():  # the inner steps need gradients, which its tensors cannot have
            with torch.inference_mode(False), torch.no_grad():
                return self._run(function, batch.copied(), steps, loss)
        if batch.step_weights and len(batch.step_weights[0]) != steps:
            raise FewShotError(
                f"{len(batch.step_weights[0])} step_weights and {steps} steps were given; expected one of each"
            )
        inner_loop = self._with_loss(loss)
        if inner_loop.loss is F.cross_entropy and batch.query[1].is_floating_point():
            raise FewShotError(
                "the labels are floats and the loss is cross_entropy; pass a loss= for them, such as mse_loss, or "
                "class numbers of dtype int64"
            )
        try:
            mode = self.execution_mode(batch)
            return self._side_by_side(function, inner_loop, batch, steps, mode) or function(
                inner_loop, batch, steps, mode
            )
        except (IndexError, RuntimeError, TypeError, ValueError):
            if inner_loop.loss is F.cross_entropy:
                self._require_logits(batch)
            raise

    def _side_by_side(
        self, function: Run, inner_loop: InnerLoop, batch: Batch, steps: int, mode: ExecutionMode
    ) -> MetaOutput | None:
        """The same by several processes, within `side_by_side` and where they can; a graph cannot be shared."""
        processes, wants_graph = self._processes, function is engines.meta_loss and torch.is_grad_enabled()
        if processes is None or wants_graph or inner_loop is not self.inner_loop or not processes.takes(batch):
            return None
        kind: Any = "gradients" if function is engines.meta_backward else "losses"
        found = processes.run(kind, batch, steps, mode)
        return found and engines.output(*found, batch)

    def _with_loss(self, loss: Objective | None) -> InnerLoop:
        """The inner loop with another loss; that of the last one asked for is kept, with what is compiled for it."""
        own = self.inner_loop
        if loss is None or loss is own.loss:
            return own
        if not callable(loss):
            raise FewShotError(f"loss is {loss!r}; expected a function of predictions and labels")
        other = self._other  # read once, as another thread may put one of its own there
        if other is None or other[0] is not own or other[1].loss is not loss:
            other = self._other = own, replace(own, loss=loss, prepared={})
        return other[1]

    def _require_logits(self, batch: Batch) -> None:
        """Raises `FewShotError` for what are not logits, and for labels that the model has none for."""
        images = batch.query[0][0]
        with torch.no_grad():
            logits = self(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise FewShotError(
                f"{type(self.model).__name__}.forward returned {found} for {len(images)} images; expected logits "
                f"[{len(images)}, ways]; use clone() and adapt() for any other output, with a loss of your own"
            )
        ways = logits.shape[-1]
        largest = max(int(labels.max()) for labels in (*batch.support[1::2], batch.query[1]))
        if largest >= ways:
            raise FewShotError(f"labels go up to {largest}, but the model has {ways} logits; expected 0 to {ways - 1}")

    def batch(
        self, episodes: Episodes, generator: torch.Generator | None = None, step_weights: StepWeights | None = None
    ) -> Batch:
        """The tensors that the lower level and the queries need, validation sets drawn."""
        batch = engines.batch(self.inner_loop, episodes, generator)
        if step_weights is None:
            return batch
        images = episodes.support_x
        kind = images.dtype if images.is_floating_point() else torch.get_default_dtype()
        weights = torch.as_tensor(step_weights, dtype=kind, device=images.device)
        return batch._replace(step_weights=(weights,))

    def execution_mode(self, batch: Batch) -> ExecutionMode:
        """How these tasks are run; raises `FewShotError` where the model could not be differentiated rightly so."""
        images = batch.support[0]
        name = engines.choose(self.engine, self.model, images.device, images.shape[-1]).name
        graph = torch.is_grad_enabled()
        mode = ExecutionMode(name, self.torch_compile and graph, self.recompute and graph)
        call: Any = ((images[0],), {})
        if self.engine == "auto" and name == "vmap" and not self.trials.vectorises(call):
            mode = replace(mode, batching="loop")
        self.trials.require(mode, call)
        return mode


class MAML(MetaLearner):
    """Model-agnostic meta-learning (Finn et al. 2017): `theta' = theta - alpha * grad L_t(theta)`.

    **Arguments:** `model`, `lr`, and those of `MetaLearner`, such as `first_order` (FOMAML).
    """

    def __init__(self, model: nn.Module, lr: InnerRate, **options: Any) -> None:
        super().__init__(model, lr, MAMLRule(), **options)


class SharpMAML(MetaLearner):
    """Sharp-MAML_low (Abbas et al. 2022): the lower level descends along the gradient at SAM's perturbed parameters.

    **Arguments:** `model`, `lr`, the settings of `SharpMAMLRule`, such as `rho`, and those of `MetaLearner`.
    """

    def __init__(self, model: nn.Module, lr: InnerRate, *, rho: float = 5e-4, **options: Any) -> None:
        super().__init__(model, lr, SharpMAMLRule(rho, **_taken(options, SharpMAMLRule)), **options)


class MetaAgnosticSAM(MetaLearner):
    """Agnostic-SAM at the lower level (Nguyen et al., equations 4 to 6).

    **Arguments:** `model`, `lr`, the settings of `AgnosticSAMRule`, such as `rho`, and those of `MetaLearner`.
    """

    def __init__(self, model: nn.Module, lr: InnerRate, *, rho: float = 5e-4, **options: Any) -> None:
        super().__init__(model, lr, AgnosticSAMRule(rho, **_taken(options, AgnosticSAMRule)), **options)


def _taken(options: dict[str, Any], rule: type) -> dict[str, Any]:
    """A rule's settings, taken out of `options`."""
    return {field.name: options.pop(field.name) for field in fields(rule) if field.name in options}
