"""Mini-ImageNet: every form gives the same tensors, and whatever is missing, damaged or wrong is named in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from fewshot_asam.data import mini_imagenet
from fewshot_asam.data.cache import SPLITS
from fewshot_asam.data.images import Dataset
from fewshot_asam.data.mini_imagenet import Sizes, load
from fewshot_asam.errors import FewShotError

SIZES = Sizes(train=3, val=2, test=2, per_class=4)
PICKLES = {split: f"mini-imagenet-cache-{split}.pkl" for split in SPLITS}

Splits = dict[str, dict[str, dict[str, bytes]]]
"""Split, then class, then file name, to JPEG."""


def jpeg(chance: np.random.Generator, size: tuple[int, int] = (84, 84)) -> bytes:
    """A smooth random image of `(width, height)` pixels."""
    buffer = io.BytesIO()
    coarse = chance.integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """uint8 `[84, 84, 3]`, by Pillow alone."""
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Splits:
    """A Mini-ImageNet of 3 / 2 / 2 classes of 4 images, its classes not in order; `load` expects those sizes."""
    monkeypatch.setattr(mini_imagenet, "EXPECTED", SIZES)
    chance = np.random.default_rng(0)
    names = {"train": ("n03", "n01", "n07"), "val": ("n06", "n02"), "test": ("n05", "n04")}
    return {
        split: {name: {f"{name}{i:08d}.jpg": jpeg(chance) for i in (9, 2, 5, 3)} for name in names[split]}
        for split in SPLITS
    }


def tables(splits: Splits) -> dict[str, str]:
    """The CSVs by file name, with the rows of different classes interleaved."""
    rows = {s: [(file, name) for name, files in classes.items() for file in files] for s, classes in splits.items()}
    return {
        f"{split}.csv": "".join(
            f"{file},{name}\n" for file, name in [("filename", "label"), *members[::2], *members[1::2]]
        )
        for split, members in rows.items()
    }


def images(splits: Splits) -> dict[str, bytes]:
    return {
        f"images/{f}": data for classes in splits.values() for files in classes.values() for f, data in files.items()
    }


def write_folder(root: Path, splits: Splits) -> None:
    (root / "images").mkdir(parents=True)
    for name, text in tables(splits).items():
        (root / name).write_text(text, newline="")
    for name, data in images(splits).items():
        (root / name).write_bytes(data)


def write_zip(root: Path, splits: Splits, name: str = "mini-imagenet.zip") -> None:
    with zipfile.ZipFile(root / name, "w") as archive:
        for member, content in {**tables(splits), **images(splits)}.items():
            archive.writestr(member, content)


def arrays(splits: Splits, split: str) -> dict[str, np.ndarray]:
    """Each class's images in the order of its table, uint8 `[4, 84, 84, 3]`."""
    order = [row.split(",")[0] for row in tables(splits)[f"{split}.csv"].splitlines()]
    return {
        name: np.stack([decoded(files[file]) for file in order if file in files])
        for name, files in splits[split].items()
    }


def pickled(splits: Splits, split: str) -> dict[str, object]:
    """What learn2learn keeps: here with the images of different classes interleaved."""
    classes = arrays(splits, split)
    pixels = np.stack(list(classes.values()), 1).reshape(-1, 84, 84, 3)
    return {
        "image_data": pixels,
        "class_dict": {name: list(range(i, len(pixels), len(classes))) for i, name in enumerate(classes)},
    }


def write_pickles(root: Path, splits: Splits, protocol: int = 2) -> None:
    for split, name in PICKLES.items():
        (root / name).write_bytes(pickle.dumps(pickled(splits, split), protocol))


def write_hdf5(root: Path, splits: Splits) -> None:
    for split in SPLITS:
        classes = arrays(splits, split)
        with h5py.File(root / f"{split}_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for name, pixels in classes.items():
                group.create_dataset(name, data=pixels)
        (root / f"{split}_labels.json").write_text(json.dumps(list(classes)))


WRITERS: dict[str, Callable[[Path, Splits], None]] = {
    "zip": write_zip,
    "folder": write_folder,
    "pickles": write_pickles,
    "hdf5": write_hdf5,
}


def check(dataset: Dataset, splits: Splits) -> None:
    """The dataset holds these splits: classes sorted, images in the order of the tables."""
    for split in SPLITS:
        images = getattr(dataset, split)
        expected = arrays(splits, split)
        assert images.names == tuple(sorted(expected))
        assert images.counts.tolist() == [SIZES.per_class] * len(expected)
        pixels = torch.from_numpy(np.concatenate([expected[name] for name in images.names]))
        assert torch.equal(images.images, pixels.permute(0, 3, 1, 2))


def refuse(root: Path, *parts: str) -> None:
    """`load` raises one line that has all of `parts` in this order, and then what it expected."""
    pattern = ".*".join(map(re.escape, parts))
    with pytest.raises(FewShotError, match=rf"\A.*{re.escape(str(root))}.*{pattern}.*\Z") as caught:
        load(root)
    assert "; expected " in str(caught.value)


@pytest.mark.parametrize("subfolder", ["", "mini-imagenet", "mini_imagenet", "miniimagenet"])
@pytest.mark.parametrize("form", WRITERS)
def test_forms(tmp_path: Path, splits: Splits, form: str, subfolder: str) -> None:
    (tmp_path / subfolder).mkdir(exist_ok=True)
    WRITERS[form](tmp_path / subfolder, splits)
    check(load(tmp_path), splits)
    check(load(tmp_path), splits)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(tmp_path: Path, splits: Splits, protocol: int) -> None:
    write_pickles(tmp_path, splits, protocol)
    check(load(tmp_path), splits)


def test_other_names(tmp_path: Path, splits: Splits) -> None:
    write_pickles(tmp_path, splits)
    (tmp_path / PICKLES["val"]).rename(tmp_path / "mini-imagenet-cache-validation.pkl")
    check(load(tmp_path), splits)
    write_zip(tmp_path, splits, "miniimagenet.zip")
    (tmp_path / PICKLES["train"]).write_bytes(b"")
    check(load(tmp_path), splits)


def test_order_of_preference(tmp_path: Path, splits: Splits) -> None:
    for form in ("hdf5", "pickles", "folder", "zip"):
        WRITERS[form](tmp_path, splits)
        check(load(tmp_path), splits)
        for file in tmp_path.glob("*.*"):
            file.write_bytes(b"damaged")
    refuse(tmp_path, "mini-imagenet.zip")


def test_a_table_beside_pickles(tmp_path: Path, splits: Splits) -> None:
    """Without images the tables are of no use, so that what has images is read."""
    write_pickles(tmp_path, splits)
    (tmp_path / "train.csv").write_text("filename,label\n")
    check(load(tmp_path), splits)


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_other_sizes_are_resized(tmp_path: Path, splits: Splits, form: str) -> None:
    large = jpeg(np.random.default_rng(1), (500, 375))
    splits["val"]["n02"]["n0200000005.jpg"] = large
    WRITERS[form](tmp_path, splits)
    resized = Image.open(io.BytesIO(large)).resize((84, 84), Image.Resampling.BILINEAR)
    order = [line.split(",")[0] for line in tables(splits)["val.csv"].splitlines() if "n02" in line]
    index = order.index("n0200000005.jpg")
    assert np.array_equal(load(tmp_path).val.images[index].permute(1, 2, 0), np.asarray(resized))


@pytest.mark.parametrize("form", WRITERS)
def test_a_change_is_noticed(tmp_path: Path, splits: Splits, form: str) -> None:
    WRITERS[form](tmp_path, splits)
    load(tmp_path)
    splits["test"]["n04"]["n0400000009.jpg"] = jpeg(np.random.default_rng(2))
    if form == "folder":
        (tmp_path / "images" / "n0400000009.jpg").write_bytes(splits["test"]["n04"]["n0400000009.jpg"])
    else:
        WRITERS[form](tmp_path, splits)
    check(load(tmp_path), splits)


def test_download(tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pickles(tmp_path, splits)
    fetched = []

    def fetch(url: str, known_hash: str, filename: str) -> Path:
        fetched.append((url, known_hash[:4], filename))
        return tmp_path / filename.replace("validation", "val")

    monkeypatch.setattr(mini_imagenet, "fetch", fetch)
    check(load(), splits)
    check(load(), splits)
    names = [f"mini-imagenet-cache-{split}.pkl" for split in ("train", "validation", "test")]
    assert fetched == [(f"https://zenodo.org/record/7978538/files/{name}", "md5:", name) for name in names]


def test_nothing_there(tmp_path: Path, splits: Splits) -> None:
    refuse(tmp_path, "mini-imagenet.zip", "images/", "train.csv", "mini-imagenet-cache-*.pkl", "_data.hdf5")


@pytest.mark.parametrize(
    ("form", "missing"),
    [("folder", "val.csv"), ("pickles", "mini-imagenet-cache-test.pkl"), ("hdf5", "val_data.hdf5")],
)
def test_a_split_is_missing(tmp_path: Path, splits: Splits, form: str, missing: str) -> None:
    WRITERS[form](tmp_path, splits)
    (tmp_path / missing).unlink()
    refuse(tmp_path, f"not {missing}", "all three splits")


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_an_image_is_missing(tmp_path: Path, splits: Splits, form: str) -> None:
    WRITERS["folder"](tmp_path / "all", splits)
    (tmp_path / "all" / "images" / "n0300000005.jpg").unlink()
    if form == "zip":
        shutil.make_archive(str(tmp_path / "mini-imagenet"), "zip", tmp_path / "all")
    refuse(tmp_path if form == "zip" else tmp_path / "all", "n0300000005.jpg")


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("damage", [lambda data: b"no image", lambda data: data[: len(data) // 2], lambda data: b""])
def test_an_image_is_damaged(tmp_path: Path, splits: Splits, form: str, damage: Callable[[bytes], bytes]) -> None:
    splits["test"]["n05"]["n0500000003.jpg"] = damage(splits["test"]["n05"]["n0500000003.jpg"])
    WRITERS[form](tmp_path, splits)
    refuse(tmp_path, "images/n0500000003.jpg", "undamaged PNG, JPEG")


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("number", [1, 3])
def test_wrong_number_of_classes(tmp_path: Path, splits: Splits, form: str, number: int) -> None:
    splits["val"].pop("n02")
    if number == 3:
        splits["val"] |= {name: splits["test"][other] for name, other in (("n08", "n05"), ("n09", "n04"))}
    WRITERS[form](tmp_path, splits)
    refuse(tmp_path, "val", f"{number} classes; expected the 2 of val")


@pytest.mark.parametrize("form", WRITERS)
def test_wrong_number_of_images(tmp_path: Path, splits: Splits, form: str) -> None:
    for files in splits["test"].values():
        files.pop(next(iter(files)))
    WRITERS[form](tmp_path, splits)
    refuse(tmp_path, "test", "class 'n0", "3", "expected", "4")


@pytest.mark.parametrize("form", WRITERS)
def test_a_class_in_two_splits(tmp_path: Path, splits: Splits, form: str) -> None:
    splits["test"]["n01"] = splits["test"].pop("n05")
    WRITERS[form](tmp_path, splits)
    refuse(tmp_path, "class 'n01' is in both train and test", "disjoint")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: "", "header filename,label"),
        (lambda text: text.replace("filename,label", "file,class"), "filename,label"),
        (lambda text: text.replace(",n06", "", 1), "filename,label"),
        (lambda text: text.replace(",n06", ",n06,7", 1), "filename,label"),
        (lambda text: text.replace("n0600000009", "n06\x0000000009", 1), "filename,label"),
        (lambda text: text.replace("n06", "../n06", 1), "lists ../n06"),
        (lambda text: text.replace("n06", "a/../../n06", 1), "expected files in the folder images"),
        (lambda text: text.replace("n06", "..\\\\n06", 1), "expected files in the folder images"),
        (lambda text: text.replace("n06", "x" * 10_000_000, 1), "header filename,label"),
        (lambda text: text.replace("n0600000009", "n0600000002", 1), "an image twice; expected 4 different ones"),
    ],
)
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_a_table_is_wrong(tmp_path: Path, splits: Splits, form: str, damage: Callable[[str], str], reason: str) -> None:
    folder = tmp_path / "all"
    write_folder(folder, splits)
    (folder / "val.csv").write_text(damage((folder / "val.csv").read_text()))
    if form == "zip":
        shutil.make_archive(str(tmp_path / "mini-imagenet"), "zip", folder)
    refuse(tmp_path if form == "zip" else folder, "val.csv", reason)


def test_a_table_is_no_text(tmp_path: Path, splits: Splits) -> None:
    write_folder(tmp_path, splits)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    refuse(tmp_path, "train.csv", "header filename,label")


def test_an_absolute_name_stays_in_the_folder(tmp_path: Path, splits: Splits) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(next(iter(images(splits).values())))
    write_folder(tmp_path / "all", splits)
    table = tmp_path / "all" / "val.csv"
    table.write_text(re.sub("n06[0-9]+.jpg", str(outside), table.read_text(), count=1))
    refuse(tmp_path / "all", f"/images{outside}", "cannot be read")


def test_zip_without_table(tmp_path: Path, splits: Splits) -> None:
    with zipfile.ZipFile(tmp_path / "mini-imagenet.zip", "w") as archive:
        archive.writestr("train.csv", tables(splits)["train.csv"])
    refuse(tmp_path, "mini-imagenet.zip", "images/n0")
    with zipfile.ZipFile(tmp_path / "mini-imagenet.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    refuse(tmp_path, "mini-imagenet.zip", "no member train.csv")


@pytest.mark.parametrize("form", WRITERS)
def test_truncated(tmp_path: Path, splits: Splits, form: str) -> None:
    WRITERS[form](tmp_path, splits)
    for file in (file for file in tmp_path.iterdir() if "train" in file.name or file.suffix == ".zip"):
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 30):
            file.write_bytes(whole[:length])
            refuse(tmp_path, file.name)
        file.write_bytes(whole)
    check(load(tmp_path), splits)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_data": None}, "an array image_data"),
        ({"class_dict": [0]}, "a dict class_dict"),
        ({"image_data": np.zeros((8, 84, 84, 3), np.float32)}, "float32 [8, 84, 84, 3]; expected uint8 [n, 84, 84, 3]"),
        ({"image_data": np.zeros((8, 3, 84, 84), np.uint8)}, "uint8 [8, 3, 84, 84]; expected uint8 [n, 84, 84, 3]"),
        ({"image_data": np.uint8(3)}, "an array image_data"),
        (
            {"class_dict": {"n06": [0, 1, 2, 3], "n02": [4, 5, 6, 8]}},
            "class 'n02' has no list of its images; expected indices from 0 to 7",
        ),
        (
            {"class_dict": {"n06": [0, 1, 2, 3], "n02": [4, 5, 6, -1]}},
            "class 'n02' has no list of its images; expected indices from 0 to 7",
        ),
        (
            {"class_dict": {"n06": [0, 1, 2, 3], "n02": [4, 5, 6, 1.5]}},
            "class 'n02' has no list of its images; expected indices from 0 to 7",
        ),
        (
            {"class_dict": {"n06": [0, 1, 2, 3], "n02": "4567"}},
            "class 'n02' has no list of its images; expected indices from 0 to 7",
        ),
        (
            {"class_dict": {"n06": [0, 1, 2, 3], "n02": np.eye(2, dtype=int)}},
            "class 'n02' has no list of its images; expected indices from 0 to 7",
        ),
        ({"class_dict": {"n06": [0, 1, 2, 3], "n02": [4, 5, 6, 3]}}, "an image twice"),
        ({"class_dict": {6: [0, 1, 2, 3], "n02": [4, 5, 6, 7]}}, "class names"),
        ({"class_dict": {"n06": [0, 1, 2, 3], "n02": [4, 5, 6]}}, "'n02' has 3 images; expected 4"),
        ({"class_dict": {"n06": print}}, "builtins.print"),
    ],
)
def test_a_pickle_is_wrong(tmp_path: Path, splits: Splits, change: dict[str, object], reason: str) -> None:
    write_pickles(tmp_path, splits)
    (tmp_path / PICKLES["val"]).write_bytes(pickle.dumps({**pickled(splits, "val"), **change}))
    refuse(tmp_path, PICKLES["val"], reason)


def test_indices_as_arrays(tmp_path: Path, splits: Splits) -> None:
    write_pickles(tmp_path, splits)
    content = pickled(splits, "val")
    content["class_dict"] = {"n06": np.array([0, 2, 4, 6]), "n02": [np.int64(i) for i in (1, 3, 5, 7)]}
    (tmp_path / PICKLES["val"]).write_bytes(pickle.dumps(content))
    check(load(tmp_path), splits)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 3, 84, 84), "u1"), ((4, 84, 84, 3), "f4"), ((5, 84, 84, 3), "u1"), ((), "u1")]
)
def test_hdf5_of_another_shape(tmp_path: Path, splits: Splits, shape: tuple[int, ...], dtype: str) -> None:
    write_hdf5(tmp_path, splits)
    with h5py.File(tmp_path / "val_data.hdf5", "a") as file:
        del file["datasets/n02"]
        file["datasets/n02"] = np.zeros(shape, dtype)
    refuse(tmp_path, "val_data.hdf5", "class 'n02'", str(list(shape)), "expected uint8 [4, 84, 84, 3]")


def test_hdf5_of_another_structure(tmp_path: Path, splits: Splits) -> None:
    write_hdf5(tmp_path, splits)
    with h5py.File(tmp_path / "val_data.hdf5", "a") as file:
        del file["datasets/n02"]
        file.create_group("datasets/n02")
    refuse(tmp_path, "val_data.hdf5", "a group datasets of one dataset a class")
    with h5py.File(tmp_path / "val_data.hdf5", "w") as file:
        file["images"] = np.zeros(3)
    refuse(tmp_path, "val_data.hdf5", "a group datasets")
    with h5py.File(tmp_path / "val_data.hdf5", "w") as file:
        file["datasets"] = np.zeros(3)
    refuse(tmp_path, "val_data.hdf5", "")


STORED = (SIZES.per_class, 84, 84, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (1, 84, 84, 3)},
        {"compression": "lzf", "chunks": (3, 50, 50, 2)},
        {"fletcher32": True},
        {"chunks": (1, 84, 84, 1), "maxshape": (None, 84, 84, 3)},
    ],
)
def test_hdf5_in_chunks(tmp_path: Path, splits: Splits, settings: dict[str, object]) -> None:
    write_hdf5(tmp_path, splits)
    with h5py.File(tmp_path / "val_data.hdf5", "w") as file:
        for name, pixels in arrays(splits, "val").items():
            file.create_dataset(f"datasets/{name}", data=pixels, **settings)
    check(load(tmp_path), splits)


def external(file: h5py.File, other: Path) -> None:
    file.create_dataset("datasets/n02", STORED, "u1", external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout(STORED, "u1")
    layout[:] = h5py.VirtualSource(str(other), "datasets/n02", STORED)
    file.create_virtual_dataset("datasets/n02", layout)


def link(file: h5py.File, other: Path) -> None:
    file["datasets/n02"] = h5py.ExternalLink(str(other), "datasets/n02")


def link_of_all(file: h5py.File, other: Path) -> None:
    del file["datasets"]
    file["datasets"] = h5py.ExternalLink(str(other), "datasets")


def soft_link(file: h5py.File, other: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(other), "datasets")
    file["datasets/n02"] = h5py.SoftLink("/elsewhere/n02")


def external_as_group(file: h5py.File, other: Path) -> None:
    del file["datasets"]
    file.create_dataset("datasets", (10,), "u1", external=[(str(other), 0, 10)])


def other_filter(file: h5py.File, other: Path) -> None:
    file.create_dataset("datasets/n02", STORED, "u1", chunks=STORED, scaleoffset=8)


def two_compressions(file: h5py.File, other: Path) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(STORED)
    for _ in range(2):
        plist.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (9,))
    space = h5py.h5s.create_simple(STORED)
    h5py.h5d.create(file["datasets"].id, b"n02", h5py.h5t.STD_U8LE, space, plist)


def bomb(file: h5py.File, other: Path, size: int = 1_000_000) -> None:
    stored = file.create_dataset("datasets/n02", STORED, "u1", chunks=(1, *STORED[1:]), compression="gzip")
    for index in range(STORED[0]):
        stored.id.write_direct_chunk((index, 0, 0, 0), zlib.compress(bytes(size)))


def large_chunks(file: h5py.File, other: Path) -> None:
    file.create_dataset("datasets/n02", STORED, "u1", chunks=(10**9, 1, 1, 1), maxshape=(None, 84, 84, 3))


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (external, "class 'n02' lies in other files"),
        (virtual, "class 'n02' lies in other files"),
        (link, "class 'n02' is a ExternalLink"),
        (link_of_all, "datasets is a ExternalLink"),
        (soft_link, "class 'n02' is a SoftLink"),
        (external_as_group, "datasets is a Dataset"),
        (other_filter, "class 'n02' has the filters [6]"),
        (two_compressions, "class 'n02' has the filters [1, 1]"),
        (bomb, "class 'n02' inflates to more than its chunks hold"),
        (large_chunks, "class 'n02' has chunks of [1000000000, 1, 1, 1]"),
    ],
)
def test_hdf5_that_refers_elsewhere_or_grows(
    tmp_path: Path, splits: Splits, attack: Callable[[h5py.File, Path], None], reason: str
) -> None:
    write_hdf5(tmp_path, splits)
    shutil.copyfile(tmp_path / "val_data.hdf5", tmp_path / "other.hdf5")
    with h5py.File(tmp_path / "val_data.hdf5", "a") as file:
        del file["datasets/n02"]
        attack(file, tmp_path / "other.hdf5")
    refuse(tmp_path, "val_data.hdf5", reason)


@pytest.mark.parametrize("form", WRITERS)
def test_pipes_are_not_waited_for(tmp_path: Path, splits: Splits, form: str) -> None:
    WRITERS[form](tmp_path, splits)
    for file in sorted(path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts):
        whole = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        refuse(tmp_path, file.name)
        file.unlink()
        file.write_bytes(whole)
    check(load(tmp_path), splits)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ('["n06", "n03"]', "other classes than val_labels.json"),
        ('{"n06": 1}', "JSON list of class names"),
        ("[1, 2]", "JSON list of class names"),
        ("[" * 100_000, "JSON list of class names"),
        (None, "JSON list of class names"),
    ],
)
def test_hdf5_labels(tmp_path: Path, splits: Splits, labels: str | None, reason: str) -> None:
    write_hdf5(tmp_path, splits)
    file = tmp_path / "val_labels.json"
    file.unlink() if labels is None else file.write_text(labels)
    refuse(tmp_path, "val_", reason)


def test_whole_archive(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real 60,000 images: sizes, sorted disjoint classes, and images taken out by hand. Takes half a minute."""
    monkeypatch.setattr(mini_imagenet, "cached", lambda name, key, build: build())
    dataset = load(real_data)
    names = [name for split in SPLITS for name in getattr(dataset, split).names]
    assert len(set(names)) == 100
    with zipfile.ZipFile(real_data / "mini-imagenet" / "mini-imagenet.zip") as archive:
        for split, classes in (("train", 64), ("val", 16), ("test", 20)):
            images = getattr(dataset, split)
            assert images.images.shape == (classes * 600, 3, 84, 84)
            assert images.counts.tolist() == [600] * classes
            assert list(images.names) == sorted(images.names)
            rows = [row.split(",") for row in archive.read(f"{split}.csv").decode().split()[1:]]
            for number in (0, classes // 2, classes - 1):
                files = [file for file, label in rows if label == images.names[number]]
                for index in (0, 599):
                    expected = decoded(archive.read(f"images/{files[index]}"))
                    assert np.array_equal(images.images[600 * number + index].permute(1, 2, 0), expected)
