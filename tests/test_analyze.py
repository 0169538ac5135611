"""`analyze_maml`: from run folders to numbers, pictures and a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewshot_asam.analysis import task_losses, top_eigenvalues
from fewshot_asam.cli import analyze_maml
from fewshot_asam.training.build import load_data
from fewshot_asam.training.evaluation import interval
from fewshot_asam.training.identity import identify
from fewshot_asam.training.loop import train
from fewshot_asam.training.run_folder import stored_settings
from fewshot_asam.training.trained import evaluation_sampler, trained_learner
from short_runs import CPU, cache, everything, finished, images, settings

assert cache
assert finished
assert images
QUICK = ("--tasks", "4", "--meta-tasks", "1", "--grid", "3", "--eigenvalues", "2", "--radii", "[0.01,0.1]")


@pytest.fixture(scope="module")
def sharp(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the same images as the finished one."""
    folder, root = tmp_path_factory.mktemp("sharp") / "run", stored_settings(finished).data_root
    assert root is not None
    train(settings(root, folder, inner="sharp_maml_low", rho=0.05, inner_steps=2))
    return folder


def test_the_file_and_the_table_have_what_the_functions_give(
    finished: Path, sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "plain")
    shutil.copytree(sharp, "sharp")
    runs = everything(Path("plain")) | everything(Path("sharp"))
    assert analyze_maml.main(["plain", "sharp", *QUICK]) == 0, capsys.readouterr().err
    assert everything(Path("plain")) | everything(Path("sharp")) == runs, "runs are only read"
    said = capsys.readouterr().out
    found: Any = json.loads(Path("analysis/analysis.json").read_text("utf-8"))

    config = stored_settings(Path("sharp"))
    dataset = load_data(config, CPU)
    learner = trained_learner(Path("sharp"), config, dataset, identify(config, dataset)).eval()
    episodes = evaluation_sampler(config, dataset.test).sample(4)
    tasks = task_losses(learner, episodes, 2, torch.Generator().manual_seed(0))
    expected = [top_eigenvalues(task.query, task.after, 2).tolist() for task in tasks]
    quantity = found["runs"]["sharp"]["tasks"]["eigenvalues_query_after"]
    assert torch.allclose(torch.tensor(quantity["values"]), torch.tensor(expected))
    mean = interval(torch.tensor([values[0] for values in expected]))
    assert (quantity["mean"][0], quantity["ci95"][0]) == pytest.approx(tuple(mean))
    assert f"{mean.mean:.3g} ± {mean.half_width:.2g}" in said

    losses = [torch.tensor(found["runs"][run]["tasks"]["loss_query_after"]["values"]) for run in ("plain", "sharp")]
    difference = found["paired_differences"]["sharp minus plain"]["loss_query_after"]
    assert (difference["mean"], difference["ci95"]) == pytest.approx(tuple(interval(losses[1] - losses[0])))
    assert found["settings"] == {
        **{"tasks": 4, "seed": 0, "weights": "best", "radii": [0.01, 0.1], "eigenvalues": 2, "meta_tasks": 1, "grid": 3}
    }
    assert len(found["runs"]["plain"]["planes"]["support"]) == 3
    for name in ("surface", "path", "eigenvalues", "sharpness", "validation_decrease"):
        with Image.open(f"analysis/{name}.png") as picture:
            assert min(picture.size) > 300
    lines = [line for line in said.splitlines() if line.startswith("rho / ||theta||")]
    assert [line.split()[3] for line in lines] == ["-"], "plain MAML has no radius"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --tasks 3", "tasks is 3; expected at least 4"),
        ("run --grid 1", "grid is 1; expected at least 2"),
        ("run --eigenvalues 0", "eigenvalues is 0; expected at least 1"),
        ("run --radii [0.1,-1]", "radii are [0.1, -1.0]; expected different numbers above 0"),
        ("run --radii []", "radii are []; expected different numbers above 0"),
        ("run --seed -1", "seed is -1"),
        ("run --wieghts last", "did you mean --weights?"),
        ("run run", "the same run was given twice"),
        ("nowhere", "nowhere"),
        ("run --output-dir full", "full has an analysis.json already; choose another --output-dir, or remove it"),
        ("run --output-dir file", "file cannot be made"),
        ("", "the following arguments are required: runs"),
    ],
)
def test_what_is_refused(
    words: str, said: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(finished)
    Path("full").mkdir()
    Path("full/analysis.json").write_text("mine")
    Path("file").write_text("mine")
    before = everything(tmp_path)
    assert analyze_maml.main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert everything(tmp_path) == before


def test_more_eigenvalues_than_parameters(finished: Path, tmp_path: Path, capsys: Any) -> None:
    words = [str(finished), *QUICK, "--eigenvalues", "100000", "--output-dir", str(tmp_path / "out")]
    assert analyze_maml.main(words) == 2
    assert "100000 eigenvalues of" in capsys.readouterr().err
