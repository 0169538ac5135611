"""A run fitted to one's own labelled images."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import make_images
from fewshot_asam import Classifier, FewShotError, load_run
from fewshot_asam.classifier import TrainedRun
from fewshot_asam.data import Dataset
from fewshot_asam.data.preparation import dark_on_light, ink_on_paper, prepared
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.models.statistics import logits
from fewshot_asam.training.build import build_learner
from fewshot_asam.training.checkpoint import save_weights, weights
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import in_eval_mode
from fewshot_asam.training.identity import identify
from own_parts import RegisteredTwice

GREY, COLOUR = (1, 28, 28), (3, 16, 16)
NAMES = ["cat", "dog", "emu"]


def settings(**changes: Any) -> TrainConfig:
    quick: dict[str, Any] = {"inner": "maml", "ways": 3, "dataset": "omniglot", "hidden": 4, "inner_steps": 2}
    return TrainConfig(**(quick | changes))


def images_of(shape: tuple[int, int, int], classes: int = 12) -> Dataset:
    return Dataset("own", *(make_images(classes, 8, shape, seed) for seed in range(3)))


def write(path: Path, config: TrainConfig, shape: tuple[int, int, int] = GREY) -> Path:
    """A weights file as a run writes it, of a network that is far from its initial values."""
    learner = build_learner(config, shape)
    with torch.no_grad():
        for number, value in enumerate(learner.model.parameters()):
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    save_weights(path, weights(learner), identify(config, images_of(shape)).to_json())
    return path


def run_of(folder: Path, shape: tuple[int, int, int] = GREY, **changes: Any) -> TrainedRun:
    return load_run(write(folder / "best.safetensors", settings(**changes), shape), "cpu")


def task(shape: tuple[int, int, int] = GREY, ways: int = 3, shots: int = 1, queries: int = 4) -> Episodes:
    return EpisodeSampler(images_of(shape).test, ways, shots, queries, seed=0).sample(1)


def bright(images: Tensor) -> Tensor:
    """Ink 1 on paper 0: the upper half of the values, thinned out."""
    return torch.where(images > 0.7, images, torch.zeros(()))


@pytest.fixture
def run(tmp_path: Path) -> TrainedRun:
    return run_of(tmp_path)


@pytest.fixture
def drawn() -> Episodes:
    own = task()
    return replace(own, support_x=bright(own.support_x), query_x=bright(own.query_x))


def proba(classifier: Classifier, own: Episodes, **options: Any) -> Tensor:
    return classifier.predict_proba(own.query_x[0], **options)


CASES = {
    "maml": {},
    "sharp_maml_low": {"inner": "sharp_maml_low", "rho": 0.05},
    "agnostic_sam": {"inner": "agnostic_sam", "rho": 0.05},
    "anil, a trained head": {"adapt": "head", "head_init": "default"},
    "no_norm": {"adapt": "no_norm"},
    "inductive": {"norm": "inductive"},
}


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_the_learner_says_of_the_same_task(tmp_path: Path, drawn: Episodes, name: str) -> None:
    """The classifier of one's own images and the engine that a run is tested with."""
    run = run_of(tmp_path, **CASES[name])
    statistics = "support" if name == "inductive" else "together"
    found = proba(run.fit(drawn.support_x[0], drawn.support_y[0]), drawn, statistics=statistics)
    learner = build_learner(run.origin.config, GREY)
    learner.load_state_dict(load_file(tmp_path / "best.safetensors"))
    with torch.no_grad(), in_eval_mode(learner.model):
        expected = learner.meta_loss(drawn, 2).logits[0].softmax(1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found[0], found[5], atol=1e-3), "the answers differ from image to image"


@pytest.mark.parametrize(
    "labels",
    [NAMES, [7, 3, 5], [("a", 1), None, 2.5], np.array([9, 8, 7]), torch.tensor([2, 0, 1]), np.array(["x", "y", "z"])],
    ids=str,
)
def test_labels_of_any_kind(run: TrainedRun, drawn: Episodes, labels: Any) -> None:
    classifier = run.fit(drawn.support_x[0], labels)
    expected = [label.item() if hasattr(label, "item") else label for label in labels]
    assert list(classifier.labels) == expected
    order = proba(classifier, drawn).argmax(1)
    assert classifier.predict(drawn.query_x[0]) == [expected[index] for index in order]


def test_the_order_of_classes_and_images_changes_nothing(run: TrainedRun, drawn: Episodes) -> None:
    """With a head of zeros; classes have 1, 2 and 3 images."""
    images = torch.cat([drawn.support_x[0], drawn.query_x[0][[0, 4, 5]]])
    names = ["a", "b", "c", "a", "b", "b"]
    order = [5, 2, 0, 4, 1, 3]
    first = run.fit(images, names)
    second = run.fit(images[order], [names[index] for index in order])
    columns = [second.labels.index(label) for label in first.labels]
    assert first.labels == ("a", "b", "c") != second.labels
    assert torch.allclose(proba(first, drawn), proba(second, drawn)[:, columns], atol=1e-4)


@pytest.mark.parametrize("shots", [1, 4])
def test_all_images_train_whatever_the_run_held_out(tmp_path: Path, shots: int) -> None:
    own = task(shots=4)
    split = run_of(tmp_path, validation="split", shots=4, inner="agnostic_sam")
    images = own.support_x[0].view(3, 4, *GREY)[:, :shots].flatten(0, 1)
    labels = torch.arange(3).repeat_interleave(shots)
    classifier = split.fit(images, labels, invert=False)
    duplicate = replace(split, origin=replace(split.origin, config=settings(inner="agnostic_sam")))
    assert torch.equal(proba(classifier, own), proba(duplicate.fit(images, labels, invert=False), own))


def test_steps_are_the_runs_unless_given(run: TrainedRun, drawn: Episodes) -> None:
    found = {steps: proba(run.fit(drawn.support_x[0], NAMES, steps), drawn) for steps in (None, 0, 2, 3)}
    assert torch.equal(found[None], found[2])
    assert not torch.allclose(found[2], found[3], atol=1e-3)
    assert torch.allclose(found[0], torch.full((12, 3), 1 / 3)), "a head of zeros that has not adapted"


def test_fewer_classes_use_the_heads_first_rows(tmp_path: Path, drawn: Episodes) -> None:
    trained = run_of(tmp_path, ways=5, head_init="default")
    classifier = trained.fit(drawn.support_x[0][:2], ["a", "b"], 0)
    whole = build_learner(trained.origin.config, GREY)
    whole.load_state_dict(trained.weights)
    with torch.no_grad():
        expected = whole(drawn.query_x[0])[:, :2].softmax(1)
    assert torch.allclose(proba(classifier, drawn, statistics="together"), expected, atol=1e-5)


def test_a_head_of_zeros_is_widened_with_a_word(tmp_path: Path) -> None:
    """As many classes as its run had: the same answers as from a run of so many."""
    own = task(ways=5)
    narrow = run_of(tmp_path, ways=3)
    with pytest.warns(UserWarning, match="the head is widened from 3 to 5 classes"):
        found = narrow.fit(own.support_x[0], own.support_y[0], invert=False)
    body = {name: value for name, value in narrow.weights.items() if not name.startswith("model.head.")}
    head = {"model.head.weight": torch.ones(5, 4), "model.head.bias": torch.ones(5)}
    wide = replace(narrow, weights=body | head, origin=replace(narrow.origin, config=settings(ways=5)))
    assert torch.equal(proba(found, own), proba(wide.fit(own.support_x[0], own.support_y[0], invert=False), own))


@pytest.mark.parametrize("head_init", ["zeros", "default"])
def test_a_trained_head_is_not_widened(tmp_path: Path, head_init: str) -> None:
    own = task(ways=5)
    with pytest.raises(FewShotError, match="5 classes were given, but the run's head was trained for 3") as raised:
        run_of(tmp_path, head_init=head_init).fit(own.support_x[0], own.support_y[0], invert=False)
    assert len(str(raised.value).splitlines()) == 1


def test_what_is_said_of_a_fit_is_all_that_is_said(run: TrainedRun, drawn: Episodes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.fit(drawn.support_x[0], NAMES).predict(drawn.query_x[0])


# Images


def forms(folder: Path, pixels: Tensor) -> dict[str, Any]:
    """The same images, uint8 `[n, C, H, W]`, as people have them."""
    last = pixels.permute(0, 2, 3, 1).numpy()
    opened = [Image.fromarray(one.squeeze(2) if one.shape[2] == 1 else one) for one in last]
    files = []
    for index, image in enumerate(opened):
        files.append(folder / f"{index}.png")
        image.save(files[-1])
    return {
        "uint8 tensor": pixels,
        "numpy": pixels.numpy(),
        "channels last": last,
        "floats": pixels.float() / 255,
        "double precision": (pixels.double() / 255).numpy(),
        "channels last floats": torch.from_numpy(last) / 255,
        "with alpha": np.concatenate([last if last.shape[3] == 3 else last.repeat(3, 3), 0 * last[..., :1] + 255], 3),
        "pillow": opened,
        "files": files,
        "names of files": tuple(map(str, files)),
        "a list of arrays": [one.numpy() for one in pixels],
        "of several kinds": [files[0], opened[1], *pixels[2:]],
    }


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=str)
def test_images_in_every_form(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    pixels = images_of(shape).test.images[:5]
    for name, form in forms(tmp_path, pixels).items():
        assert torch.equal(prepared(form, shape), pixels), name


def test_floats_are_rounded_to_8_bits() -> None:
    levels = torch.tensor([0, 0.4, 0.6, 100.6, 254.6, 255]).view(1, 1, 2, 3)
    assert prepared(levels / 255, (1, 2, 3)).flatten().tolist() == [0, 0, 1, 101, 255, 255]


def test_one_image_is_a_list_of_one(run: TrainedRun, drawn: Episodes, tmp_path: Path) -> None:
    classifier = run.fit(drawn.support_x[0], NAMES)
    pixels = (255 * drawn.query_x[0]).round().to(torch.uint8)
    Image.fromarray(pixels[0, 0].numpy()).save(tmp_path / "one.png")
    expected = proba(classifier, drawn)[:1]
    for one in (tmp_path / "one.png", str(tmp_path / "one.png"), Image.fromarray(pixels[0, 0].numpy()), pixels[:1]):
        assert torch.allclose(classifier.predict_proba(one), expected, atol=1e-5)


def test_other_sizes_are_squashed_as_the_folder_dataset_does(tmp_path: Path) -> None:
    large = images_of((3, 40, 60)).test.images[:3]
    run = run_of(tmp_path, COLOUR, dataset="folder", image_size=16)
    with pytest.warns(UserWarning, match="the images are 3x40x60, and the run was trained on 3x16x16") as said:
        found = run.fit(large, NAMES).support
    assert len(said) == 1
    opened = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in large]
    squashed = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)) for image in opened])
    assert torch.equal(found, torch.from_numpy(squashed).permute(0, 3, 1, 2))
    grey = prepared(large, (1, 16, 16))
    expected = [np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR)) for image in opened]
    assert np.array_equal(grey[:, 0].numpy(), np.stack(expected))


PHOTOS = {"scanned": (0.0, 1.0), "a dim photo": (0.1, 0.35), "pale ink": (0.7, 0.9)}
"""Values of ink and paper."""


@pytest.mark.parametrize("light", PHOTOS)
def test_photos_of_dark_ink_are_inverted_for_a_run_of_drawings(run: TrainedRun, drawn: Episodes, light: str) -> None:
    ink, paper = PHOTOS[light]
    photos = paper + (ink - paper) * drawn.support_x[0]
    with pytest.warns(UserWarning, match="they are inverted, and so are those to predict"):
        classifier = run.fit(photos, NAMES)
    assert classifier.inverted
    clean = [x / x.amax((1, 2, 3), keepdim=True) for x in (drawn.support_x[0], drawn.query_x[0])]
    levels = 255 * abs(ink - paper)
    off = (classifier.support.float() / 255 - clean[0]).abs().max()
    assert float(off) < 2 / levels, "apart from the rounding to so many levels"
    found = classifier.predict(paper + (ink - paper) * drawn.query_x[0])
    assert found == run.fit(clean[0], NAMES).predict(clean[1])
    assert not run.fit(1 - photos, NAMES).inverted
    kept = run.fit(photos, NAMES, invert=False)
    assert torch.equal(kept.support, prepared(photos, GREY))


def test_a_page_without_ink_stays_empty() -> None:
    page = torch.randint(195, 205, (2, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert int(ink_on_paper(page).max()) < 0.3 * 255


def test_photographs_are_not_inverted(tmp_path: Path, drawn: Episodes) -> None:
    run = run_of(tmp_path, dataset="folder", image_size=28, channels=1)
    assert dark_on_light(prepared(1 - drawn.support_x[0], GREY))
    assert not run.fit(1 - drawn.support_x[0], NAMES).inverted
    inverted = run.fit(1 - drawn.support_x[0], NAMES, invert=True)
    assert torch.equal(inverted.support, 255 - prepared(1 - drawn.support_x[0], GREY))


BAD = {
    "no images": ([], "no images were given"),
    "an empty array": (np.zeros((0, 1, 28, 28), np.uint8), "no images were given"),
    "one image as an array": (np.zeros((28, 28), np.uint8), r"images are \[28, 28\]; expected four dimensions"),
    "no channels": (np.zeros((3, 28, 28), np.uint8), r"grey ones as images\[:, None\]"),
    "seven channels": (np.zeros((3, 7, 9, 7), np.uint8), r"\[3, 7, 9, 7\]; expected \[n, C, H, W\]"),
    "no pixels": (np.zeros((3, 1, 0, 28), np.uint8), r"\[3, 1, 0, 28\]; expected"),
    "whole numbers": (np.zeros((3, 1, 28, 28), np.int64), "images are int64; expected uint8"),
    "0 to 255 as floats": (np.full((3, 1, 28, 28), 255.0), "floats from 255 to 255; expected 0 to 1"),
    "normalised": (torch.full((3, 1, 28, 28), -0.5), "floats from -0.5 to -0.5"),
    "not numbers": (torch.full((3, 1, 28, 28), torch.nan), "floats from nan to nan"),
    "a number": (3, "images are a int; expected an array"),
    "numbers": ([1, 2, 3], "3 images cannot be used: an image is a int"),
    "missing files": (["a.png", "b.png", Path("c.png")], "3 images cannot be used: a.png cannot be read .*c.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_cost_one_line(run: TrainedRun, name: str) -> None:
    given, said = BAD[name]
    with pytest.raises(FewShotError, match=said) as raised:
        run.fit(given, NAMES)
    assert len(str(raised.value).splitlines()) == 1


def test_a_damaged_pillow_image(run: TrainedRun, drawn: Episodes, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    with Image.open(file) as cut, pytest.raises(FewShotError, match="a Pillow image cannot be read"):
        run.fit([cut, cut], ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "b"], "3 images and 2 labels were given"),
        (["a", "a", "a"], "all images have the label 'a'; expected images of at least two classes"),
        ([[1], [2], [3]], "labels cannot be told apart"),
    ],
)
def test_bad_labels_cost_one_line(run: TrainedRun, drawn: Episodes, labels: list[Any], said: str) -> None:
    with pytest.raises(FewShotError, match=said):
        run.fit(drawn.support_x[0], labels)


def test_an_adaptation_that_diverges(tmp_path: Path, drawn: Episodes) -> None:
    with pytest.raises(FewShotError, match="is not finite after 9 inner steps"):
        run_of(tmp_path, inner_lr=1e25).fit(drawn.support_x[0], NAMES, 9)


# Whose statistics


@pytest.mark.parametrize("statistics", ["support", "each"])
def test_answers_do_not_depend_on_the_other_images(run: TrainedRun, drawn: Episodes, statistics: Any) -> None:
    classifier = run.fit(drawn.support_x[0], NAMES)
    whole = proba(classifier, drawn, statistics=statistics)
    one = torch.cat([classifier.predict_proba(image[None], statistics) for image in drawn.query_x[0]])
    assert torch.allclose(whole, one, atol=1e-5)
    together = proba(classifier, drawn, statistics="together")
    assert not torch.allclose(whole, together, atol=1e-2)
    assert not torch.allclose(together[:2], classifier.predict_proba(drawn.query_x[0][:2], "together"), atol=1e-2)


def test_the_statistics_are_those_that_are_named(run: TrainedRun, drawn: Episodes) -> None:
    classifier = run.fit(drawn.support_x[0], NAMES)
    query, model = (255 * drawn.query_x[0]).round() / 255, classifier.model
    support = classifier.support.float() / 255
    with torch.no_grad():
        alone = model(torch.cat([support, query]), support=3)[3:].softmax(1)
        each = torch.cat([model(torch.cat([support, one[None]]))[-1:] for one in query]).softmax(1)
    assert torch.allclose(proba(classifier, drawn), alone, atol=1e-5), "the default"
    assert torch.allclose(proba(classifier, drawn, statistics="each"), each, atol=1e-5)
    with pytest.raises(FewShotError, match="statistics is 'none'; expected one of each, support, together"):
        proba(classifier, drawn, statistics="none")


def test_large_sets_go_through_in_parts(run: TrainedRun, drawn: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = run.fit(drawn.support_x[0], NAMES)
    whole, sizes = proba(classifier, drawn), []
    classifier.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr("fewshot_asam.classifier.AT_ONCE", 5)
    assert torch.allclose(proba(classifier, drawn), whole, atol=1e-5)
    assert max(sizes) == 4 + 3, "12 images in three parts of 4, beside 3 support images"


class Plain(nn.Module):
    """Without a norm, so that no image heeds another."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls = nn.Linear(9, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def test_without_a_norm_images_go_through_once() -> None:
    model, images = Plain(), torch.rand(50, 1, 3, 3)
    for statistics in ("each", "support"):
        model.calls = 0
        assert torch.equal(logits(model, images, images[:2], statistics), model(images))
        assert model.calls <= 4


def test_a_model_that_takes_no_support_is_asked_for_each() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(9, 2))
    images = torch.rand(4, 1, 3, 3)
    with pytest.raises(FewShotError, match=r"Sequential.forward takes no `support`.* use 'each'"):
        logits(model, images, images, "support")
    assert torch.equal(logits(model, images, images[:2], "each")[3], model(images[[0, 1, 3]])[2])


# Files


def test_a_saved_classifier_needs_no_run(tmp_path: Path, drawn: Episodes) -> None:
    run = run_of(tmp_path, inner="agnostic_sam")
    labels = ["übel", 3, None]
    classifier = run.fit(1 - drawn.support_x[0], labels, invert=True)
    classifier.save(tmp_path / "mine.safetensors")
    (tmp_path / "best.safetensors").unlink()
    loaded = Classifier.load(tmp_path / "mine.safetensors", "cpu")
    assert loaded.labels == tuple(labels)
    assert loaded.inverted
    assert torch.equal(proba(loaded, drawn), proba(classifier, drawn))
    assert set(load_file(tmp_path / "mine.safetensors")) > {"support", "model.head.weight"}


@pytest.mark.parametrize("ways", [2, 5])
def test_a_head_of_another_width_is_saved(tmp_path: Path, ways: int) -> None:
    own = task(ways=ways)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = run_of(tmp_path).fit(own.support_x[0], own.support_y[0], invert=False)
    classifier.save(tmp_path / "mine.safetensors")
    assert torch.equal(proba(Classifier.load(tmp_path / "mine.safetensors", "cpu"), own), proba(classifier, own))


@pytest.mark.parametrize("damage", [100, -1, -3000])
def test_a_damaged_file_is_refused(run: TrainedRun, drawn: Episodes, tmp_path: Path, damage: int) -> None:
    run.fit(drawn.support_x[0], NAMES).save(file := tmp_path / "mine.safetensors")
    content = bytearray(file.read_bytes())
    content[damage] ^= 1
    file.write_bytes(content)
    with pytest.raises(FewShotError, match=r"mine.safetensors (is damaged|holds numbers)"):
        Classifier.load(file)


def test_files_of_another_kind_are_refused(run: TrainedRun, drawn: Episodes, tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match=r"best.safetensors: the classifier is .*expected values of labels"):
        Classifier.load(tmp_path / "best.safetensors")
    run.fit(drawn.support_x[0], NAMES).save(file := tmp_path / "mine.safetensors")
    with pytest.raises(FewShotError, match=r"mine.safetensors: what made the run is"):
        load_run(file)
    tensors, text = load_file(file), {"labels": NAMES, "statistics": "each", "inverted": False}
    for spoilt in (
        {**tensors, "support": tensors["support"].float()},
        {name: value for name, value in tensors.items() if name != "support"},
    ):
        save_weights(file, spoilt, json.dumps(text | {"run": run.origin.text}))
        with pytest.raises(FewShotError, match="is of another kind"):
            Classifier.load(file)
    save_weights(file, tensors, json.dumps(text | {"labels": ["a", "b"], "run": run.origin.text}))
    with pytest.raises(FewShotError, match="holds the weights of another model"):
        Classifier.load(file)


@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.filterwarnings("ignore:the head is widened")
def test_a_model_of_ones_own(tmp_path: Path, ways: int) -> None:
    """Its run imports it by its name; a classifier's file has no say in what is imported."""
    own = task(ways=ways)
    run = run_of(tmp_path, model="own_parts:RegisteredTwice")
    classifier = run.fit(own.support_x[0], own.support_y[0], invert=False)
    classifier.save(file := tmp_path / "mine.safetensors")
    with pytest.raises(FewShotError, match="holds the weights of own_parts:RegisteredTwice, but no code; pass model="):
        Classifier.load(file, "cpu")
    loaded = Classifier.load(file, "cpu", model=RegisteredTwice)
    assert proba(loaded, own).shape == (4 * ways, ways)
    assert torch.equal(proba(loaded, own), proba(classifier, own))


def test_a_model_given_in_python(tmp_path: Path, drawn: Episodes) -> None:
    run = run_of(tmp_path, model="own_parts:RegisteredTwice")
    given = replace(run.origin.config, from_python=("model",))
    save_weights(file := tmp_path / "given.safetensors", run.weights, identify(given, images_of(GREY)).to_json())
    with pytest.raises(FewShotError, match="model"):
        load_run(file, "cpu").fit(drawn.support_x[0], NAMES)
    found = load_run(file, "cpu", model=RegisteredTwice).fit(drawn.support_x[0], NAMES)
    assert torch.equal(proba(found, drawn), proba(run.fit(drawn.support_x[0], NAMES), drawn))


def test_labels_that_no_file_holds(run: TrainedRun, drawn: Episodes, tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match=r"label \('a', 1\) is a tuple; a file holds strings and numbers"):
        run.fit(drawn.support_x[0], [("a", 1), 2, 3]).save(tmp_path / "mine.safetensors")
    assert not (tmp_path / "mine.safetensors").exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match="is not the folder of a run"):
        load_run(tmp_path)
    with pytest.raises(FewShotError, match="is not the folder of a run"):
        load_run(tmp_path / "missing")


def test_a_widened_head_has_rates_for_its_new_rows(tmp_path: Path) -> None:
    """Rates of elements, learned for three classes: the answers for the other two move as well."""
    run = run_of(tmp_path, learned_rates="element", inner_steps=3)
    own = task(ways=5, shots=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = run.fit(own.support_x[0], own.support_y[0], invert=False).model.head.weight
    assert (head.norm(dim=1) > 1e-3).all()
