"""Forks: a run that begins from the weights of another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewshot_asam import FewShotError, train
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.training.initial_weights import digest
from fewshot_asam.training.run_folder import stored_settings
from fewshot_asam.training.state import build
from short_runs import CPU, cache, dataset, finished, images, require_refusal, settings

__all__ = ["cache", "dataset", "finished", "images"]


def test_a_fork_begins_with_the_weights(finished: Path, images: Path, dataset: object, tmp_path: Path) -> None:
    """With those of the folder's best file or of the file that is named, whatever its own seed."""
    for source, file in ((finished, "best"), (finished / "last.safetensors", "last")):
        state = build(settings(images, tmp_path, init_from=source, seed=5), dataset, CPU)  # type: ignore[arg-type]
        for name, value in load_file(finished / f"{file}.safetensors").items():
            assert torch.equal(state.learner.state_dict()[name], value)


def test_a_fork_is_bound_to_the_weights(finished: Path, images: Path, tmp_path: Path) -> None:
    """By their digest: the path may change, the weights may not, and a run that has begun needs them no more."""
    parent = Path(shutil.copytree(finished, tmp_path / "parent"))
    config = settings(images, tmp_path / "fork", init_from=parent, iterations=6, schedule="constant", seed=3)
    summary = train(config)
    expected = digest(load_file(parent / "best.safetensors"))
    assert summary["init_digest"] == expected == stored_settings(tmp_path / "fork").init_digest
    assert eval_maml.main([str(tmp_path / "fork"), "--tasks", "4"]) == 0
    moved = tmp_path / "moved"
    parent.rename(moved)
    words = ["--resume", "--output-dir", str(tmp_path / "fork"), "--iterations", "8"]
    assert train_maml.main(words) == 0
    assert train_maml.main([*words, "--iterations", "9", "--init-from", str(moved)]) == 0
    other = tmp_path / "other"
    train(settings(images, other, seed=9))
    changed = settings(images, tmp_path / "fork", init_from=other, iterations=10, schedule="constant", seed=3)
    require_refusal(tmp_path / "fork", f"init_digest was {expected} and is", lambda: train(changed, resume=True))


def test_the_digest_is_of_the_numbers() -> None:
    first = {"a": torch.zeros(2), "b": torch.ones(1, dtype=torch.bfloat16)}
    assert digest(first) == digest(dict(reversed(first.items())))
    for other in ({"a": torch.zeros(2, 1), "b": first["b"]}, {"a": torch.tensor([0.0, 1e-9]), "b": first["b"]}):
        assert digest(first) != digest(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_digest": "0123456789abcdef"}, "but init_digest is '0123456789abcdef'; name the weights that are meant"),
        ({"hidden": 8}, "holds the weights of another model"),
        ({"init_from": Path("nowhere")}, "nowhere"),
        ({"init_from": None, "init_digest": "0123456789abcdef"}, "give the run or the file that has them as init_from"),
    ],
)
def test_wrong_weights_are_refused(
    changes: dict[str, object], message: str, finished: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(FewShotError, match=message):
        train(settings(images, tmp_path / "fork", **({"init_from": finished} | changes)))
    assert not (tmp_path / "fork").exists()
