"""Training a classifier: which images a step sees, where they come from, and runs that go on as if never stopped."""

from __future__ import annotations

import io
import json
import pickle
import signal
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import make_images
from fewshot_asam import FewShotError
from fewshot_asam.cli import train_classifier as command
from fewshot_asam.runtime.signals import Stop, Stopped
from fewshot_asam.supervised import batches, datasets
from fewshot_asam.supervised.config import ClassifierConfig, from_yaml
from fewshot_asam.supervised.loop import train_classifier
from fewshot_asam.supervised.names import SOURCES
from fewshot_asam.supervised.networks import build_network
from fewshot_asam.supervised.state import ClassifierState, build
from fewshot_asam.training.checkpoint import read_weights
from fewshot_asam.training.metrics import read_metrics

OPTIMIZERS = ["sgd", "sam", "asam", "friendly_sam", "agnostic_sam", "agnostic_asam"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zip file of train/<class>/*.png and test/<class>/*.png: three classes of 20 and 6 images of 16 pixels."""
    folder = tmp_path_factory.mktemp("supervised")
    with zipfile.ZipFile(folder / "images.zip", "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_ASAM_CACHE", str(folder / "cache"))
        for split, count, seed in (("train", 20, 0), ("test", 6, 0)):
            images = make_images(3, count, (3, 16, 16), seed)
            for number, pixels in enumerate(images.images):
                png = io.BytesIO()
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, "PNG")
                file.writestr(f"{split}/class{number // count}/{number:03d}.png", png.getvalue())
        file.writestr("readme.txt", "of no class")
        file.close()
        yield folder / "images.zip"


def settings(archive: Path, folder: Path, **changes: Any) -> ClassifierConfig:
    quick: dict[str, Any] = {"dataset": "folder", "data_root": archive, "image_size": 16, "model": "small", "epochs": 3}
    quick |= {"batch_size": 9, "holdout": 0.2, "label_noise": 0.2, "cutout": 4, "device": "cpu", "output_dir": folder}
    return ClassifierConfig(**(quick | changes))


def state(archive: Path, **changes: Any) -> ClassifierState:
    config = settings(archive, Path("unused"), **changes)
    return build(config, *datasets.load("folder", archive, 16), torch.device("cpu"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_was_stopped_twice_is_the_same_run(optimizer: str, archive: Path, tmp_path: Path) -> None:
    """Once in the middle of an epoch and once between two."""
    whole, parts = (settings(archive, tmp_path / name, optimizer=optimizer) for name in ("whole", "parts"))
    expected = train_classifier(whole)

    class After(Stop):
        left = 0

        def check(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Stopped(signal.SIGTERM)

    for left, resume in ((2, False), (4, True)):
        stop = After()
        stop.left = left
        with pytest.raises(Stopped, match=r"train_classifier --resume --output-dir .* goes on"):
            train_classifier(parts, resume=resume, stop=stop)
    found = train_classifier(parts, resume=True)
    for name in expected.keys() - {"output_dir", "wall_seconds"}:
        assert found[name] == expected[name], name
    for file in ("last.safetensors", "best.safetensors"):
        ours, theirs = read_weights(tmp_path / "parts" / file)[0], read_weights(tmp_path / "whole" / file)[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    rows = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_a_run_folder_has_what_it_promises(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "folder", "--data-root", str(archive), "--image-size=16", "--model=small", "--epochs=2"]
    words += ["--batch-size=9", "--holdout=0.2", "--output-dir", str(tmp_path / "run"), "--device=cpu"]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "48 / 12 / 18 images for training / choosing the epoch / test" in said
    assert "agnostic_sam: 2.44444 gradients of a training batch a step" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"test accuracy {100 * summary['test_accuracy']:.1f} %" in said
    assert summary["gradients"] == pytest.approx(2 * 5 * (2 + 2 * 2 / 9))
    names = {path.name.partition(".out")[0] for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {
        *("config.yaml", "metrics.jsonl", "events", "curves.png", "summary.json"),
        *("last.safetensors", "best.safetensors", "checkpoints"),
    }
    assert from_yaml(tmp_path / "run" / "config.yaml").epochs == 2
    assert command.main(["--resume", "--output-dir", str(tmp_path / "run")]) == 0
    assert "all 2 epochs are done" in capsys.readouterr().out


def test_bad_input_is_one_line_and_changes_nothing(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train_classifier(settings(archive, folder, epochs=1, optimizer="sgd"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    own = ["--output-dir", str(folder)]
    for words, message in (
        (["--resume", *own, "--lr=0.5"], "lr was 0.1 and is 0.5, which would alter the resumed run"),
        ([*own, "--batch-size=9"], "holds a run already; continue it with --resume"),
        (["--resume"], "--resume needs the run to go on with; pass --output-dir RUN"),
        (["--resume", "--output-dir", str(tmp_path)], "is not the folder of a run of train_classifier"),
        (["--optimizer=adam"], "optimizer is 'adam'; expected one of sgd, sam"),
        (["--label-noise=0.9"], "label_noise is 0.9; expected 0 to 0.8"),
        (["--val-batch-fraction=0"], "val_batch_fraction is 0.0; expected above 0 and at most 1"),
        (["--model=resnet", "--depth=21"], "depth is 21; expected 6n + 2 of resnet, such as 20"),
        (["--rho=-1"], "rho is -1.0; expected a finite radius"),
        (["--dataset=folder"], "the dataset 'folder' was given no root"),
        (["--dataset=cifar10", f"--data-root={tmp_path}"], "there is no CIFAR-10 in"),
        (["--batch-size=1000"], "batch_size is 1000 and holdout 0.1, but there are 60 training images"),
        (["--epochs", "two"], "epochs is 'two'; expected a whole number"),
    ):
        common = ["--dataset=folder", f"--data-root={archive}", "--image-size=16", "--device=cpu", "--batch-size=9"]
        asks = any(word.startswith(("--resume", "--dataset")) for word in words)
        assert command.main(words if asks else [*common, *words]) == 2, words
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_ends_the_run(archive: Path, tmp_path: Path) -> None:
    config = settings(archive, tmp_path / "run", optimizer="sgd", lr=1e20, model="small")
    with pytest.raises(FewShotError, match=r"the loss of epoch 1 is nan; the likely cause is an lr \(1e\+20\) or rho"):
        train_classifier(config)


def test_what_a_run_learns_depends_on_seed_and_data_and_it_learns(archive: Path, tmp_path: Path) -> None:
    quick = {"optimizer": "sam", "label_noise": 0.0, "cutout": 0, "augment": False, "epochs": 12, "weight_decay": 0.0}
    first, again = (train_classifier(settings(archive, tmp_path / name, **quick)) for name in ("first", "again"))
    assert first["last_test_accuracy"] == again["last_test_accuracy"] > 0.9
    assert first["val_accuracy"] > 0.9


def test_noise_replaces_so_many_labels_by_others() -> None:
    labels = torch.arange(10).repeat(1000)
    noisy = {share: batches.with_noise(labels, 10, share, 3) for share in (0.0, 0.4, 0.8)}
    changed = {share: one != labels for share, one in noisy.items()}
    assert [int(one.sum()) for one in changed.values()] == [0, 4000, 8000]
    assert not (changed[0.4] & ~changed[0.8]).any()
    assert torch.equal(noisy[0.4][changed[0.4]], noisy[0.8][changed[0.4]])
    shifts = ((noisy[0.8] - labels) % 10)[changed[0.8]].bincount(minlength=10)
    assert shifts[0] == 0
    assert (shifts[1:] - 8000 / 9).abs().max() < 4 * (8000 / 9) ** 0.5
    assert not torch.equal(noisy[0.4], batches.with_noise(labels, 10, 0.4, 4))


def test_an_epoch_sees_each_image_once_and_no_two_alike() -> None:
    steps = [batches.train_batch(53, 10, step, 1) for step in range(10)]
    epochs = [torch.cat(steps[:5]).tolist(), torch.cat(steps[5:]).tolist()]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1]
    vals = [batches.val_batch(53, 10, step, 1).tolist() for step in range(2)]
    assert vals[0] != vals[1]
    assert not {tuple(steps[0].tolist()), tuple(steps[1].tolist())} & set(map(tuple, vals))
    kept, held = batches.divided(50, 0.1, 0)
    assert len(held) == 5
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(50))


def test_an_image_is_shifted_flipped_and_cut() -> None:
    """Each augmented image is found again among the 2 * 9 * 9 that there can be."""
    image = torch.rand(3, 8, 8)
    padded = torch.nn.functional.pad(image, (4,) * 4)
    possible = [padded[:, y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
    possible += [one.flip(2) for one in possible]
    table = torch.stack(possible)
    found = batches.augmented(image.expand(400, -1, -1, -1), True, 0, batches.generator(0))
    which = torch.stack([(table == one).flatten(1).all(1).nonzero()[0, 0] for one in found])
    assert len(which.unique()) > 120
    assert 150 < int((which < 81).sum()) < 250
    cut = batches.augmented(torch.ones(200, 3, 8, 8), False, 4, batches.generator(1))
    holes = (cut == 0).flatten(2).sum(2)
    assert torch.equal(holes[:, 0], holes[:, 2])
    assert set(holes.unique().tolist()) <= {4, 6, 8, 9, 12, 16}
    assert holes.max() == 16


@pytest.mark.parametrize(
    ("model", "depth", "width", "expected"),
    [("resnet", 20, 1, 272_282), ("resnet", 32, 1, 466_714), ("wide_resnet", 28, 10, 36_479_194)],
)
def test_networks_have_the_published_size(model: Any, depth: int, width: int, expected: int) -> None:
    """0.27 and 0.46 million parameters in He et al., 36.5 million in Zagoruyko & Komodakis."""
    with torch.device("meta"):
        network = build_network(model, depth, width, (3, 32, 32), 10, 0)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(("model", "depth"), [("small", 4), ("resnet", 8), ("wide_resnet", 10)])
def test_networks_take_images_and_depend_on_the_seed(model: Any, depth: int) -> None:
    networks = [build_network(model, depth, 1, (3, 32, 32), 7, seed) for seed in (0, 0, 1)]
    logits = [network(torch.ones(2, 3, 32, 32)) for network in networks]
    assert logits[0].shape == (2, 7)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_a_network_of_one_s_own(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\n\ndef flat(classes, shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = settings(archive, tmp_path / "run", model="own_networks:flat", optimizer="sam", epochs=1, lr=0.01)
    assert train_classifier(config)["model"] == "own_networks:flat"
    assert read_weights(tmp_path / "run" / "last.safetensors")[0]["1.weight"].shape == (3, 3 * 16 * 16)
    with pytest.raises(FewShotError, match="own_networks has no 'flut'; did you mean flat"):
        train_classifier(settings(archive, tmp_path / "other", model="own_networks:flut"))
    with pytest.raises(FewShotError, match=r"model is 'resnt'; expected one of .*; did you mean resnet\?"):
        settings(archive, tmp_path / "other", model="resnt")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs" / "supervised").iterdir()))
def test_a_row_of_the_paper_has_its_settings(file: Path) -> None:
    """And says where each comes from; the optimizer is a flag."""
    config, resume = command.settings(["--config", str(file), "--optimizer", "asam"], ClassifierConfig())
    assert not resume
    assert (config.optimizer, config.schedule, config.val_momentum, config.momentum) == ("asam", "cosine", 0.9, 0.9)
    assert config.val_batch_fraction == 0.25
    assert f"--config configs/supervised/{file.name} " in file.read_text()


CIFAR_NAMES = [f"name{number}" for number in range(10)]


def cifar_batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    draws = np.random.default_rng(0)
    parts = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {
        part: (draws.integers(0, 256, (20, 3072), dtype=np.uint8), draws.permutation([*range(10)] * 2).tolist())
        for part in parts
    }


def packed(root: Path, name: str, folder: str, members: dict[str, bytes]) -> Path:
    with tarfile.open(root / name, "w:gz") as file:
        for member, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{member}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar_10_is_read_in_the_forms_people_have(form: str, unpacked: bool, tmp_path: Path, own_cache: Path) -> None:
    content = cifar_batches()
    if form == "python":
        members = {
            part: pickle.dumps({"batch_label": part, "data": pixels, "labels": labels}, protocol=2)
            for part, (pixels, labels) in content.items()
        }
        members["batches.meta"] = pickle.dumps({"label_names": CIFAR_NAMES}, protocol=2)
        folder = "cifar-10-batches-py"
    else:
        members = {
            f"{part}.bin": np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()
            for part, (pixels, labels) in content.items()
        }
        members["batches.meta.txt"] = ("\n".join(CIFAR_NAMES) + "\n\n").encode()
        folder = "cifar-10-batches-bin"
    packed(tmp_path, f"cifar-10-{form}.tar.gz", folder, members)
    if unpacked:
        with tarfile.open(tmp_path / f"cifar-10-{form}.tar.gz") as file:
            file.extractall(tmp_path / "cifar10", filter="data")
        (tmp_path / f"cifar-10-{form}.tar.gz").unlink()
    train, test = datasets.load("cifar10", tmp_path, 32)
    assert train.names == test.names == tuple(CIFAR_NAMES)
    assert (train.counts.tolist(), test.counts.tolist()) == ([10] * 10, [2] * 10)
    pixels, labels = content["data_batch_4"]
    of_seven = torch.from_numpy(pixels[np.array(labels) == 7]).view(-1, 3, 32, 32)
    assert torch.equal(train.images[train.starts[7] + 6 : train.starts[7] + 8], of_seven)
    pixels, labels = content["test_batch"]
    assert torch.equal(test.images[6:8], torch.from_numpy(pixels[np.array(labels) == 3]).view(-1, 3, 32, 32))


def test_a_damaged_cifar_10_is_refused(tmp_path: Path, own_cache: Path) -> None:
    pixels, labels = cifar_batches()["test_batch"]
    members = {f"data_batch_{number}": b"" for number in range(1, 6)} | {"batches.meta": b""}
    for batch, message in (
        ({"data": pixels[:, :100], "labels": labels}, r"data is uint8 \[20, 100\]; expected uint8 \[20, 3072\]"),
        ({"data": pixels, "labels": ["cat"] * 20}, "labels are not all whole numbers"),
        ({"pixels": pixels}, "expected a dict of an array data and a list labels"),
    ):
        good = pickle.dumps({"label_names": CIFAR_NAMES})
        every = dict.fromkeys(members, pickle.dumps(batch)) | {"batches.meta": good, "test_batch": pickle.dumps(batch)}
        packed(tmp_path, "cifar-10-python.tar.gz", "cifar-10-batches-py", every)
        with pytest.raises(FewShotError, match=message):
            datasets.load("cifar10", tmp_path, 32)


def test_class_folders_are_read_like_their_zip(archive: Path, tmp_path: Path, own_cache: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "tree")
    (zipped, _), (tree, test) = (datasets.load("folder", root, 16) for root in (archive, tmp_path / "tree"))
    assert torch.equal(zipped.images, tree.images)
    assert tree.names == test.names == ("class0", "class1", "class2")
    assert (tree.counts.tolist(), test.counts.tolist()) == ([20] * 3, [6] * 3)
    for image in (tmp_path / "tree" / "test" / "class1").iterdir():
        image.unlink()
    with pytest.raises(FewShotError, match=r"3 classes in train/ and 2 in test/, which differ in class1"):
        datasets.load("folder", tmp_path / "tree", 16)


def test_cifar_100_is_divided_as_krizhevsky_did(tmp_path: Path, own_cache: Path) -> None:
    """500 images of a class are of its training batch and 100 of its test batch."""
    names = [f"class{number:03d}" for number in range(100)]
    members = {"meta": pickle.dumps({"fine_label_names": names}, protocol=2)}
    for part, count in (("train", 500), ("test", 100)):
        labels = np.tile(np.arange(100), count)
        pixels = np.full((len(labels), 3072), 1 if part == "test" else 0, np.uint8)
        pixels[:, 0] = labels
        members[part] = pickle.dumps({"data": pixels, "fine_labels": labels.tolist()}, protocol=2)
    (tmp_path / "cifar-100-python").mkdir()
    for name, content in members.items():
        (tmp_path / "cifar-100-python" / name).write_bytes(content)
    train, test = datasets.load("cifar100", tmp_path, 32)
    assert (len(train.images), len(test.images)) == (50_000, 10_000)
    assert (int(train.images[:, 0, 0, 1].max()), int(test.images[:, 0, 0, 1].min())) == (0, 1)
    assert torch.equal(test.images[:, 0, 0, 0], torch.arange(100, dtype=torch.uint8).repeat_interleave(100))


def test_half_of_cifar_10(real_data: Path) -> None:
    archive = real_data / "cifar10" / "cifar-10-half.zip"
    train, test = datasets.load("folder", archive, 32)
    assert (train.counts.tolist(), test.counts.tolist()) == ([2500] * 10, [1000] * 10)
    mean: Tensor = train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=0.003, rtol=0)
    assert "folder" in SOURCES


def test_a_step_of_agnostic_sam_sees_two_batches(archive: Path) -> None:
    """And costs less than three gradients of a whole batch where the second one is a quarter of the first."""
    agnostic = state(archive, optimizer="agnostic_sam", batch_size=8)
    sizes: list[int] = []
    agnostic.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    agnostic.train_step()
    assert sizes == [8, 2, 2, 8]
    assert agnostic.config.gradients_a_step == 2.5
    assert agnostic.progress.step == 1
    norms = [layer for layer in agnostic.network.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert [int(layer.num_batches_tracked) for layer in norms if layer.num_batches_tracked is not None] == [1, 1, 1]


def test_the_learning_rate_falls_to_zero(archive: Path) -> None:
    training = state(archive, optimizer="agnostic_sam", lr=0.2)
    rates = []
    for _ in range(training.steps_an_epoch * training.config.epochs):
        training.train_step()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.2
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01
