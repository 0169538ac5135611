"""Copies by `scripts/publish_run.py` have nothing of the machine in them, and unfinished runs go on from there."""

from __future__ import annotations

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
