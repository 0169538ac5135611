"""A run is bound to what made it: nothing goes on, or is tested, as what it is not, and a refusal changes nothing."""

# ruff: noqa: F401, F811  fixtures are taken by their names
from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
from fewshot_asam import FewShotError
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.runtime import locks
from fewshot_asam.runtime.locks import LOCK, locked
from fewshot_asam.training.checkpoint import STATES, decode, read_state
from fewshot_asam.training.loop import train
from fewshot_asam.training.metrics import read_metrics
from fewshot_asam.training.run_folder import read_summary, stored_settings
from short_runs import cache, everything, finished, images, require_refusal, run, settings


def refused_command(main: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that must end in one line of error."""
    capsys.readouterr()
    assert main(words) == 2
    printed, said = capsys.readouterr()
    assert "test accuracy" not in printed
    assert len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_lr": 0.3}, r"inner_lr was 0\.4 and is 0\.3, which would alter the resumed run"),
        ({"inner": "agnostic_sam"}, "inner was maml and is agnostic_sam"),
        ({"shots": 2}, "shots was 1 and is 2"),
        ({"hidden": 8}, "hidden was 4 and is 8"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"test_tasks": 6}, "test_tasks was 4 and is 6"),
        ({"device": "auto"}, "device was cpu and is auto"),
        ({"split_seed": 1}, "split_seed was 0 and is 1"),
        ({"output_dir": "mistyped"}, "mistyped is not the folder of a run"),
        ({"output_dir": None}, "needs the run to go on with"),
        ({"data_root": "missing"}, "missing is not a folder"),
        ({"iterations": 8, "meta_lr": 0.1}, "meta_lr was 0.002 and is 0.1"),
    ],
)
def test_a_resume_as_another_run_is_refused(
    images: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(settings(images, run), **changes)
    require_refusal(tmp_path, message, lambda: train(config, resume=True))


@pytest.mark.parametrize("folder", [None, "relative"])
def test_what_is_free_to_change_is_changed(
    images: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    """The data's folder may be written in another way too."""
    monkeypatch.chdir(images.parent)
    config = settings(images, run, data_root=images.name if folder else images, iterations=6, checkpoint_every=5)
    with pytest.warns(UserWarning, match="meta_lr falls to 0 at iteration 6 now, not 4"):
        summary = train(config, resume=True)
    assert summary["iterations"] == 6
    assert (stored_settings(run).iterations, stored_settings(run).data_root) == (6, images)
    assert [row["iteration"] for row in read_metrics(run) if "train_loss" in row] == list(range(1, 7))


EDITS = [
    *[("meta_lr: 0.002", "meta_lr: 0.2"), ("inner_lr: 0.4", "inner_lr: 0.1"), ("inner_steps: 1", "inner_steps: 2")],
    *[("seed: 0", "seed: 3"), ("schedule: cosine", "schedule: constant"), ("clip_grad: null", "clip_grad: 1.0")],
    *[("rho: 0.0005", "rho: 0.05"), ("norm: transductive", "norm: inductive"), ("hidden: 4", "hidden: 8")],
    *[("first_order: false", "first_order: true"), ("adapt: all", "adapt: head"), ("queries: 2", "queries: 1")],
    *[("inner: maml", "inner: sharp_maml_low"), ("validate_tasks: 4", "validate_tasks: 5"), ("ways: 3", "ways: 2")],
]


@pytest.mark.parametrize(("before", "after"), EDITS)
def test_an_edited_config_is_noticed(run: Path, capsys: pytest.CaptureFixture[str], before: str, after: str) -> None:
    """When the run is resumed and when it is tested; the tensors would fit in most cases."""
    text = (run / "config.yaml").read_text()
    assert f"\n{before}\n" in f"\n{text}"
    (run / "config.yaml").write_text(f"\n{text}".replace(f"\n{before}\n", f"\n{after}\n"))
    content = everything(run)
    name, old = before.split(": ")
    expected = f"was made with {name} {'None' if old == 'null' else old.replace('false', 'False')}, but the run's"
    assert expected in refused_command(train_maml.main, ["--resume", "--output-dir", str(run)], capsys)
    assert expected in refused_command(eval_maml.main, [str(run), "--tasks", "4"], capsys)
    assert everything(run) == content


def test_another_run_s_checkpoints_are_refused(images: Path, run: Path, tmp_path: Path) -> None:
    train(settings(images, tmp_path / "other", seed=1))
    shutil.rmtree(run / STATES)
    shutil.copytree(tmp_path / "other" / STATES, run / STATES)
    message = "0004.ckpt was made with seed 1, but the run's setting is 0"
    require_refusal(run, message, lambda: train(settings(images, run), resume=True))


def test_checkpoints_that_are_gone_do_not_start_a_run_afresh(images: Path, run: Path) -> None:
    shutil.rmtree(run / STATES)
    message = "last.safetensors is of a run whose checkpoints are gone"
    require_refusal(run, message, lambda: train(settings(images, run), resume=True))


def fewer(root: Path) -> None:
    shutil.rmtree(root / "class007")


def renamed(root: Path) -> None:
    (root / "class007").rename(root / "class999")


def repainted(root: Path) -> None:
    shutil.copy(root / "class000" / "0.png", root / "class001" / "0.png")


def swapped(root: Path) -> None:
    for old, new in (("class000", "x"), ("class001", "class000"), ("x", "class001")):
        (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer, "was made with other classes"),
        (renamed, "was made with other classes"),
        (repainted, "was made with other images of the same classes"),
        (swapped, "was made with other images of the same classes"),
    ],
)
def test_other_data_are_noticed(
    images: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
) -> None:
    """A resumed run refuses them; a test on other images of the same classes says so."""
    other = Path(shutil.copytree(images, tmp_path / "other"))
    change(other)
    require_refusal(run, message, lambda: train(settings(other, run), resume=True))
    words = [str(run), "--tasks", "4", "--data-root", str(other)]
    if "images" in message:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert eval_maml.main(words) == 0
        assert f"warning: {run / 'best.safetensors'} {message} than it is tested on" in capsys.readouterr().err
    else:
        assert message in refused_command(eval_maml.main, words, capsys)


def test_a_run_goes_on_bit_for_bit(images: Path, finished: Path, run: Path) -> None:
    """From the checkpoint before the last, the course of the learning rate included."""
    (run / STATES / "0000000004.ckpt").unlink()
    train(settings(images, run), resume=True)
    for name in ("last.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    states = [decode(*read_state(folder)) for folder in (run, finished)]
    for state in states:
        state["progress"].pop("seconds")
    assert faults.differences(*states) == []


@pytest.mark.parametrize("damage", ["cut", "forged", "gone"])
def test_metrics_that_are_missing_are_said_and_none_is_repeated(images: Path, run: Path, damage: str) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    if damage == "gone":
        metrics.unlink()
    else:
        metrics.write_text("".join([*lines[:2], *([] if damage == "cut" else ["{}\n", *lines[3:]])]))
    left = 0 if damage == "gone" else 2
    config = settings(images, run, iterations=5)
    with (
        pytest.warns(UserWarning, match="falls to 0"),
        pytest.warns(UserWarning, match=rf"metrics\.jsonl has {left} rows .*the checkpoint speaks of 6"),
    ):
        train(config, resume=True)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(row["iteration"], "train_loss" in row) for row in rows[left:]] == [(5, True), (5, False)]
    train(config, resume=True)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", f"{STATES}/0000000004.ckpt"])
def test_pipes_are_not_waited_for(images: Path, run: Path, name: str) -> None:
    if name.startswith(STATES):
        (run / STATES / "0000000002.ckpt").unlink()
    (run / name).unlink()
    os.mkfifo(run / name)
    said = "is not the folder of a run" if name == "config.yaml" else f"{Path(name).name} cannot be read .*named pipe"
    require_refusal(run, said, lambda: train(settings(images, run), resume=True))


def test_a_pipe_as_weights_or_summary_is_not_waited_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("best.safetensors", "summary.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert "it is a named pipe" in refused_command(eval_maml.main, [str(run), "--tasks", "4"], capsys)
    with pytest.raises(FewShotError, match="named pipe"):
        read_summary(run)


def test_checkpoints_elsewhere_are_refused(images: Path, run: Path, tmp_path: Path) -> None:
    (run / STATES).rename(tmp_path / "elsewhere")
    (run / STATES).symlink_to(tmp_path / "elsewhere")
    message = "checkpoints is a link to .*elsewhere"
    require_refusal(tmp_path, message, lambda: train(settings(images, run), resume=True))


@pytest.mark.parametrize("flock", [True, False])
def test_one_process_trains_into_a_folder(
    images: Path, run: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    """Whether the file system can lock a folder or not; where it can, removing files lets nobody in."""
    if not flock:
        monkeypatch.setattr(locks, "fcntl", None)
    with locked(run):
        if flock:
            (run / LOCK).unlink(missing_ok=True)
        with pytest.raises(FewShotError, match="another process is training into"):
            train(settings(images, run), resume=True)
    assert train(settings(images, run), resume=True)["iterations"] == 4
    assert (run / LOCK).exists() is not flock


def test_a_folder_that_cannot_be_locked_has_a_file_that_can(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    if locks.fcntl is None:
        pytest.skip("this system locks no folders")
    monkeypatch.setattr(locks, "fcntl", type("fcntl", (), {"flock": unable, "LOCK_EX": 2, "LOCK_NB": 4}))
    with locked(run):
        assert (run / LOCK).exists()
        with pytest.raises(FewShotError, match="another process"), locked(run):
            pass
    with locked(run):
        pass


def test_a_run_of_an_older_version_is_said_in_one_line(run: Path, images: Path) -> None:
    for path in (run / STATES).iterdir():
        path.write_bytes(path.read_bytes().replace(b"training state 3\n", b"training state 2\n"))
    require_refusal(run, "is of format 2; this version", lambda: train(settings(images, run), resume=True))


def work(main: Callable[[list[str]], int], changes: list[list[str]], words: list[str]) -> int:
    return main([*words, *changes[int(os.environ["RANK"])]])


def refused_job(folder: Path, *arguments: Any) -> str:
    """What the first of two processes says where both must leave; the other says nothing."""
    job = faults.start_job(folder, 2, work, *arguments)
    for process in job:
        process.join(60)
        process.kill()
    first, second = ((folder / f"{rank}.log").read_text() for rank in range(2))
    assert [process.exitcode for process in job] == [2, 2], first + second
    assert (len(first.splitlines()), second) == (1, "")
    return first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([[], ["--iterations", "9"]], "process 1: iterations is 9, but 8 in the first process"),
        ([["--inner-lr", "0.1"], []], "process 1: inner_lr is 0.4, but 0.1 in the first process"),
        ([[], ["--data-root", "OTHER"]], "process 1: the digest of the images is"),
    ],
)
def test_processes_of_a_job_that_differ_are_refused(
    images: Path, tmp_path: Path, changes: list[list[str]], said: str
) -> None:
    other = Path(shutil.copytree(images, tmp_path / "other"))
    repainted(other)
    changes = [[word.replace("OTHER", str(other)) for word in words] for words in changes]
    words = [*faults.RUN, "--data-root", str(images), "--output-dir", str(tmp_path / "run")]
    assert said in refused_job(tmp_path / "logs", train_maml.main, changes, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([["--tasks", "4"], ["--tasks", "50"]], "process 1: tasks is 50, but 4 in the first process"),
        ([["--inner-lr", "0.1"], []], "process 1: inner_lr is 0.4, but 0.1 in the first process"),
    ],
)
def test_processes_of_a_test_that_differ_are_refused(
    run: Path, tmp_path: Path, changes: list[list[str]], said: str
) -> None:
    assert said in refused_job(tmp_path / "logs", eval_maml.main, changes, [str(run)])


def test_pytorchs_default_device_changes_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for a GPU: what is put there by mistake cannot be computed with."""
    changes = {"validation": "augment", "congruence_tasks": 2, "schedule": "constant"}
    train(settings(images, tmp_path / "plain", **changes))
    monkeypatch.setenv("FEWSHOT_ASAM_CACHE", str(tmp_path / "cache"))
    with torch.device("meta"):
        train(settings(images, tmp_path / "run", iterations=2, **changes))
        train(settings(images, tmp_path / "run", **changes), resume=True)
        assert eval_maml.main([str(tmp_path / "run"), "--tasks", "2"]) == 0
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_training_takes_gradients_whatever_stands_around_it(
    images: Path, tmp_path: Path, around: Callable[[], Any]
) -> None:
    options = {"engine": "vmap", "validation": "augment", "shots": 1}
    expected = train(settings(images, tmp_path / "first", **options))
    with around():
        found = train(settings(images, tmp_path / "second", **options))
    assert found["test_accuracy"] == expected["test_accuracy"]
    rows = [read_metrics(tmp_path / name) for name in ("first", "second")]
    assert [row.get("train_loss") for row in rows[0]] == [row.get("train_loss") for row in rows[1]]


def test_a_copied_run_goes_on_in_the_copy(run: Path, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = everything(run)
    with pytest.warns(UserWarning, match="meta_lr falls to 0"):
        train(replace(stored_settings(copy), iterations=5), resume=True)
    assert everything(run) == before
    assert len(read_metrics(copy)) > len(read_metrics(run))
