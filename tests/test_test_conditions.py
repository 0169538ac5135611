"""Harder conditions: noise on the support labels, few training classes, and another dataset to be tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import faults
from conftest import make_images
from fewshot_asam import Dataset, EpisodeSampler, FewShotError, TrainConfig, train
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.episodes import with_label_noise
from fewshot_asam.training.build import test_images as images_to_test_on
from fewshot_asam.training.build import training_images
from fewshot_asam.training.trained import evaluation_sampler
from short_runs import cache, dataset, finished, images, require_refusal, run, settings

__all__ = ["cache", "dataset", "finished", "images", "run"]


@pytest.mark.parametrize(
    ("part", "labels", "wrong"), [(0.2, 25, 5), (0.5, 5, 3), (0.1, 5, 1), (0.09, 5, 0), (0.6, 25, 15), (1.0, 5, 5)]
)
def test_as_many_labels_are_wrong_as_is_said(part: float, labels: int, wrong: int) -> None:
    """In every task, to the nearest whole number, halves up; a wrong label is another class of the task."""
    right = torch.arange(5).repeat_interleave(labels // 5).expand(400, -1)
    found = with_label_noise(right, 5, part, torch.Generator().manual_seed(0))
    assert ((found != right).sum(1) == wrong).all()
    assert found.min() >= 0
    assert found.max() <= 4


def test_noise_is_symmetric() -> None:
    """Each image, and each of the other classes, is equally likely: chi-squared tests on 20,000 tasks."""
    right = torch.arange(5).expand(20_000, -1)
    found = with_label_noise(right, 5, 0.2, torch.Generator().manual_seed(1))
    tasks, images = (found != right).nonzero(as_tuple=True)
    assert len(tasks) == 20_000
    assert stats.chisquare(images.bincount(minlength=5).numpy()).pvalue > 0.01
    for image in range(5):
        drawn = found[tasks[images == image], image].bincount(minlength=5)
        assert drawn[image] == 0
        assert stats.chisquare(drawn[drawn > 0].numpy()).pvalue > 0.01


def test_noise_changes_support_labels_alone(tiny: Dataset) -> None:
    """The same seed gives the same images, query labels and augmentation; it can be gone on with from its state."""
    clean, noisy = (EpisodeSampler(tiny.test, 3, 2, 2, seed=4, label_noise=noise) for noise in (0.0, 0.5))
    for _ in range(2):
        one, other = clean.sample(6), noisy.sample(6)
        assert torch.equal(one.support_x, other.support_x)
        assert torch.equal(one.query_x, other.query_x)
        assert torch.equal(one.query_y, other.query_y)
        assert ((one.support_y != other.support_y).sum(1) == 3).all()
    assert torch.equal(clean.augmentation.get_state(), noisy.augmentation.get_state())
    assert clean.state_dict().keys() == {"generator", "augmentation"}
    state, expected = noisy.state_dict(), noisy.sample(6)
    again = EpisodeSampler(tiny.test, 3, 2, 2, seed=9, label_noise=0.5)
    again.load_state_dict(state)
    assert torch.equal(again.sample(6).support_y, expected.support_y)


def test_training_with_noise_is_resumed_exactly(tmp_path: Path, images: Path) -> None:
    noisy = {"shots": 2, "label_noise": 0.5, "schedule": "constant"}
    train(settings(images, tmp_path / "whole", iterations=6, **noisy))
    train(settings(images, tmp_path / "cut", iterations=3, **noisy))
    train(settings(images, tmp_path / "cut", iterations=6, **noisy), resume=True)
    whole, cut = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    config = settings(images, tmp_path / "cut", shots=2, label_noise=0.0, iterations=6)
    require_refusal(tmp_path / "cut", "label_noise was 0.5 and is 0.0", lambda: train(config, resume=True))


def test_validation_and_test_tasks_are_noisy_too(dataset: Dataset, images: Path) -> None:
    config = settings(images, Path("unused"), shots=2, label_noise=0.5)
    found = evaluation_sampler(config, dataset.test).sample(5)
    clean = evaluation_sampler(settings(images, Path("unused"), shots=2), dataset.test).sample(5)
    assert ((found.support_y != clean.support_y).sum(1) == 3).all()


def test_noise_in_testing_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """eval_maml's own option, said in its line; without it the test is the run's."""
    assert eval_maml.main([str(run), "--tasks", "40", "--label-noise", "1"]) == 0
    line = capsys.readouterr().out
    assert "label_noise 1.0" in line
    assert "NOT as trained (label_noise 0.0)" in line
    assert eval_maml.main([str(run), "--tasks", "40"]) == 0
    as_trained = capsys.readouterr().out
    assert "as trained" in as_trained
    assert "NOT" not in as_trained
    accuracies = [float(text.split("accuracy ")[1].split(" %")[0]) for text in (line, as_trained)]
    assert accuracies[0] < accuracies[1], "every support label is wrong"


def test_few_training_classes(tiny: Dataset) -> None:
    """The run's seed chooses them, the fewer among the more; validation and test have all of theirs."""

    def chosen(number: int | None, seed: int) -> set[str]:
        config = TrainConfig(train_classes=number, seed=seed, queries=5)
        return set(training_images(config, tiny).names)

    assert chosen(None, 0) == set(tiny.train.names)
    assert len(chosen(6, 0)) == 6
    assert chosen(5, 0) < chosen(7, 0)
    assert len({frozenset(chosen(6, seed)) for seed in range(5)}) > 1
    images = training_images(TrainConfig(train_classes=6, queries=5), tiny)
    for name, start in zip(images.names, images.starts, strict=True):
        index = tiny.train.starts[tiny.train.names.index(name)]
        assert torch.equal(images.images[start : start + 8], tiny.train.images[index : index + 8])
    with pytest.raises(FewShotError, match="train_classes is 13, but glyphs has 12 training classes"):
        chosen(13, 0)
    with pytest.raises(FewShotError, match="train_classes is 4; expected at least 5"):
        TrainConfig(train_classes=4)


def test_training_sees_no_other_classes(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And runs of different seeds, so different classes, are tested together."""
    drawn: set[int] = set()
    draw = EpisodeSampler.draw

    def spied(sampler: EpisodeSampler, num_tasks: int) -> Any:
        classes, index = draw(sampler, num_tasks)
        if len(sampler.images.names) == 4:
            drawn.update(classes.flatten().tolist())
        return classes, index

    monkeypatch.setattr(EpisodeSampler, "draw", spied)
    for seed in (0, 1):
        train(settings(images, tmp_path / str(seed), train_classes=4, seed=seed, iterations=8))
    assert drawn == {0, 1, 2, 3}
    assert eval_maml.main([str(tmp_path / "0"), str(tmp_path / "1"), "--tasks", "4"]) == 0


@pytest.fixture(scope="module")
def photos(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of another size and three channels."""
    root = tmp_path_factory.mktemp("photos")
    return faults.write_images(root)


def test_another_dataset_is_squashed_to_the_run_s_images(
    tiny: Dataset, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All classes of a folder, in the size and channels of the run; the test classes of a known dataset as they are."""
    monkeypatch.delenv("FEWSHOT_ASAM_CACHE")  # where glyphs are drawn already
    config = TrainConfig(ways=3, queries=2, test_dataset="folder", test_data_root=photos)
    found = images_to_test_on(config, tiny)
    assert found.shape == (1, 28, 28)
    assert set(found.names) == {path.name for path in photos.iterdir() if path.is_dir()}
    grey = Dataset("arrays", *(make_images(5, 8, (3, 20, 20), seed) for seed in range(3)))
    glyphs = images_to_test_on(TrainConfig(test_dataset="glyphs"), tiny)
    assert len(glyphs.names) == 235
    fitted = images_to_test_on(TrainConfig(test_dataset="glyphs"), grey)
    assert fitted.shape == (3, 20, 20)
    assert torch.equal(fitted.images[:, 0], fitted.images[:, 2])
    whole, small = (images.images.double().mean((1, 2, 3)) for images in (glyphs, fitted))
    assert (whole - small).abs().max() < 3, "as much ink as before"
    assert images_to_test_on(TrainConfig(), tiny) is tiny.test


def test_a_run_is_tested_on_another_dataset(
    run: Path, photos: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By train_maml's final test and by eval_maml alike, which says so."""
    words = ["--test-dataset", "folder", "--test-data-root", str(photos)]
    assert eval_maml.main([str(run), "--tasks", "4", *words]) == 0
    line = capsys.readouterr().out
    assert "test_dataset folder" in line
    assert "NOT as trained (test_dataset none)" in line
    own = tmp_path / "own"
    summary = train(settings(images, own, test_dataset="folder", test_data_root=photos))
    assert eval_maml.main([str(own), "--tasks", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"accuracy {100 * summary['test_accuracy']:.1f} %" in shown.splitlines()[-1]
    assert "NOT" not in shown
    assert "classes for training / validation / test, the last of folder" in shown
    assert json.loads((own / "summary.json").read_text())["test_dataset"] == "folder"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label-noise", "1.2"], "label_noise is 1.2; expected a part of the support labels from 0 to 1"),
        (["--label-noise", "nan"], "label_noise"),
        (["--label-noise", "0.2", "--validation", "split", "--shots", "5"], "which label_noise makes wrong"),
        (["--train-classes", "3"], "train_classes is 3; expected at least 5"),
        (["--train-classes", "100000"], "but glyphs has 805 training classes"),
        (["--test-dataset", "glyph"], "test_dataset is 'glyph'; expected one of"),
        (["--test-dataset", "folder"], "was given no root"),
        (["--validation", "other_task", "--meta-batch-size", "1"], "with validation 'other_task', is 1; expected at"),
        (["--validation", "other_task", "--test-tasks", "41"], "test_tasks is 41, of which the last is drawn alone"),
    ],
)
def test_bad_conditions_cost_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_maml.main([*words, "--output-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_bad_tests_cost_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_maml.main([str(run), "--label-noise", "-1"]) == 2
    assert "label_noise is -1.0; expected a part" in capsys.readouterr().err
    assert eval_maml.main([str(run), "--test-dataset", "omniglott"]) == 2
    assert "test_dataset is 'omniglott'; expected one of" in capsys.readouterr().err
