"""Tasks side by side in forks of this process: the numbers of one process, whatever happens to the forks."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import faults
from conftest import make_images
from fewshot_asam import FewShotError, learners
from fewshot_asam.engine import side_by_side
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model
from fewshot_asam.rates import LearnedRates
from fewshot_asam.runtime import forks
from fewshot_asam.runtime.cores import Cores
from fewshot_asam.training.checkpoint import decode, read_state
from fewshot_asam.training.evaluation import evaluate
from problems import SHAPE, deviation, episodes, made_learner

TASKS = 5
"""Of a meta-batch: not divisible by the numbers of processes."""


def made(rule: str = "maml", **options: Any) -> MetaLearner:
    model = build_model("conv4", 3, SHAPE, 4, seed=0).double()
    return made_learner(model, 0.1, rule, **{"engine": "loop", **options})


def results(learner: MetaLearner, seed: int = 0, **options: Any) -> list[Tensor]:
    """All that `meta_backward` gives, its gradients on top of others."""
    for value in learner.parameters():
        value.grad = torch.full_like(value, 1e-3) if value.requires_grad else None
    generator = torch.Generator().manual_seed(seed)
    out = learner.meta_backward(episodes(tasks=TASKS, seed=seed), 2, generator, **options)
    return [*out, *(value.grad for value in learner.parameters() if value.grad is not None)]


@pytest.fixture(autouse=True)
def others() -> Iterator[None]:
    """Processes that earlier tests have left to this one are not counted."""
    _others.update(_children(os.getpid()))
    yield
    _others.clear()


_others: set[int] = set()


def children(pid: int) -> list[int]:
    return [child for child in _children(pid) if child not in _others]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("maml", {}),
        ("agnostic_sam", {"validation": "augment"}),
        ("agnostic_sam first order", {"adapt": "head"}),
        ("sharp_maml_low", {"norm": "inductive"}),
    ],
)
def test_the_numbers_are_those_of_one_process_bit_for_bit(rule: str, options: dict[str, Any]) -> None:
    learner = made(rule, **options)
    expected = [results(learner, seed, step_weights=[0.3, 0.7]) for seed in range(2)]
    for count in (2, 3, TASKS + 2):
        with learner.side_by_side(count):
            assert len(children(os.getpid())) == count - 1
            assert all(same(results(learner, seed, step_weights=[0.3, 0.7]), expected[seed]) for seed in range(2))
        assert children(os.getpid()) == []


def test_there_is_a_process_for_each_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "usable_cores", lambda threads: Cores(3 * threads, "of a test"))
    learner = made()
    with learner.side_by_side() as outer, learner.side_by_side(2) as inner:
        assert (outer, inner) == (3, 3)
        assert len(children(os.getpid())) == 2
    monkeypatch.setattr(learners, "AVAILABLE", False)
    with learner.side_by_side() as alone:
        assert alone == 1


def test_vectorised_tasks_agree_up_to_rounding() -> None:
    learner = made("agnostic_sam", engine="vmap")
    expected = results(learner)
    with learner.side_by_side(2):
        found = results(learner)
    assert max(deviation(*pair) for pair in zip(found, expected, strict=True)) < 1e-12
    assert not same(found, expected)  # the work was shared


@pytest.mark.parametrize("rates", ["parameter", "layer_and_step"])
def test_learned_rates_get_their_gradients(rates: str) -> None:
    learner = made()
    learner.lr = (
        nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        if rates == "parameter"
        else LearnedRates(learner.model, "layer_and_step", lr=0.1, steps=2).double()
    )
    expected = results(learner)
    with learner.side_by_side(2):
        assert same(results(learner), expected)


def test_what_is_not_the_learners_gets_all_of_its_gradient() -> None:
    """Forks know nothing of it: this process computes the tasks."""
    factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weights = nn.Parameter(torch.tensor([0.25, 0.75], dtype=torch.float64))
    images = episodes(tasks=TASKS)
    learned = images.support_x.clone().requires_grad_()
    scaled = made(loss=lambda logits, y: F.cross_entropy(factor * logits, y))
    for learner, wanted, given, options in (
        (scaled, factor, images, {}),
        (MetaLearner(made().model, rate, made().rule, engine="loop"), rate, images, {}),
        (made(), weights, images, {"step_weights": weights}),
        (made(), learned, replace(images, support_x=learned), {}),
    ):
        learner.meta_backward(given, 2, **options)
        expected, wanted.grad = wanted.grad, None
        with learner.side_by_side(2), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner.meta_backward(given, 2, **options)
            learner.meta_backward(given, 2, **options)
        assert wanted.grad is not None
        assert expected is not None
        assert deviation(wanted.grad, 2 * expected) < 1e-12
        of_step = wanted is factor or wanted is rate
        assert ["by this process alone" in str(one.message) for one in said] == [True] * of_step


def test_a_rate_that_is_no_parameter_is_heeded_at_once() -> None:
    learner = made()
    learner.lr = torch.tensor(0.1, dtype=torch.float64)
    with learner.side_by_side(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results(learner)
        learner.lr.mul_(4)
        found = results(learner)
    assert same(found, results(learner))


class Counting(nn.Module):
    """A classifier that knows how often it was called here, and draws nothing; its buffer scales the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.scale < 0:
            raise ValueError("a scale below 0")
        return self.net(x) * self.scale * (2 if self.training else 1)  # type: ignore[no-any-return]


def counting() -> MetaLearner:
    torch.manual_seed(0)
    return made_learner(Counting().double(), 0.1, "maml", engine="loop", check=False)


def test_the_work_is_shared_and_the_state_of_each_call_heeded() -> None:
    learner = counting()
    model: Any = learner.model
    changes = [lambda: None, lambda: model.scale.fill_(0.5), model.eval, lambda: model.net[1].weight.data.mul_(2)]
    shared: list[list[Tensor]] = []
    for change in changes:
        change()
        shared.append(results(learner))
    learner = counting()
    model = learner.model
    with learner.side_by_side(3):
        for change, expected in zip(
            [lambda: None, lambda: model.scale.fill_(0.5), model.eval, lambda: model.net[1].weight.data.mul_(2)],
            shared,
            strict=True,
        ):
            change()
            model.calls = -2 if expected is shared[0] else 0  # a step and its queries are looked at first, once
            assert same(results(learner), expected)
            assert model.calls == 3  # two steps and the queries of one task out of five
    assert len({float(out[0]) for out in shared}) == 4


def test_settings_that_change_are_heeded() -> None:
    changes: list[tuple[str, Any]] = [("first_order", True), ("adapt", "head"), ("loss", _squares)]
    alone, together = made("agnostic_sam"), made("agnostic_sam")
    with together.side_by_side(2):
        for name, value in changes:
            setattr(alone, name, value)
            setattr(together, name, value)
            assert same(results(together), results(alone))
        assert same(results(together, loss=F.cross_entropy), results(alone, loss=F.cross_entropy))
        parameter = next(together.parameters())
        seen: list[int] = []
        hook = parameter.register_hook(lambda grad: seen.append(1))
        assert same(results(together), results(alone))
        assert len(seen) == TASKS
        hook.remove()
        copied = pickle.loads(pickle.dumps(made()))
        assert same(results(copied), results(made()))


def _squares(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits, F.one_hot(labels, logits.shape[-1]).to(logits.dtype))


def test_tests_are_shared_too() -> None:
    def accuracies(learner: MetaLearner) -> Tensor:
        sampler = EpisodeSampler(make_images(12, 8, SHAPE, 0), 3, 2, 2, seed=1)
        return evaluate(learner, sampler, 21, 2)

    learner, other = made().float(), made("agnostic_sam").float()
    expected = accuracies(learner)
    with learner.side_by_side(3), other.side_by_side(2):
        assert torch.equal(accuracies(learner), expected)
        assert not torch.equal(accuracies(other), expected) or len(expected.unique()) > 1
        with torch.no_grad():
            loss = learner.float().meta_loss(_single(), 2).loss
        assert loss.grad_fn is None
        graph = learner.meta_loss(_single(), 2).loss
        graph.backward()  # type: ignore[no-untyped-call]
        assert graph.item() == pytest.approx(loss.item(), rel=1e-5)


def _single() -> Any:
    drawn = episodes(tasks=TASKS)
    return replace(drawn, support_x=drawn.support_x.float(), query_x=drawn.query_x.float())


def test_a_fork_that_is_killed_costs_nothing_but_time() -> None:
    learner = made()
    expected = results(learner)
    with learner.side_by_side(3):
        os.kill(children(os.getpid())[0], signal.SIGKILL)
        with pytest.warns(UserWarning, match=r"killed by signal 9.*2 of 3 go on"):
            assert same(results(learner), expected)
        assert same(results(learner), expected)
        assert len(children(os.getpid())) == 1


def test_what_fails_in_a_fork_fails_here_with_its_own_message() -> None:
    learner = counting()
    expected = results(learner)
    with learner.side_by_side(2):
        learner.model.scale.fill_(-1.0)  # type: ignore[operator,union-attr]
        with pytest.raises(ValueError, match="a scale below 0"):
            results(learner)
        learner.model.scale.fill_(1.0)  # type: ignore[operator,union-attr]
        assert same(results(learner), expected)


def test_where_no_process_can_be_made_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    learner = made()
    with pytest.raises(FewShotError, match="processes is 0; expected auto, or at least 1"), learner.side_by_side(0):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        with pytest.raises(FewShotError, match="does not allow as many"), learner.side_by_side(2):
            pass
        patch.setattr(forks, "AVAILABLE", False)
        with pytest.raises(FewShotError, match="use 1"), learner.side_by_side(2):
            pass
    expected = results(learner)
    with learner.side_by_side(2):
        learner.first_order = True
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", refuse)
            with pytest.warns(UserWarning, match="by this process alone"):
                found = results(learner)
        assert not same(found, expected)
        learner.first_order = False
        assert same(results(learner), expected)


def test_a_fork_that_hangs_at_its_start_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another thread held a lock at that moment."""
    monkeypatch.setattr(forks, "LONGEST_START", 0.2)
    monkeypatch.setattr(side_by_side.SideBySide, "_serve", lambda *_: time.sleep(60))
    learner = made()
    with pytest.raises(FewShotError, match="no answer within"), learner.side_by_side(2):
        pass
    assert children(os.getpid()) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data-root", str(faults.write_images(tmp_path_factory.mktemp("images")))]


def require_ended(pids: list[int]) -> None:
    for _ in range(500):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError("orphans are left")


def test_a_run_by_several_processes_is_that_of_one(data: list[str], tmp_path: Path) -> None:
    """Stopped, its group interrupted as from a keyboard, killed, and resumed by other numbers of processes."""
    folder = tmp_path / "run"
    expected = tmp_path / "expected"
    more = [*data, "--meta-batch-size", TASKS, "--iterations", 60, "--checkpoint-every", 5]
    assert faults.finish(expected, *more, "--processes", 1)[0] == 0
    for number, count, status in ((signal.SIGTERM, 2, 143), (signal.SIGINT, 3, 130), (signal.SIGKILL, 2, -9)):
        done = decode(*read_state(folder))["progress"]["iteration"] if (folder / "checkpoints").exists() else 0
        process = faults.start(folder, *more, "--processes", count, prepare=os.setsid)
        faults.wait_for_text(faults.log(folder), f"{count} processes of 1 thread")
        faults.wait_for_text(folder / "metrics.jsonl", f'"iteration": {done + 6},')
        assert process.pid is not None
        forked = children(process.pid)
        assert len(forked) == count - 1
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == status, faults.log(folder).read_text()
        require_ended(forked)
    process = faults.start(folder, *more, "--processes", 3)
    faults.wait_for_text(faults.log(folder), "3 processes of 1 thread")
    with suppress(IndexError, ProcessLookupError):  # it may have ended
        os.kill(children(process.pid or 0)[0], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 0, faults.log(folder).read_text()
    found, one = faults.outcome(folder), faults.outcome(expected)
    assert found["summary"].pop("processes") == 3
    assert one["summary"].pop("processes") == 1
    for outcome in (found, one):
        outcome["summary"].pop("title", None)
        outcome["files"][0] = 0
    differences = faults.differences(found, one)
    assert differences == []
