"""Copies by `scripts/publish_run.py` have nothing of the machine in them, and unfinished runs go on from there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewshot_asam import load_run
from fewshot_asam.training.checkpoint import STATES
from fewshot_asam.training.loop import train
from fewshot_asam.training.run_folder import stored_settings
from short_runs import cache, finished, images, settings  # noqa: F401

ROOT = Path(__file__).parents[1]


def published(run: Path, parent: Path) -> Path:
    script = [sys.executable, str(ROOT / "scripts/publish_run.py"), str(run), "--to", str(parent)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(parent / run.name)]
    return parent / run.name


def weights(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_run(run).weights.items())])


def test_a_finished_run(finished: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    copy = published(finished, tmp_path)
    assert {path.name for path in copy.iterdir()} == {
        "config.yaml", "summary.json", "metrics.jsonl", "curves.png", "best.safetensors", "last.safetensors",
    }  # fmt: skip
    for path in copy.iterdir():
        assert str(images.parent).encode() not in path.read_bytes()
    assert torch.equal(weights(copy), weights(finished))


@pytest.mark.usefixtures("cache")
def test_an_unfinished_run_goes_on_from_the_copy(finished: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    begun = tmp_path / "begun"
    train(settings(images, begun))
    (begun / "summary.json").unlink()
    for state in (begun / STATES).glob("*.ckpt"):
        if int(state.stem) > 2:
            state.unlink()
    copy = published(begun, tmp_path / "copies")
    assert [path.name for path in (copy / STATES).iterdir()] == ["0000000002.ckpt"]
    for path in copy.rglob("*.*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()
    train(replace(stored_settings(copy), data_root=images, output_dir=copy), resume=True)
    assert torch.equal(weights(copy), weights(finished))


PUBLISHED = sorted(path.name for path in (ROOT / "results/weights").iterdir() if path.is_dir())


def test_the_page_lists_what_is_there() -> None:
    page = (ROOT / "results/weights/README.md").read_text("utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_there_loads_and_says_whether_it_is_finished(name: str) -> None:
    folder = ROOT / "results/weights" / name
    config = stored_settings(folder)
    assert len(load_run(folder).weights["model.head.bias"]) == config.ways
    summaries, states = list(folder.glob("summary.json")), list(folder.glob(f"{STATES}/*.ckpt"))
    assert len(summaries) + len(states) == 1
    for summary in summaries:
        assert json.loads(summary.read_text("utf-8"))["iterations"] == config.iterations
