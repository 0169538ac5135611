"""Models of one's own by their names: where they come from, what is wrong with them, where they begin."""

# ruff: noqa: F811  fixtures are taken by their names
from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import faults
from fewshot_asam import FewShotError, engine
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.loop import train
from own_parts import SHAPE, with_batch_norm, with_dropout
from short_runs import cache, images, settings  # noqa: F401

NETS = """
import torch
from torch import nn

number = 3
instance = nn.Linear(2, 2)


class Net(nn.Module):
    def __init__(self, ways, shape, logits=None):
        super().__init__()
        self.head = nn.Linear(shape[0] * shape[1] * shape[2], logits or ways)

    def forward(self, x):
        return self.head(x.flatten(1))


class Breaks(Net):
    def forward(self, x):
        return x.upper()


class Masked(Net):
    def __init__(self, ways, shape):
        super().__init__(ways, shape)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))


def nothing():
    return None


def text(ways, shape):
    return "net"


def too_many(ways, shape):
    return Net(ways, shape, 7)


def tuples(ways, shape):
    net = Net(ways, shape)
    net.forward = lambda x: (x, x)
    return net


def fails(ways, shape):
    return [][ways]
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules in which one stands."""
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    (tmp_path / "divides_nets.py").write_text("\nnet = 1 / 0\n")
    (tmp_path / "odd_nets.py").write_text("def net(:\n")
    (tmp_path / "poor_nets.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "leaving_nets.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith(("nets_of_mine", "_nets"))]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere_nets:net", "there is no module 'nowhere_nets', neither in the current folder .* nor installed"),
        ("torch.nowhere:net", "there is no module 'torch.nowhere'"),
        ("nets_of_mine:Nett", "nets_of_mine has no 'Nett'; did you mean Net"),
        ("nets_of_mine:Net.absent", "nets_of_mine has no 'Net.absent'"),
        ("nets_of_mine:", "expected package.module:name"),
        ("nets of mine:net", "expected package.module:name"),
        ("divides_nets:net", r"cannot be imported \(ZeroDivisionError: division by zero, divides_nets.py line 2\)"),
        ("odd_nets:net", r"cannot be imported \(SyntaxError: .*odd_nets.py, line 1"),
        ("poor_nets:net", r"cannot be imported \(ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("leaving_nets:net", r"cannot be imported \(SystemExit: 3"),
        ("nets_of_mine:number", "is a int; expected a function of ways and image shape"),
        ("nets_of_mine:instance", "is a Linear that is made already; expected a function"),
        ("nets_of_mine:nothing", r"called with \(3, \(3, 16, 16\)\) failed \(TypeError: nothing\(\) takes 0"),
        ("nets_of_mine:fails", r"failed \(IndexError: list index out of range, nets_of_mine.py line \d+\)"),
        ("nets_of_mine:text", "returned a str; expected an nn.Module"),
        ("nets_of_mine:too_many", r"returned \[6, 7\] for 6 images; expected logits \[6, 3\], one a class"),
        ("nets_of_mine:tuples", r"returned a tuple for 6 images; expected logits \[6, 3\]"),
        ("nets_of_mine:Breaks", r"failed on images \[6, 3, 16, 16\] \(AttributeError: .*nets_of_mine.py line \d+\)"),
        ("nets_of_mine:Masked", "model.mask begins with numbers that are not finite.*persistent=False"),
    ],
)
def test_a_model_that_cannot_be_had_by_its_name(images: Path, nets: Path, model: str, message: str) -> None:
    config = settings(images, nets / "run", model=model)
    before = set(nets.iterdir())
    with pytest.raises(FewShotError, match=message) as raised:
        train(config)
    assert len(str(raised.value).splitlines()) == 1
    assert {path for path in nets.iterdir() if path.name != "__pycache__"} == before


def test_a_model_of_the_current_folder_on_the_command_line(
    images: Path, nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*faults.RUN, "--data-root", str(images), "--output-dir", "run", "--schedule", "constant"]
    assert train_maml.main([*words, "--model", "nets_of_mine:Net", "--iterations", "2"]) == 0
    said = capsys.readouterr().out
    assert "nets_of_mine:Net of 2,307 parameters" in said
    assert "every task starts with zeros in head" in said
    assert train_maml.main(["--resume", "--output-dir", "run", "--iterations", "4"]) == 0
    assert eval_maml.main(["run", "--tasks", "4"]) == 0
    assert "(4 tasks, 3-way 1-shot" in capsys.readouterr().out
    (nets / "nets_of_mine.py").unlink()
    sys.modules.pop("nets_of_mine")
    assert eval_maml.main(["run", "--tasks", "4"]) == 2
    assert "there is no module 'nets_of_mine'" in capsys.readouterr().err


def weights_of(config: TrainConfig) -> dict[str, Tensor]:
    return build_learner(config, SHAPE).model.state_dict()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = TrainConfig(model="own_parts:with_dropout", ways=3)
    first = weights_of(config)
    torch.rand(7)
    before = torch.get_rng_state()
    second = weights_of(replace(config, shots=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert faults.differences(first, second) == []
    assert faults.differences(first, weights_of(replace(config, seed=1)))


@pytest.mark.parametrize("start", ["default", "zeros", "zeros_every_task"])
def test_the_head_is_the_layer_that_the_logits_come_from(start: Any) -> None:
    """Wherever it is registered."""
    learner = build_learner(TrainConfig(model="own_parts:RegisteredTwice", ways=3, head_init=start), SHAPE)
    zeros = {name for name, value in learner.model.named_parameters() if not value.any()}
    head = {"head.weight", "head.bias"}
    assert zeros == (head if start == "zeros" else set())
    assert set(learner.inner_loop.zeroed) == (head if start == "zeros_every_task" else set())


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        ("head.*", {"head.weight", "head.bias"}),
        (["*.bias", "head.*"], {"embed.bias", "hidden.bias", "head.weight", "head.bias"}),
        ("all", {f"{layer}.{kind}" for layer in ("head", "embed", "hidden") for kind in ("weight", "bias")}),
    ],
)
def test_what_is_adapted_may_be_a_pattern(adapt: Any, expected: set[str], tmp_path: Path) -> None:
    config = TrainConfig(model="own_parts:RegisteredTwice", ways=3, adapt=adapt)
    assert set(build_learner(config, SHAPE).adapted) == expected
    (tmp_path / "adapt.yaml").write_text(yaml.safe_dump({"adapt": adapt}))
    by_file, _ = train_maml._settings(["--config", str(tmp_path / "adapt.yaml")], TrainConfig())
    assert by_file.adapt == config.adapt
    if isinstance(adapt, str):
        assert train_maml._settings(["--adapt", adapt], TrainConfig())[0].adapt == config.adapt


def test_dropout_draws_other_numbers_in_each_iteration(images: Path, tmp_path: Path) -> None:
    """And the same in each run of a seed, whatever is drawn around it."""
    losses = []
    for name in ("first", "second"):
        torch.rand(3)
        before = torch.get_rng_state()
        train(settings(images, tmp_path / name, meta_lr=1e-12), model=with_dropout)
        assert torch.equal(torch.get_rng_state(), before)
        losses.append([row["train_loss"] for row in faults.outcome(tmp_path / name)["rows"] if "train_loss" in row])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == len(losses[0])


@pytest.mark.filterwarnings("ignore:tasks run one by one")
@pytest.mark.parametrize(("size", "by_rule"), [(16, "vmap"), (40, "loop")])
def test_what_cannot_be_vectorised_is_trained_task_by_task(
    size: int, by_rule: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever engine is the usual one for images of that size, and again when the run goes on."""
    assert engine.choose("auto", with_batch_norm(3, (3, size, size)), torch.device("cpu"), size).name == by_rule
    config = settings(images, tmp_path / "run", engine="auto", image_size=size, schedule="constant")
    train(config, model=with_batch_norm)
    assert "engine loop" in capsys.readouterr().out
    train(replace(config, iterations=6), model=with_batch_norm, resume=True)
    assert "engine loop" in capsys.readouterr().out
