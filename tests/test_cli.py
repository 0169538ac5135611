"""The command line as a person runs it: in processes of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import make_images
from fewshot_asam.cli import train_maml
from fewshot_asam.training.run_folder import read_metrics
from fewshot_asam.training.state import TrainState

QUICK = [
    *("--dataset", "folder", "--image-size", "16", "--ways", "3", "--shots", "1", "--queries", "2", "--hidden", "4"),
    *("--iterations", "12", "--meta-batch-size", "2", "--checkpoint-every", "4", "--validate-every", "4"),
    *("--validate-tasks", "10", "--test-tasks", "30", "--schedule", "constant"),
]
SUMMARY = {
    *("test_accuracy", "test_ci95", "test_tasks", "ways", "shots", "queries", "norm", "inner", "rho", "dataset"),
    *("iterations", "seed", "device", "wall_seconds", "package_version"),
}


def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"fewshot_asam.cli.{command}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 classes of 6 small pictures each."""
    root = tmp_path_factory.mktemp("images")
    drawn = make_images(20, 6, (1, 16, 16), 0)
    for index, image in enumerate(drawn.images):
        folder = root / drawn.names[index // 6]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(image[0])).save(folder / f"{index % 6}.png")
    return root


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each rule."""
    runs = {}
    for rule in ("maml", "sharp_maml_low", "agnostic_sam"):
        runs[rule] = tmp_path_factory.mktemp("runs") / rule
        done = run("train_maml", *QUICK, "--data-root", images, "--inner", rule, "--output-dir", runs[rule])
        assert done.returncode == 0, done.stderr
        assert "test accuracy" in done.stdout.splitlines()[-1]
    return runs


def test_a_run_folder_holds_what_it_should(trained: dict[str, Path]) -> None:
    folder = trained["agnostic_sam"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "curves.png",
        "summary.json",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert 0 <= summary["test_accuracy"] <= 1
    assert (summary["test_tasks"], summary["inner"], summary["iterations"]) == (30, "agnostic_sam", 12)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "train_loss" in row] == list(range(1, 13))
    validations = {row["iteration"]: row["val_accuracy"] for row in rows if "val_accuracy" in row}
    assert list(validations) == [4, 8, 12]
    assert summary["val_accuracy"] == max(validations.values())
    assert validations[summary["best_iteration"]] == summary["val_accuracy"]
    with Image.open(folder / "curves.png") as picture:
        assert min(picture.size) > 500


def test_a_log_file_is_not_filled_with_the_progress_bar(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = TrainState.train_step

    def slow(state: TrainState) -> None:
        time.sleep(0.2)
        train_step(state)

    monkeypatch.setattr(TrainState, "train_step", slow)
    assert train_maml.main([*QUICK, "--data-root", str(images), "--output-dir", str(tmp_path / "run")]) == 0
    log = capsys.readouterr().err
    assert "12/12" in log
    assert log.count("training:") <= 3


def test_evaluation_repeats_the_test_of_the_training_run(trained: dict[str, Path]) -> None:
    done = run("eval_maml", trained["maml"], "--tasks", 30)
    assert done.returncode == 0, done.stderr
    summary = json.loads((trained["maml"] / "summary.json").read_text())
    expected = f"test accuracy {100 * summary['test_accuracy']:.1f} % ± {100 * summary['test_ci95']:.1f} (30 tasks"
    assert expected in done.stdout
    assert "2 queries a class, transductive norm, maml, 1 step of 0.4), as trained" in done.stdout


def test_the_last_weights_are_tested_beside_the_best(images: Path, tmp_path: Path) -> None:
    """With a rate that is too large they are not the same ones."""
    folder, found = tmp_path / "run", {}
    done = run("train_maml", *QUICK, "--data-root", images, "--meta-lr", 0.3, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_iteration"] < summary["iterations"]
    found["best"] = run("eval_maml", folder, "--tasks", 30).stdout
    shutil.copy(folder / "last.safetensors", folder / "best.safetensors")
    found["last"] = run("eval_maml", folder, "--tasks", 30).stdout
    assert found["best"] != found["last"]
    for kind, text in (("", found["best"]), ("last_", found["last"])):
        accuracy = f"{100 * summary[f'{kind}test_accuracy']:.1f} % ± {100 * summary[f'{kind}test_ci95']:.1f}"
        assert f"test accuracy {accuracy} (30 tasks" in text
        assert accuracy in done.stdout


def test_several_runs_are_compared_on_the_same_tasks(trained: dict[str, Path]) -> None:
    done = run("eval_maml", *trained.values(), "--tasks", 40)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert sum("paired, the same 40 tasks" in line for line in lines) == 3


def test_another_way_to_adapt_is_said(trained: dict[str, Path]) -> None:
    done = run("eval_maml", trained["maml"], "--tasks", 20, "--inner", "agnostic_sam", "--inner-steps", 3)
    assert "agnostic_sam of rho 0.0005, 3 steps of 0.4), NOT as trained (inner maml, inner_steps 1)" in done.stdout


def test_a_resumed_run_ends_where_one_that_never_stopped_does(images: Path, trained: dict[str, Path], tmp_path: Path):
    part = tmp_path / "part"
    settings = ["--data-root", images, "--output-dir", part]
    assert run("train_maml", *QUICK, *settings, "--inner", "agnostic_sam", "--iterations", 8).returncode == 0
    done = run("train_maml", "--resume", "--output-dir", part, "--iterations", 12)
    assert done.returncode == 0, done.stderr
    whole = trained["agnostic_sam"]
    for name in ("last.safetensors", "best.safetensors"):
        first, second = load_file(part / name), load_file(whole / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    rows = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (part, whole)]
    for row in rows[0] + rows[1]:
        row.pop("seconds", None)
    assert rows[0] == rows[1]


def test_a_run_that_never_saved_resumes_from_the_start(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    text = (trained["maml"] / "config.yaml").read_text().replace(str(trained["maml"]), str(folder))
    engine = json.loads((trained["maml"] / "summary.json").read_text())["engine"]  # chosen by the clock
    (folder / "config.yaml").write_text(text.replace("engine: auto", f"engine: {engine}"))
    done = run("train_maml", "--resume", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(f / "last.safetensors") for f in (folder, trained["maml"]))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("damage", ["cut", "other run"])
def test_what_cannot_be_resumed_as_it_was_is_said(trained: dict[str, Path], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained["maml"], folder)
    config = folder / "config.yaml"
    if damage == "cut":
        for state in (folder / "checkpoints").iterdir():
            state.write_bytes(state.read_bytes()[:100])
        assert_one_line(run("train_maml", "--resume", "--output-dir", folder), "no checkpoint is left")
    else:
        config.write_text(config.read_text().replace("hidden: 4", "hidden: 8"))
        done = run("train_maml", "--resume", "--output-dir", folder)
        assert_one_line(done, "was made with hidden 4, but the run's setting is 8")


def test_a_course_of_the_learning_rate_that_is_stretched_is_said(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["--data-root", images, "--output-dir", folder, "--schedule", "cosine"]
    assert run("train_maml", *QUICK, *settings).returncode == 0
    done = run("train_maml", "--resume", "--output-dir", folder, "--iterations", 20)
    assert done.returncode == 0, done.stderr
    assert "warning: meta_lr falls to 0 at iteration 20 now, not 12" in done.stderr
    assert read_metrics(folder)[-1]["iteration"] == 20


def test_a_folder_with_other_files_is_left_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("mine")
    done = run("train_maml", *QUICK, "--data-root", images, "--output-dir", tmp_path)
    assert_one_line(done, "is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_run_is_not_overwritten_and_a_changed_setting_is_refused(images: Path, trained: dict[str, Path]) -> None:
    folder = trained["maml"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run("train_maml", *QUICK, "--data-root", images, "--inner", "maml", "--output-dir", folder)
    assert_one_line(done, "holds a run already")
    done = run("train_maml", "--resume", "--output-dir", folder, "--ways", 4)
    assert_one_line(done, "ways was 3 and is 4")
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_loss_that_is_not_finite_stops_the_run(images: Path, tmp_path: Path) -> None:
    settings = ["--data-root", images, "--output-dir", tmp_path / "run", "--meta-lr", "1e18", "--checkpoint-every", 1]
    done = run("train_maml", *QUICK, *settings)
    assert_one_line(done, "iteration")
    assert "the likely cause is" in done.stderr
    assert "last.safetensors" in done.stderr
    weights = load_file(tmp_path / "run" / "last.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit status 2 and one line of error after whatever progress was shown."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert len(error.splitlines()) == 1
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ways 1", "ways is 1"),
        ("--ways 0", "ways is 0"),
        ("--ways 15", "ways is 15, but the split has"),
        ("--shots 1 --validation split", "'split' with 1 shot"),
        ("--queries 9", "need 10"),
        ("--iner maml", "did you mean --inner"),
        ("--inner fomaml", "inner"),
        ("--inner-lr nan", "inner_lr"),
        ("--inner-lr -1", "inner_lr is -1.0"),
        ("--rho -1", "rho is -1.0"),
        ("--iterations few", "iterations"),
        ("--first-order maybe", "first_order"),
        ("--hidden 0", "hidden is 0"),
        ("--image-size 8", "sides of at least 16"),
        ("--config missing.yaml", "missing.yaml"),
        ("--data-root missing", "missing"),
        ("--resume", "pass --output-dir RUN"),
        ("--dataset imagenet", "dataset"),
    ],
)
def test_bad_command_lines(images: Path, tmp_path: Path, arguments: str, message: str) -> None:
    folder = [] if arguments == "--resume" else ["--output-dir", tmp_path / "run"]
    done = run("train_maml", *QUICK, "--data-root", images, *folder, *arguments.split())
    assert_one_line(done, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is not the folder of a run"),
        ([], "runs"),
        (["RUN", "--tasks", "1"], "tasks is 1"),
        (["RUN", "--inner-steps", "0"], "inner_steps is 0"),
    ],
)
def test_bad_evaluations(trained: dict[str, Path], arguments: list[str], message: str) -> None:
    assert_one_line(run("eval_maml", *(str(trained["maml"]) if a == "RUN" else a for a in arguments)), message)


def test_runs_on_other_tasks_are_not_compared(trained: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (trained["maml"] / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("queries: 2", "queries: 3"))
    assert_one_line(run("eval_maml", trained["maml"], other), "must share")


def test_omniglot_from_the_real_archives(real_data: Path, tmp_path: Path) -> None:
    done = run(
        *("train_maml", "--dataset", "omniglot", "--data-root", real_data, "--iterations", 4, "--validate-tasks", 20),
        *("--test-tasks", 20, "--hidden", 8, "--output-dir", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    assert "4112 / 688 / 423 classes" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dataset"] == "omniglot"


@pytest.mark.parametrize(("adapt", "layers"), [("head", "head"), ("no_norm", "blocks.0.conv, blocks.1.conv, ")])
def test_what_is_adapted_is_said(adapt: str, layers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--adapt", adapt, "--iterations", "1", "--validate-tasks", "2", "--test-tasks", "2", "--queries", "1"]
    assert train_maml.main([*arguments, "--hidden", "4", "--output-dir", str(tmp_path / "run")]) == 0
    assert f"adapt {adapt}: the inner loop changes {layers}" in capsys.readouterr().out


def test_what_the_rest_of_a_run_will_take_is_foreseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--iterations", "15", "--validate-tasks", "2", "--test-tasks", "2", "--queries", "1", "--hidden", "4"]
    assert train_maml.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    said = re.search(
        r"(\S+) s an iteration, so about (\S+) of training are to come.*; \d\.\d GB", capsys.readouterr().out
    )
    assert said
    hours, minutes, seconds = map(int, said[2].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(5 * float(said[1]), abs=0.8)
