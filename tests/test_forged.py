"""Contents that are wrong under a right checksum, or without one: refused in one line each."""

# ruff: noqa: F401, F811  fixtures are taken by their names
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
from fewshot_asam import FewShotError
from fewshot_asam.data import Dataset
from fewshot_asam.training.checkpoint import STATES, decode, encode, read_state
from fewshot_asam.training.metrics import read_metrics
from fewshot_asam.training.run_folder import read_summary
from fewshot_asam.training.state import TrainState, build
from short_runs import CPU, cache, dataset, finished, images, require_refusal, run, settings

Forgery = Callable[[dict[str, Any]], object]


def put(*path: str, value: object) -> Forgery:
    """Sets one value of a decoded training state."""

    def forge(state: dict[str, Any]) -> None:
        place = state
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value

    return forge


def drop(*path: str) -> Forgery:
    def forge(state: dict[str, Any]) -> None:
        place = state
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]

    return forge


MOMENT, MEAN, STEP = "optimizer/0/exp_avg_sq", "optimizer/0/exp_avg", "optimizer/0/step"
FORGERIES: dict[str, Forgery] = {
    "no progress": drop("progress"),
    "progress is a list": put("progress", value=[1, 2]),
    "progress is null": put("progress", value=None),
    "progress lacks a name": drop("progress", "rows"),
    **{f"iteration {value!r}": put("progress", "iteration", value=value) for value in ("4", 4.5, True, None, [4])},
    **{f"iteration is {value}": put("progress", "iteration", value=value) for value in (-1, 0, 3, 10**12, 10**4000)},
    "validated later than it is": put("progress", "validated", value=5),
    "validated before the start": put("progress", "validated", value=-1),
    "best of the future": put("progress", "best_iteration", value=10**9),
    "best of none": put("progress", "best_iteration", value=0),
    "more rows than can be": put("progress", "rows", value=9),
    "negative rows": put("progress", "rows", value=-1),
    "rows of 1e30": put("progress", "rows", value=10**30),
    **{f"accuracy {value}": put("progress", "best_accuracy", value=value) for value in (60.0, -0.5)},
    **{f"accuracy is {value!r}": put("progress", "best_accuracy", value=value) for value in ("high", float("nan"))},
    **{f"seconds {value!r}": put("progress", "seconds", value=value) for value in (-1.0, float("inf"), "1")},
    "an engine that there is not": put("progress", "engine", value="steam"),
    "an engine that is none": put("progress", "engine", value={"name": "loop"}),
    "no identity": drop("identity"),
    "identity is text": put("identity", value="mine"),
    "identity lacks the classes": drop("identity", "classes"),
    "settings are a list": put("identity", "settings", value=[]),
    "settings lack one": drop("identity", "settings", "ways"),
    "a setting more": put("identity", "settings", value=lambda old: {**old, "dropout": 0.1}),
    "a digest that is a number": put("identity", "images", value=5),
    "no weights": drop("tensors", "learner/model.head.weight"),
    "weights of another shape": put("tensors", "learner/model.head.weight", value=torch.zeros(3, 5)),
    "weights in float64": put("tensors", "learner/model.head.weight", value=lambda old: old.double()),
    "weights that are not finite": put("tensors", "learner/model.head.weight", value=lambda old: old * float("nan")),
    "infinite best weights": put("tensors", "best/model.head.bias", value=lambda old: old + float("inf")),
    "no best weights": drop("tensors", "best/model.head.bias"),
    "a tensor more": put("tensors", value=lambda old: {**old, "learner/more": torch.zeros(1)}),
    "no moments": drop("tensors", MOMENT),
    "a moment of another shape": put("tensors", MEAN, value=torch.zeros(1)),
    "squares below zero": put("tensors", MOMENT, value=lambda old: old - 1),
    "a mean that is not finite": put("tensors", MEAN, value=lambda old: old / 0.0),
    "another step": put("tensors", STEP, value=torch.tensor(7.0)),
    "a step that is not finite": put("tensors", STEP, value=torch.tensor(float("nan"))),
    "steps": put("tensors", STEP, value=torch.tensor([4.0])),
    "no generator": drop("tensors", "tasks/generator"),
    "a generator cut short": put("tensors", "tasks/generator", value=lambda old: old[:-8].clone()),
    "a generator of ones": put("tensors", "tasks/generator", value=lambda old: torch.full_like(old, 255)),
    "a generator of noughts": put("tensors", "tasks/augmentation", value=torch.zeros_like),
    "a generator of a GPU": put("tensors", "tasks/generator", value=torch.zeros(16, dtype=torch.uint8)),
    "a generator in floats": put("tensors", "tasks/generator", value=lambda old: old.float()),
    "no unlogged": drop("tensors", "unlogged"),
    "unlogged of two columns": put("tensors", "unlogged", value=torch.zeros(0, 2)),
    "unlogged without rows": put("tensors", "unlogged", value=torch.tensor(1.0)),
    "unlogged of more iterations": put("tensors", "unlogged", value=torch.zeros(5, 3)),
    "unlogged accuracy of 9": put("tensors", "unlogged", value=torch.full((1, 3), 9.0)),
    "unlogged loss below zero": put("tensors", "unlogged", value=torch.tensor([[-1.0, 0.5, 1.0]])),
    "unlogged norm below zero": put("tensors", "unlogged", value=torch.tensor([[1.0, 0.5, -1.0]])),
    "unlogged that is not finite": put("tensors", "unlogged", value=torch.full((1, 3), float("nan"))),
}


def restored(images: Path, dataset: Dataset, folder: Path) -> TrainState:
    restored_state = build(settings(images, folder), dataset, CPU)
    restored_state.folder = folder
    restored_state.restore()
    return restored_state


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_training_states_under_a_right_checksum(images: Path, dataset: Dataset, run: Path, name: str) -> None:
    data, path = read_state(run)
    state = decode(data, path)
    FORGERIES[name](state)
    Path(path).write_bytes(encode(state))
    require_refusal(run, r"0004\.ckpt", lambda: restored(images, dataset, run))


def test_a_state_under_another_name_is_refused(images: Path, dataset: Dataset, run: Path) -> None:
    shutil.copy(run / STATES / "0000000002.ckpt", run / STATES / "0000000099.ckpt")
    require_refusal(run, r"0099\.ckpt is not of .*it is of iteration 2", lambda: restored(images, dataset, run))


def test_a_state_that_is_not_forged_is_restored(images: Path, dataset: Dataset, run: Path) -> None:
    """And what is restored is stored again as it was."""
    data, path = read_state(run)
    Path(path).write_bytes(encode(decode(data, path)))
    restored_state = restored(images, dataset, run)
    assert restored_state.progress.iteration == 4
    restored_state.save()
    assert faults.differences(decode(*read_state(run)), decode(data, path)) == []


LOST = [
    *["", "2", "[]", "null", '{"train_loss": 1.0}', '{"iteration": 2, "tra', "[" * 100_000],
    *['{"iteration": "2"}', '{"iteration": 2.0}', '{"iteration": true}', '{"iteration": null}', '{"iteration": -1}'],
    *[f'{{"iteration": {10**30}}}', '{"iteration": 0}', '{"iteration": 2, "colour": 1.0}'],
    *['{"iteration": 2, "train_loss": "low"}', '{"iteration": 2, "train_loss": NaN}'],
    *['{"iteration": 2, "train_loss": Infinity}', '{"iteration": 2, "train_loss": 1e999}'],
    *[f'{{"iteration": 2, "train_loss": {"9" * 400}}}', f'{{"iteration": 2, "train_loss": {"9" * 5000}}}'],
    *['{"iteration": 2, "train_loss": -1.0}', '{"iteration": 2, "train_loss": true}'],
    *['{"iteration": 2, "train_accuracy": 60.0}', '{"iteration": 2, "val_accuracy": -0.1}'],
    *['{"iteration": 2, "val_ci95": [0]}', '{"iteration": 2, "seconds": -5}', '{"iteration": 2, "seconds": 1e300}'],
    *['{"iteration": 2, "congruence_before": 5.0}', '{"iteration": 2, "val_accuracy": {}}'],
]


@pytest.mark.parametrize("line", LOST)
def test_a_line_that_is_no_row_ends_the_metrics(tmp_path: Path, line: str) -> None:
    first = '{"iteration": 1, "train_loss": 2.0, "congruence_before": NaN}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{first}{line}\n{{"iteration": 3}}\n')
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test_accuracy": "high"}, "test_accuracy is 'high'; expected a number"),
        ({"test_accuracy": 60.0}, "test_accuracy is 60.0"),
        ({"val_accuracy": float("nan")}, "val_accuracy is nan"),
        ({"iterations": -4}, "iterations is -4"),
        ({"engine": None}, "engine is None; expected text"),
        ({"wall_seconds": [1]}, r"wall_seconds is \[1\]; expected a number"),
    ],
)
def test_forged_summaries(run: Path, change: dict[str, object], said: str) -> None:
    assert read_summary(run)["iterations"] == 4
    (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | change))
    with pytest.raises(FewShotError, match=f"summary.json holds no summary of a run .{said}.; remove it"):
        read_summary(run)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"test_accuracy": 0.5}', "\0"])
def test_what_is_no_summary(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(FewShotError, match=r"summary\.json (cannot be read|holds no summary).*; remove it"):
        read_summary(tmp_path)
