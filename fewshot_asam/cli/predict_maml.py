"""Classify images by what a trained run makes of a few labelled ones.

examples:
  predict_maml RUN --support DIR --images DIR     # DIR/<class>/*.jpg; writes predictions.csv and predictions.png
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fewshot_asam.cli.surroundings import importing

with importing():
    from PIL import Image
    from torch import Tensor

    from fewshot_asam.classifier import TrainedRun, load_run
    from fewshot_asam.cli.contact_sheet import SIDE, Card, Thumbnail, contact_sheet, most_shown, printable
    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run
    from fewshot_asam.data.archives import decode_image, list_tree, read_file
    from fewshot_asam.data.folder import SUFFIXES
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.models.statistics import Statistics
    from fewshot_asam.runtime.allocator import keep_freed_memory
    from fewshot_asam.training.checkpoint import write_atomically

SHOWN = 200
"""Images of which the picture shows a thumbnail."""
CLASSES = 50
"""Classes of which it shows the support set."""
LINES = 20
"""Images that are listed on the terminal."""
LISTED = 5
"""Files that a warning names."""


@dataclass(frozen=True)
class PredictConfig:
    """Settings of a prediction; the docstrings are the command line's help."""

    support: Path | None = None
    """folder with a subfolder of labelled images for each class"""
    images: Path | None = None
    """folder of the images to classify; where they lie in subfolders named after a class, it is said how many are
    right"""
    output: Path = Path("predictions.csv")
    """table to write: file, label, probability and that of each class; a picture of the same name is put beside it"""
    steps: int | None = None
    """adapt with so many inner steps instead of the run's"""
    statistics: Statistics | None = None
    """whose statistics the norm layers use: the support set's alone (support, if not given), each image's with the
    support set's (each), or those of all images (together); docs/your_own_images.md has what each is worth"""
    invert: bool | None = None
    """make negatives of all images; if not given, where a run of drawings is given dark ink on light paper"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""


@dataclass(frozen=True)
class Predictions:
    """What was found: files relative to their folders, labels, and the images' probabilities `[n, classes]`."""

    support: dict[str, list[str]]
    images: list[str]
    probabilities: Tensor

    @property
    def labels(self) -> list[str]:
        """The most probable label of each image."""
        names = list(self.support)
        return [names[index] for index in self.probabilities.argmax(1).tolist()]

    @property
    def truths(self) -> list[str | None]:
        """Each image's class, where its folder is named after one."""
        folders = (name.rpartition("/")[0] for name in self.images)
        return [folder if folder in self.support else None for folder in folders]


def command(argv: Sequence[str]) -> None:
    """Parses the arguments, predicts, prints and writes."""
    parser = Parser(prog="predict_maml", description=__doc__)
    parser.add_argument("run", help="run folder")
    add_settings(parser, PredictConfig)
    given: Any = parse(parser, argv)
    settings = PredictConfig(**{field.name: given[field.name] for field in fields(PredictConfig)})
    if settings.support is None or settings.images is None:
        raise FewShotError(
            "a folder is missing; expected both --support DIR, with a subfolder a class, and --images DIR"
        )
    _require_free(settings.output)
    trained = load_run(given.run, settings.device)
    support, images = _classes(settings.support), _images(settings.images)
    keep_freed_memory()
    found = _predicted(trained, settings, support, images)
    title = f"{given.run}: {trained.origin.title}"
    _print(title, found)
    content, picture = io.BytesIO(), settings.output.with_suffix(".png")
    _picture(title, settings.support, settings.images, found).save(content, "PNG")
    _write(settings.output, _table(found).encode("utf-8", "surrogateescape"))
    _write(picture, content.getvalue())
    print(f"written: {settings.output}, {picture}")


def _require_free(output: Path) -> None:
    if output.suffix != ".csv":
        raise FewShotError(f"output is {output}; expected a name that ends in .csv, beside which a .png is put")
    if not output.parent.is_dir():
        raise FewShotError(f"output is {output}, but {output.parent} is not a folder; make it first")
    for path in (output, output.with_suffix(".png")):
        if path.exists() or path.is_symlink():
            raise FewShotError(f"{path} is there already; choose another --output, or remove it")


def _classes(folder: Path) -> dict[str, list[str]]:
    """The images of each class, relative to the folder."""
    _require_folder(folder, "support")
    classes: dict[str, list[str]] = {
        entry.name: [] for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")
    }
    if len(classes) < 2:
        raise FewShotError(
            f"{folder} has {len(classes)} subfolders; expected one for each of at least two classes, with its images"
        )
    for name in _pictures(folder, loose=False):
        classes[name.rpartition("/")[0]].append(name)
    if empty := [name for name, files in classes.items() if not files]:
        raise FewShotError(
            f"{folder} has classes without images: {', '.join(empty)}; expected {', '.join(SUFFIXES)} files directly "
            "in each subfolder"
        )
    return classes


def _images(folder: Path) -> list[str]:
    _require_folder(folder, "images")
    found = _pictures(folder, loose=True)
    if not found:
        raise FewShotError(f"{folder} has no images; expected {', '.join(SUFFIXES)} files in it or in its subfolders")
    return found


def _require_folder(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise FewShotError(f"{option} is {folder}, which is not a folder; expected one of images")


def _pictures(folder: Path, loose: bool) -> list[str]:
    """The images in the subfolders of a folder and, if `loose`, in itself; warns of other files."""
    names = [name for pattern in ("*", "*/*") for name in list_tree(folder, pattern) if not (folder / name).is_dir()]
    found = [name for name in names if name.lower().endswith(SUFFIXES) and (loose or "/" in name)]
    if others := sorted(set(names).difference(found)):
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        where = "no images" if loose else "no images in the folder of a class"
        warnings.warn(f"{folder}: {where}, so passed over: {', '.join(others[:LISTED])}{more}", stacklevel=2)
    return found


def _predicted(
    trained: TrainedRun, settings: PredictConfig, support: dict[str, list[str]], images: list[str]
) -> Predictions:
    assert settings.support is not None
    assert settings.images is not None
    labelled = [(label, settings.support / name) for label, names in support.items() for name in names]
    pixels = trained.origin.prepared([*(path for _, path in labelled), *(settings.images / name for name in images)])
    own, others = pixels[: len(labelled)], pixels[len(labelled) :]
    classifier = trained.fit(own, [label for label, _ in labelled], settings.steps, invert=settings.invert)
    return Predictions(support, images, classifier.predict_proba(others, settings.statistics))


def _print(title: str, found: Predictions) -> None:
    print(title)
    files = sum(map(len, found.support.values()))
    print(f"adapted to {files} images of {len(found.support)} classes: {_short(list(found.support))}")
    images, labels = ([printable(name) for name in names[:LINES]] for names in (found.images, found.labels))
    rows = list(zip(images, labels, found.probabilities.amax(1).tolist(), strict=False))
    widths = [max(map(len, column)) for column in (images, labels)]
    for name, label, probability in rows:
        print(f"  {name:{widths[0]}}  {label:{widths[1]}}  {100 * probability:3.0f} %")
    if len(found.images) > LINES:
        print(f"  and {len(found.images) - LINES} more")
    known = [(label, truth) for label, truth in zip(found.labels, found.truths, strict=True) if truth is not None]
    if known:
        right = sum(label == truth for label, truth in known)
        print(f"right: {right} of {len(known)} images that lie in a folder named after a class")


def _short(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:LINES])) + (f" and {len(names) - LINES} more" if len(names) > LINES else "")


def _table(found: Predictions) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "label", "probability", *(f"P({name})" for name in found.support)])
    for name, label, row in zip(found.images, found.labels, found.probabilities.tolist(), strict=True):
        writer.writerow([name, label, f"{max(row):.6f}", *(f"{value:.6f}" for value in row)])
    return text.getvalue()


def _picture(title: str, support: Path, images: Path, found: Predictions) -> Image.Image:
    labels = list(found.support)[:CLASSES]
    rows = {
        label: (
            [_thumbnail(support / name) for name in found.support[label][: most_shown()]],
            len(found.support[label]),
        )
        for label in labels
    }
    probabilities = found.probabilities.amax(1).tolist()
    each = zip(found.images, found.labels, probabilities, found.truths, strict=True)
    shown = [one for one in each if one[1] in rows][:SHOWN]
    cards = [Card(_thumbnail(images / name), name, label, p, truth) for name, label, p, truth in shown]
    total, part = len(found.images), len(cards) < len(found.images)
    count = f"the first {len(cards)} of {total} images" if part else f"{total} images"
    note = f"{count}, by label, the surest first{'; all are in the table' if part else ''}"
    return contact_sheet(title, rows, cards, note)


def _thumbnail(path: Path) -> Thumbnail:
    return decode_image(read_file(path), str(path), "RGB", (SIDE, SIDE), Image.Resampling.LANCZOS)


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda scratch: scratch.write_bytes(content))


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv, several=False)


if __name__ == "__main__":
    raise SystemExit(main())
