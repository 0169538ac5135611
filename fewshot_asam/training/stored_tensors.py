"""The tensors of a training state: taken from what they are in, judged, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.training.checkpoint import Weights, not_finite, weights
from fewshot_asam.training.metrics import MEASURED
from fewshot_asam.training.progress import Progress

MOST_STEPS = 2**24
"""The optimiser counts its steps in single precision, which ends here."""


@dataclass(frozen=True)
class Holders:
    """What has tensors that change while training."""

    learner: MetaLearner
    optimizer: torch.optim.Optimizer
    tasks: EpisodeSampler

    def tensors(self, best: Weights, unlogged: Tensor) -> Weights:
        """All of them, with the best weights and the numbers of iterations that are not logged; on the CPU."""
        moments = self.optimizer.state_dict()["state"]
        found = {
            **_prefixed("learner", self.learner.state_dict()),
            **_prefixed("best", best),
            **_prefixed("tasks", self.tasks.state_dict()),
            **{name: value for i in moments for name, value in _prefixed(f"optimizer/{i}", moments[i]).items()},
            "unlogged": unlogged,
        }
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def put_back(self, tensors: Weights, progress: Progress) -> tuple[Weights, Tensor]:
        """Puts in what `tensors` gave after this progress; returns the best weights and the unlogged numbers."""
        self.learner.load_state_dict(_below("learner", tensors))
        self.tasks.load_state_dict(_below("tasks", tensors))
        moments = {index: _below(f"optimizer/{index}", tensors) for index in self._moments(progress)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        return _below("best", tensors), tensors["unlogged"]

    def problem(self, tensors: Weights, progress: Progress) -> str:
        """What is wrong with the tensors of a state with this progress; empty where nothing is."""
        expected = self._expected(tensors, progress)
        for name in expected.keys() ^ tensors.keys():
            return f"{name} is {'missing' if name in expected else 'unknown'}"
        for name, like in expected.items():
            if (found := tensors[name]).shape != like.shape or found.dtype != like.dtype:
                return f"{name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}"
        if bad := not_finite(tensors):
            return f"{bad} has numbers that are not finite"
        unlogged, most = tensors["unlogged"], MEASURED["train_accuracy"][1]
        if bool((unlogged < 0).any() or (unlogged[:, 1] > most).any()):
            return "unlogged has a loss, an accuracy or a norm that cannot be"
        for index in self._moments(progress):
            if tensors[f"optimizer/{index}/step"].item() != min(progress.iteration, MOST_STEPS):
                return f"optimizer/{index}/step is not the iteration"
            if bool((tensors[f"optimizer/{index}/exp_avg_sq"] < 0).any()):
                return f"optimizer/{index}/exp_avg_sq has squares below 0"
        return ""

    def _expected(self, tensors: Weights, progress: Progress) -> Weights:
        """Tensors like those that there must be."""
        state = weights(self.learner)
        rows = (*tensors.get("unlogged", torch.empty(0)).shape, 0)[0]
        expected = {"unlogged": torch.empty(min(rows, progress.iteration), 3, device="cpu")}
        expected |= _prefixed("learner", state) | _prefixed("best", state if progress.best_iteration else {})
        expected |= _prefixed("tasks", self.tasks.state_dict())
        step = torch.tensor(0.0, device="cpu")
        for index, parameter in self._moments(progress).items():
            moments = {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
            expected |= _prefixed(f"optimizer/{index}", moments)
        return expected

    def _moments(self, progress: Progress) -> dict[int, Tensor]:
        """The parameters, by number, of which the optimiser has a state then."""
        parameters = self.optimizer.param_groups[0]["params"]
        return dict(enumerate(p.detach() for p in parameters)) if progress.iteration else {}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Weights:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Weights:
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
