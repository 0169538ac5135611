"""Settings: what they refuse, how they are written and read, and the shipped protocol files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
import yaml

from fewshot_asam import FewShotError
from fewshot_asam.cli import train_maml
from fewshot_asam.training.build import build_learner, resolve_device
from fewshot_asam.training.config import TrainConfig, from_yaml, to_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
PROTOCOL = {
    ("omniglot", 5, 1): (32, 1, 0.4),
    ("omniglot", 5, 5): (32, 1, 0.4),
    ("omniglot", 20, 1): (16, 5, 0.1),
    ("omniglot", 20, 5): (16, 5, 0.1),
    ("mini_imagenet", 5, 1): (4, 5, 0.1),
    ("mini_imagenet", 5, 5): (4, 5, 0.1),
}
"""Tasks a meta-batch, inner steps and inner learning rate of each row of the protocol."""


@pytest.mark.parametrize("row", PROTOCOL)
def test_there_is_a_file_for_each_row_of_the_protocol_and_the_rule_is_a_flag(row: tuple[str, int, int]) -> None:
    dataset, ways, shots = row
    file = CONFIGS / f"{dataset}_{ways}w{shots}s.yaml"
    config, resume = train_maml._settings(["--config", str(file), "--inner", "maml"], TrainConfig(inner="agnostic_sam"))
    assert not resume
    assert "inner" not in yaml.safe_load(file.read_text())
    assert (config.dataset, config.ways, config.shots, config.inner) == (*row, "maml")
    assert (config.meta_batch_size, config.inner_steps, config.inner_lr) == PROTOCOL[row]
    assert (config.hidden, config.queries, config.iterations, config.validate_tasks) == (64, 15, 60_000, 600)
    assert (config.meta_lr, config.schedule) == (1e-3, "constant")
    assert (config.rho, config.first_order, config.norm) == (5e-4, False, "transductive")
    assert (config.adapt, config.init, config.head_init) == ("no_norm", "pytorch", "default")


def test_the_files_say_what_the_defaults_could_change() -> None:
    """A protocol does not move with the defaults."""
    for file in CONFIGS.glob("*.yaml"):
        said = yaml.safe_load(file.read_text())
        assert {"init", "head_init", "adapt", "norm", "schedule", "rho", "validate_tasks", "test_tasks"} <= set(said)


def test_there_is_no_other_file() -> None:
    assert len(list(CONFIGS.glob("*.yaml"))) == len(PROTOCOL) + 1


def test_the_file_of_mamlpp() -> None:
    words = ["--config", str(CONFIGS / "mini_imagenet_5w1s_mamlpp.yaml"), "--inner", "maml"]
    config, _ = train_maml._settings(words, TrainConfig())
    assert (config.hidden, config.meta_batch_size, config.inner_lr, config.inner_steps) == (48, 2, 0.01, 5)
    assert (config.learned_rates, config.multi_step_iterations, config.iterations) == (
        "layer_and_step",
        15 * 500,
        50_000,
    )
    assert config.keep_snapshots, "its figure is of an ensemble"


@pytest.mark.parametrize("order", [0, 1])
def test_a_flag_overrides_the_file_wherever_it_stands(order: int) -> None:
    words = [["--config", str(CONFIGS / "omniglot_20w1s.yaml")], ["--ways", "7", "--inner-lr=0.3"]]
    config, _ = train_maml._settings(words[order] + words[1 - order], TrainConfig())
    assert (config.ways, config.inner_lr, config.inner_steps) == (7, 0.3, 5)


def test_settings_come_back_from_yaml(tmp_path: Path) -> None:
    config = TrainConfig(inner="maml", rho1=0.1, data_root=Path("data"), clip_grad=1.0, first_order=True)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


def test_settings_that_are_younger_than_a_whole_file_are_as_by_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    whole = to_yaml(TrainConfig(inner="maml", outer_rho=0.1))
    older = "".join(line for line in whole.splitlines(keepends=True) if not line.startswith("outer_rho"))
    file.write_text(older)
    assert from_yaml(file) == TrainConfig(inner="maml")
    file.write_text(older[: older.index("precision")])
    with pytest.raises(FewShotError, match="lacks outer_rho, precision, output_dir; it was cut short"):
        from_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "does not hold settings"),
        ("", "does not hold settings"),
        ("colour: red", "is of another command or version: there is no setting 'colour'"),
        ("inner_learning_rate: 1", "there is no setting 'inner_learning_rate'; did you mean inner_lr\\?"),
        ("ways: 5", "lacks inner, shots, .*cut short or is of another version"),
        ("ways: 5\nways: 5", "line 2 gives ways again"),
        ("a: [", "is not a YAML file of settings \\(line 1: "),
        ("a: 2020-99-99", "is not a YAML file"),
        ("!!python/object/apply:os.system ['true']", "line 1 is nested or has a YAML alias or tag"),
        ("a: &a [1]\nb: [*a, *a]", "line 2 is nested or has a YAML alias or tag"),
    ],
)
def test_a_broken_settings_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FewShotError, match=message) as raised:
        from_yaml(tmp_path / "config.yaml")
    assert "config.yaml" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ways", "many", "ways is 'many'; expected a whole number"),
        ("ways", "null", "ways is null"),
        ("ways", "0", "ways is 0"),
        ("data_root", "3", "data_root is '3'; expected a path"),
        ("inner", "mamml", "or package.module:Rule; did you mean maml"),
        ("rho1", "[]", "rho1 is '\\[\\]'; expected a number"),
        ("split_fractions", "[0.5, 0.5]", "split_fractions is .* expected a list of 3, each a number"),
        ("first_order", "3", "first_order is '3'; expected true or false"),
    ],
)
def test_a_stored_value_that_is_wrong_is_named(tmp_path: Path, name: str, value: str, message: str) -> None:
    whole = yaml.safe_load(to_yaml(TrainConfig())) | {name: yaml.safe_load(value)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(FewShotError, match=rf"config\.yaml does not hold the settings of a run \(.*{message}"):
        from_yaml(tmp_path / "config.yaml")


def laughs(levels: int) -> str:
    """A few hundred characters of YAML that stand for `3 ** levels` words."""
    return "[" + ", ".join(["&a0 a", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 3)}]" for i in range(1, levels))]) + "]"


@pytest.mark.parametrize(
    "value",
    [laughs(9), "&a [*a, 1, 2]", "[" * 40 + "]" * 40, "!!set {a, b, c}", "[1, [2], 3]", ["&a [*a]"], "['[[a]]']"],
)
@pytest.mark.parametrize("name", ["split_fractions", "ways", "inner", "rho1", "max_minutes", "data_root"])
def test_a_string_that_is_yaml_itself_is_refused(tmp_path: Path, name: str, value: str | list[str]) -> None:
    """In a stored file, in a file of settings and on the command line; read, it could grow without end."""
    whole = yaml.safe_load(to_yaml(TrainConfig())) | {name: value}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump({name: value}))
    option, text = f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)
    for read in (
        lambda: from_yaml(tmp_path / "config.yaml"),
        lambda: train_maml._settings(["--config", str(tmp_path / "flags.yaml")], TrainConfig()),
        lambda: train_maml._settings([f"{option}={text}"], TrainConfig()),
        lambda: train_maml._settings([option, text], TrainConfig()),
    ):
        with pytest.raises(FewShotError, match=r"\A.* is nested or has a YAML alias or tag; expected a plain value"):
            read()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    for read in (
        lambda: from_yaml(tmp_path / "config.yaml"),
        lambda: train_maml._settings(["--config", str(tmp_path / "config.yaml")], TrainConfig()),
    ):
        with pytest.raises(FewShotError, match=r"config\.yaml is not a YAML file of settings \(it is a named pipe"):
            read()


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("--dataset folder --split-fractions [0.5,.25,25e-2]", ("split_fractions", (0.5, 0.25, 0.25))),
        ("--rho1 1e-3", ("rho1", 1e-3)),
        ("--rho1 null", ("rho1", None)),
        ("--first-order yes", ("first_order", True)),
        ("--torch-compile=true", ("torch_compile", True)),
        ("--iterations 1_000", ("iterations", 1000)),
        ("--output-dir [a]", ("output_dir", Path("[a]"))),
        ("--output-dir a&b*c:d", ("output_dir", Path("a&b*c:d"))),
    ],
)
def test_plain_values_are_read_as_ever(words: str, setting: tuple[str, object]) -> None:
    name, value = setting
    config, _ = train_maml._settings(words.split(), TrainConfig())
    assert getattr(config, name) == value


@pytest.mark.parametrize("name", ["ways", "shots", "queries", "iterations", "meta_batch_size", "inner_steps", "hidden"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(FewShotError, match=f"{name} is 0; expected at least 1"):
        replace(TrainConfig(), **{name: 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"meta_lr": 0.0}, "meta_lr is 0.0"),
        ({"clip_grad": float("nan")}, "clip_grad is nan"),
        ({"max_minutes": -1.0}, "max_minutes is -1.0"),
        ({"test_tasks": 1}, "test_tasks is 1; expected at least 2"),
        ({"validation": "split"}, "'split' with 1 shot"),
        ({"seed": -1}, "seed is -1"),
        ({"ways": None}, "ways is null"),
        ({"schedule": "linear"}, "schedule is 'linear'; expected one of constant, cosine"),
        ({"hidden": 10**30}, "at most 1,000,000,000"),
        ({"meta_lr": 1e39}, "meta_lr is 1e"),
        ({"rho": -0.1}, "rho is -0.1"),
        ({"rho1": 1e39}, "rho1 is 1e"),
        ({"inner_lr": float("inf")}, "inner_lr is inf"),
        ({"ways": 1}, "ways is 1; expected at least 2"),
        ({"meta_batch_size": 10**6}, "meta_batch_size is 1000000; expected at most 10,000"),
        ({"test_tasks": 10**30}, "at most 1,000,000,000"),
        ({"output_dir": Path("a\nb")}, "output_dir is 'a"),
        ({"data_root": Path("a\udcff")}, "data_root is 'a"),
        ({"iterations": 10.5}, "iterations is 10.5; expected a whole number"),
        ({"iterations": "10"}, "iterations is '10'; expected a whole number"),
        ({"iterations": True}, "iterations is True; expected a whole number"),
        ({"iterations": np.float64(10)}, "iterations is np.float64\\(10.0\\); expected a whole number"),
        ({"hidden": 10**5000}, "hidden is a number of very many digits; expected a whole number"),
        ({"inner_lr": "0.1"}, "inner_lr is '0.1'; expected a number"),
        ({"inner_lr": 10**400}, "inner_lr is 1000.*; expected a number"),
        ({"clip_grad": True}, "clip_grad is True; expected a number"),
        ({"first_order": 1}, "first_order is 1; expected true or false"),
        ({"inner": "mamml"}, "inner is 'mamml'; expected one of .*maml, .*; did you mean maml\\?"),
        ({"inner": ["maml"]}, "inner is \\['maml'\\]; expected text"),
        ({"channels": True}, "channels is True; expected one of 1, 3"),
        ({"split_fractions": (0.5, 0.5)}, "split_fractions is .*; expected a list of 3, each a number"),
        ({"split_fractions": "abc"}, "split_fractions is 'abc'; expected a list of 3"),
        ({"output_dir": 3}, "output_dir is 3; expected a path"),
        ({"output_dir": ""}, "output_dir is ''; expected a path"),
        ({"output_dir": b"runs"}, "output_dir is b'runs'; expected a path"),
        ({"output_dir": "~nobody-of-this-name/x"}, "home folder"),
        ({"dataset": "glyphs", "image_size": 28}, "image_size is given, but dataset is 'glyphs'"),
        ({"dataset": "omniglot", "split_csv": Path("a.csv")}, "split_csv is given, but dataset is 'omniglot'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("output_dir", "runs/x", Path("runs/x")),
        ("data_root", "~/data", Path.home() / "data"),
        ("output_dir", PurePosixPath("runs/x"), Path("runs/x")),
        ("iterations", np.int64(10), 10),
        ("inner_lr", 1, 1.0),
        ("inner_lr", np.float32(0.5), 0.5),
        ("inner", np.str_("maml"), "maml"),
    ],
)
def test_what_stands_for_a_setting_is_taken_as_one(tmp_path: Path, name: str, given: object, expected: object) -> None:
    """By `replace` too; what is stored is plain, so that it comes back from YAML."""
    config = replace(TrainConfig(), **{name: given})
    assert getattr(config, name) == expected
    assert isinstance(getattr(config, name), type(expected))
    assert getattr(TrainConfig(**{name: given}), name) == expected
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


def test_every_switch_reaches_the_learner() -> None:
    config = TrainConfig(
        inner="agnostic_sam", rho=0.1, rho1=0.2, rho2=0.3, val_grad_point="current", val_norm="current", beta=0.5,
        through_perturbation=False, adaptive=True, first_order=True, adapt="head", validation="augment",
        norm="inductive", engine="loop", inner_lr=0.7,
    )  # fmt: skip
    learner = build_learner(config, (1, 28, 28))
    rule = learner.rule
    assert (rule.rho, rule.radii, rule.beta, rule.adaptive, learner.first_order) == (0.1, (0.2, 0.3), 0.5, True, True)
    assert (rule.val_grad_point, rule.val_norm, rule.through_perturbation) == ("current", "current", False)
    assert learner.inner_loop.adapted == ("head.weight", "head.bias")
    assert (learner.inner_loop.validation, learner.inner_loop.inductive, learner.inner_loop.lr) == (
        "augment",
        True,
        0.7,
    )
    assert learner.engine == "loop"


def test_a_missing_gpu_is_said() -> None:
    if torch.cuda.is_available():
        assert resolve_device("auto").type == "cuda"
        return
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(FewShotError, match="no usable CUDA device"):
        resolve_device("cuda")
