"""A model, a learner and a dataset of one's own in the trainer: trained, stopped, resumed, tested."""

# ruff: noqa: F811  fixtures are taken by their names
from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import faults
import own_parts
from conftest import make_images
from fewshot_asam import Conv4, EpisodeSampler, MetaLearner
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.runtime.signals import Stop, Stopped
from fewshot_asam.training.checkpoint import load_weights
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import evaluate, interval
from fewshot_asam.training.loop import train
from fewshot_asam.training.run_folder import stored_settings
from own_parts import SHAPE, RegisteredTwice, own_dataset, own_learner, with_dropout
from short_runs import cache, images, require_refusal, settings  # noqa: F401

Parts = Callable[[], dict[str, Any]]


def of_folder(images: Path, folder: Path, **changes: Any) -> TrainConfig:
    return settings(images, folder, **({"iterations": 6, "engine": "auto", "checkpoint_every": 4} | changes))


def of_own_data(_: Path, folder: Path, **changes: Any) -> TrainConfig:
    """The same, without a dataset."""
    quick = {"ways": 3, "queries": 2, "iterations": 6, "meta_batch_size": 2, "validate_every": 2, "validate_tasks": 4}
    options: dict[str, Any] = quick | {"test_tasks": 4, "checkpoint_every": 4, "device": "cpu", "output_dir": folder}
    return TrainConfig(**(options | changes))


CASES: dict[str, tuple[Parts, Callable[..., TrainConfig], dict[str, Any], dict[str, Any]]] = {
    "a function": (
        lambda: {"model": with_dropout},
        of_folder,
        {"inner": "agnostic_sam", "validation": "augment"},
        {"model": "own_parts:with_dropout"},
    ),
    "a name": (lambda: {}, of_folder, {"model": "own_parts:RegisteredTwice"}, {"model": "own_parts:RegisteredTwice"}),
    "a lambda": (
        lambda: {"model": lambda ways, shape: RegisteredTwice(ways, shape)},
        of_folder,
        {"adapt": "h*.*"},
        {"model": "test_own_parts:<lambda>.<locals>.<lambda>", "from_python": ["model"], "adapt": ["h*.*"]},
    ),
    "a dataset": (
        lambda: {"dataset": own_dataset()},
        of_own_data,
        {"model": "own_parts:RegisteredTwice"},
        {"dataset": "of mine", "from_python": ["dataset"]},
    ),
    "a learner": (
        lambda: {"learner": own_learner(), "dataset": own_dataset()},
        of_own_data,
        {"inner_steps": 2},
        {"dataset": "of mine", "from_python": ["learner", "dataset"]},
    ),
}
"""What is given, the settings, changes to them and what is recorded."""


class StopAfter(Stop):
    """A request that comes after so many iterations."""

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.left = iterations

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped(signal.SIGTERM)


@pytest.fixture(params=CASES, scope="module")
def case(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Parts, Callable[[Path], TrainConfig], dict[str, Any], Path]:
    """What is given, the settings of a run in a folder, what is recorded, and a finished run."""
    parts, base, changes, recorded = CASES[request.param]
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(base(images, folder, **changes), **parts())
    return parts, lambda place: base(images, place, **changes), recorded, folder


def test_a_run_with_own_parts_goes_on_bit_for_bit(case: Any, tmp_path: Path) -> None:
    parts, config, _, whole = case
    folder = tmp_path / "run"
    engine = (
        {} if parts().get("learner") else {"engine": yaml.safe_load((whole / "summary.json").read_text())["engine"]}
    )
    with pytest.raises(Stopped, match="goes on after iteration 3 of 6"):
        train(replace(config(folder), **engine), stop=StopAfter(4), **parts())
    torch.rand(3)  # what a program draws meanwhile changes nothing
    train(replace(config(folder), **engine), resume=True, **parts())
    found, expected = faults.outcome(folder), faults.outcome(whole)
    for outcome in (found, expected):
        for kept in (outcome["summary"], outcome["state"]["identity"]["settings"]):
            kept.pop("engine", None)
    for kind in ("state", "rows", "summary", "events"):
        assert faults.differences(found[kind], expected[kind]) == []
    for name in ("last", "best"):
        assert faults.differences(*(load_file(place / f"{name}.safetensors") for place in (folder, whole))) == []


def test_what_was_given_is_recorded(case: Any) -> None:
    _, _, recorded, folder = case
    for name in ("config.yaml", "summary.json"):
        written = yaml.safe_load((folder / name).read_text())
        assert written | recorded == written
        assert ("from_python" in written) == ("from_python" in recorded)
        if "learner" in written.get("from_python", ()):
            assert "LogRate(RegisteredTwice, lr=0.2, rule=SharpMAMLRule(rho=0.05" in written["model"]
            assert not {"inner_lr", "first_order", "adapt"} & written.keys()
    assert stored_settings(folder).output_dir == folder


def test_a_run_with_own_parts_is_tested(case: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By `eval_maml` where names stand for all; else in one line it says what to do, and Python can."""
    parts, config, recorded, folder = case
    summary = yaml.safe_load((folder / "summary.json").read_text())
    status = eval_maml.main([str(folder), "--tasks", "4"])
    printed, said = capsys.readouterr()
    if "from_python" not in recorded:
        assert status == 0, said
        assert f"test accuracy {100 * summary['test_accuracy']:.1f} % ± {100 * summary['test_ci95']:.1f} (" in printed
        return
    given = recorded["from_python"]
    assert (status, printed) == (2, "")
    assert all(f"the {part} (" in said for part in given)
    assert f"train(config, {', '.join(f'{part}=...' for part in given)}, resume=True)" in said
    assert len(said.splitlines()) == 1
    assert train_maml.main(["--resume", "--output-dir", str(folder)]) == 2
    assert capsys.readouterr().err == said
    again = train(config(folder), resume=True, **parts())
    assert again["test_accuracy"] == summary["test_accuracy"]


def test_a_learner_has_the_best_weights_in_the_end_and_its_own_engine(tmp_path: Path) -> None:
    learner, data = own_learner(), own_dataset()
    before = learner.log_rate.item()
    summary = train(of_own_data(tmp_path, tmp_path / "run"), learner=learner, dataset=data)
    assert learner.engine == "vmap"
    assert learner.log_rate.item() != before
    assert (summary["inner"], summary["rho"], summary["norm"]) == ("sharp_maml_low", 0.05, "transductive")
    other = own_learner(rate=0.9)
    load_weights(tmp_path / "run" / "best.safetensors", other)
    for found in (learner, other):
        accuracy = interval(evaluate(found, EpisodeSampler(data.test, 3, 1, 2), 4, 1))
        assert accuracy.mean == summary["test_accuracy"]


@pytest.mark.parametrize("make", [own_learner, own_parts.learned_rate, own_parts.learned_rates])
def test_all_that_a_learner_has_is_trained_and_saved(make: Callable[[], MetaLearner], tmp_path: Path) -> None:
    learner = make()
    extra = {name for name, _ in learner.named_parameters() if not name.startswith("model.")}
    assert extra == {"log_rate", "unused"} or {name.partition(".")[0] for name in extra} == {"lr"}
    start = {name: value.clone() for name, value in learner.state_dict().items()}
    train(of_own_data(tmp_path, tmp_path / "run"), learner=learner, dataset=own_dataset())
    last = load_file(tmp_path / "run" / "last.safetensors")
    assert last.keys() == start.keys()
    for name in extra:
        assert torch.equal(last[name], start[name]) == (name == "unused")
    state = faults.outcome(tmp_path / "run")["state"]["tensors"]
    moments = {name for name in state if name.endswith("exp_avg")}
    assert len(moments) == len(list(learner.parameters()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": Conv4(3, SHAPE, 4)}, "model is a Conv4 that is made already; expected a function"),
        ({"model": "own_parts:with_dropout"}, "model is a str; expected a function"),
        ({"model": with_dropout, "learner": own_learner()}, "model and learner are given; expected one"),
        ({"learner": with_dropout(3, SHAPE)}, "learner is a Sequential; expected a MetaLearner"),
        ({"learner": own_parts.learned_rate(2), "dataset": own_dataset()}, r"returned \[6, 2\] for 6 images; expected"),
        (
            {"learner": own_learner(model=own_parts.Remembering), "dataset": own_dataset()},
            "model._extra_state in the learner's state_dict is a dict; expected tensors of plain numbers",
        ),
        ({"model": own_parts.Remembering, "dataset": own_dataset()}, "model._extra_state in .* is a dict"),
        ({"dataset": own_dataset(5)}, "the dataset's name is 5; expected a few letters"),  # type: ignore[arg-type]
        ({"dataset": make_images(6, 5, SHAPE, 0)}, "dataset is a ImageSet; expected a fewshot_asam.Dataset"),
        ({"dataset": own_dataset("../mine")}, "the dataset's name is '../mine'; expected a few letters"),
        (
            {"dataset": replace(own_dataset(), val=make_images(6, 5, (1, 8, 8), 0))},
            r"of mine, validation: images are \(1, 8, 8\), but \(1, 16, 16\) in training",
        ),
        ({"dataset": replace(own_dataset(), test=make_images(2, 5, SHAPE, 0))}, "of mine, test: ways is 3, but"),
    ],
)
def test_what_cannot_be_given(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    require_refusal(tmp_path, message, lambda: train(of_own_data(tmp_path, tmp_path / "run"), **given))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {},
            r"the learner \(LogRate.*\) and the dataset \(of mine\) of this run came .*learner=..., dataset=",
        ),
        ({"learner": own_learner()}, r"the dataset \(of mine\) of this run came from Python"),
        (
            {"learner": own_learner(0.3), "dataset": own_dataset()},
            r"model was LogRate.*lr=0\.2.* and is LogRate.*lr=0\.3",
        ),
        (
            {"learner": own_learner(model=own_parts.Wider), "dataset": own_dataset()},
            r"model was LogRate\(RegisteredTwice, .* 11 tensors \w+ and is LogRate\(RegisteredTwice, .* 13 tensors",
        ),
        (
            {"learner": own_parts.first_order(), "dataset": own_dataset()},
            "model was LogRate.*first_order=False.* and is LogRate.*first_order=True",
        ),
        ({"learner": own_parts.learned_rate(), "dataset": own_dataset()}, "model was LogRate.* and is MetaLearner"),
        ({"learner": own_learner(), "dataset": own_dataset("yours")}, "dataset was of mine and is yours"),
        ({"learner": own_learner(), "dataset": own_dataset(seed=1)}, "was made with other images of the same classes"),
        ({"model": Conv4, "dataset": own_dataset()}, r"the learner \(LogRate.*\) of this run came from Python"),
    ],
)
def test_a_run_is_bound_to_what_was_given(given: Path, tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    run = Path(shutil.copytree(given, tmp_path / "run"))
    require_refusal(tmp_path, message, lambda: train(of_own_data(run, run), resume=True, **parts))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a learner and a dataset of one's own."""
    folder = tmp_path_factory.mktemp("given") / "run"
    train(of_own_data(folder, folder), learner=own_learner(), dataset=own_dataset())
    return folder


def test_a_run_by_names_takes_nothing_else(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = settings(images, run, iterations=2, model="own_parts:with_dropout")
    train(config)
    data = replace(own_dataset(), name="folder")
    require_refusal(
        run,
        "the dataset of the run was made by its name, folder, and",
        lambda: train(config, dataset=data, resume=True),
    )
    message = "model was own_parts:with_dropout and is own_parts:RegisteredTwice"
    require_refusal(run, message, lambda: train(config, model=RegisteredTwice, resume=True))
    assert train(config, model=with_dropout, resume=True)["iterations"] == 2
