"""`predict_maml`: from folders of images to a table and a picture."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot_asam import load_run
from fewshot_asam.cli import predict_maml
from fewshot_asam.cli.contact_sheet import SIDE, Card, contact_sheet, most_shown
from short_runs import cache, everything, finished, images

assert cache
assert finished
assert images

CLASSES = ("class003", "class007", "class011")
Run = Callable[..., str]


@pytest.fixture
def place(images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `run`, `support` (three classes of one, two and three images) and `images` (two of each)."""
    monkeypatch.chdir(tmp_path)
    os.symlink(finished, "run")
    for number, name in enumerate(CLASSES):
        for role, chosen in (("support", range(number + 1)), ("images", range(4, 6))):
            Path(role, name).mkdir(parents=True)
            for index in chosen:
                shutil.copy(images / name / f"{index}.png", Path(role, name))
    return tmp_path


@pytest.fixture
def predict(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command, which succeeds; returns what it printed."""

    def call(words: str = "run --support support --images images") -> str:
        assert predict_maml.main(shlex.split(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def rows(file: str = "predictions.csv") -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_is_what_the_classifier_says(place: Path, predict: Run) -> None:
    said = predict()
    support = sorted(place.glob("support/*/*.png"))
    files = sorted(place.glob("images/*/*.png"))
    classifier = load_run("run", "cpu").fit(support, [file.parent.name for file in support])
    expected = classifier.predict_proba(files)
    table = rows()
    assert [row["file"] for row in table] == [f"{file.parent.name}/{file.name}" for file in files]
    assert [row["label"] for row in table] == classifier.predict(files)
    found = torch.tensor([[float(row[f"P({name})"]) for name in CLASSES] for row in table])
    assert torch.allclose(found, expected, atol=1e-5)
    assert [float(row["probability"]) for row in table] == pytest.approx(expected.amax(1).tolist(), abs=1e-5)
    right = sum(row["file"].startswith(row["label"] + "/") for row in table)
    assert f"right: {right} of 6 images that lie in a folder named after a class" in said
    assert "adapted to 6 images of 3 classes: class003, class007, class011" in said
    assert "written: predictions.csv, predictions.png" in said
    with Image.open("predictions.png") as picture:
        assert min(picture.size) > 500
        assert len(set(np.asarray(picture).reshape(-1, 3).max(1).tolist())) > 50, "it shows something"


def test_settings_are_heeded(predict: Run) -> None:
    found = {}
    for name, words in {
        "as trained": "",
        "steps": "--steps 5",
        "together": "--statistics together",
        "each": "--statistics each",
        "inverted": "--invert true",
    }.items():
        predict(f"run --support support --images images --output '{name}.csv' {words}")
        found[name] = Path(f"{name}.csv").read_text()
    assert len(set(found.values())) == len(found)


def test_images_may_lie_in_one_folder_under_any_name(place: Path, predict: Run) -> None:
    shutil.rmtree("images")
    Path("images").mkdir()
    names = ["a,b.png", 'say "x".PNG', "ünï.png", "[1].png", "a\nb.png", "c\udcff.png"]
    for name in names:
        shutil.copy(next(place.glob("support/class003/*")), Path("images", name))
    said = predict()
    assert said.count("\n") == 3 + len(names), "a line for each"
    with open("predictions.csv", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        assert {row["file"] for row in csv.DictReader(stream)} == set(names)


def test_a_long_list_is_cut_on_the_terminal_and_in_the_picture(
    place: Path, predict: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_maml, "LINES", 2)
    monkeypatch.setattr(predict_maml, "SHOWN", 4)
    notes: list[str] = []
    monkeypatch.setattr(predict_maml, "contact_sheet", lambda *given: notes.append(given[3]) or contact_sheet(*given))
    said = predict()
    assert "and 4 more" in said
    assert notes == ["the first 4 of 6 images, by label, the surest first; all are in the table"]
    assert len(rows()) == 6


@pytest.mark.filterwarnings("default")
def test_what_is_no_image_is_passed_over_with_a_word(
    place: Path, predict: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("support/class003/notes.txt", "support/loose.png", "images/notes.txt", "images/.hidden.png"):
        Path(file).write_text("no image")
    assert predict_maml.main(shlex.split("run --support support --images images")) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warned == [
        "warning: support: no images in the folder of a class, so passed over: class003/notes.txt, loose.png",
        "warning: images: no images, so passed over: notes.txt",
    ]
    assert len(rows()) == 6


def test_the_lines_of_the_page_run(place: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "your_own_images.md").read_text(encoding="utf-8")
    python = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    command = next(line for line in page.splitlines() if line.startswith("predict_maml "))
    Path("runs").mkdir()
    os.rename("run", "runs/mine")
    for index, file in enumerate(
        sorted([*place.glob("support/*/*"), *place.glob("images/*/*")])
    ):  # the page speaks of JPEGs
        Path("my_support", file.parent.name).mkdir(parents=True, exist_ok=True)
        Path("my_images").mkdir(exist_ok=True)
        folder = Path("my_support", file.parent.name) if file.parts[-3] == "support" else Path("my_images")
        Image.open(file).save(folder / f"{index}.jpg")
    names: dict[str, Any] = {}
    exec("".join(python), names)
    assert len(capsys.readouterr().out.splitlines()) > 2
    assert torch.equal(names["same"].predict_proba(names["others"]), names["classifier"].predict_proba(names["others"]))
    assert predict_maml.main(shlex.split(command)[1:]) == 0
    assert len(rows()) == 6


BAD = {
    "nothing given": ("run", "a folder is missing; expected both --support DIR"),
    "no images given": ("run --support support", "a folder is missing"),
    "no run": ("support --support support --images images", "support is not the folder of a run"),
    "a missing run": ("elsewhere --support support --images images", "elsewhere is not the folder of a run"),
    "a missing support": ("run --support x --images images", "support is x, which is not a folder"),
    "a file as support": ("run --support run/config.yaml --images images", "which is not a folder"),
    "missing images": ("run --support support --images x", "images is x, which is not a folder"),
    "no class folders": ("run --support support/class003 --images images", "has 0 subfolders; expected one for each"),
    "one class": ("run --support one --images images", "one has 1 subfolders; expected one for each of at least two"),
    "an empty class": ("run --support hollow --images images", "hollow has classes without images: empty; expected"),
    "no image": ("run --support support --images bare", "bare has no images; expected .png, .jpg"),
    "unreadable images": (
        "run --support broken --images spoilt",
        "3 images cannot be used: broken/a/1.png is not an image, spoilt/1.jpg is not an image, spoilt/2.jpg is not",
    ),
    "a table that is there": ("run --support support --images images --output there.csv", "there.csv is there already"),
    "a picture that is there": ("run --support support --images images --output drawn.csv", "drawn.png is there"),
    "no table": ("run --support support --images images --output x.txt", "expected a name that ends in .csv"),
    "no folder for it": ("run --support support --images images --output x/y.csv", "x is not a folder; make it first"),
    "steps": ("run --support support --images images --steps -1", "-1 inner steps were asked for; expected at least 0"),
    "statistics": ("run --support support --images images --statistics all", "statistics is 'all'; expected"),
    "a damaged run": ("damaged --support support --images images", "damaged/best.safetensors is damaged"),
    "two runs": ("run run --support support --images images", "unrecognized arguments: run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_costs_one_line(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, said = BAD[name]
    for folder in ("one/class003", "hollow/a", "hollow/b", "hollow/empty", "bare", "broken/a", "broken/b", "spoilt"):
        Path(folder).mkdir(parents=True)
    good = next(place.glob("support/class003/*"))
    for copy in ("one/class003/1.png", "hollow/a/1.png", "hollow/b/1.png", "broken/b/1.png", "spoilt/3.jpg"):
        shutil.copy(good, copy)
    for spoilt in ("broken/a/1.png", "spoilt/1.jpg", "spoilt/2.jpg"):
        Path(spoilt).write_text("no image")
    for there in ("there.csv", "drawn.png"):
        Path(there).write_text("somebody's")
    shutil.copytree("run", "damaged")
    Path("damaged/best.safetensors").write_bytes(b"no weights")
    before = everything(place)
    assert predict_maml.main(shlex.split(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert everything(place) == before


def grey(value: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((3, SIDE, SIDE), value, np.uint8)


def test_a_picture_of_many_classes_and_long_names() -> None:
    """The thumbnails of all cards are there, whatever their labels."""
    labels = [f"{'long ' * 20}{number}" for number in range(12)] + ["漢字", ""]
    support = {label: ([grey(90)] * most_shown(), 99) for label in labels}
    cards = [Card(grey(100 + index), f"{index}.png", label, 0.5, "x") for index, label in enumerate(labels)]
    picture = np.asarray(contact_sheet("title " * 50, support, cards, "note"))
    for index in range(len(cards)):
        assert (picture == 100 + index).all(2).sum() >= SIDE * SIDE
    assert (picture == 90).all(2).sum() >= len(labels) * most_shown() * SIDE * SIDE
    assert (picture[:, -20:] == 255).all(), "nothing reaches the right margin"
