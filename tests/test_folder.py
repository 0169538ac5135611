"""A user's own image folder: what is read, how its classes are divided, and what is said where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewshot_asam.data import folder
from fewshot_asam.data.cache import SPLITS
from fewshot_asam.data.images import Dataset
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.memory import memory_limit
from test_archives import line

SUFFIXES = ("png", "jpg", "jpeg", "PNG", "Jpg", "JPEG")


def colour(klass: int, index: int) -> tuple[int, int, int]:
    return 20 * klass, 30 * index, 200 - 15 * klass


@pytest.fixture
def root(tmp_path: Path, own_cache: Path) -> Path:
    """Ten classes, class k of k % 3 + 1 plain images of various sizes and suffixes."""
    for klass in range(10):
        (tmp_path / "own" / f"class{klass}").mkdir(parents=True)
        for index in range(klass % 3 + 1):
            image = Image.new("RGB", (30 + klass, 20 + index), colour(klass, index))
            image.save(tmp_path / "own" / f"class{klass}" / f"{index}.{SUFFIXES[(klass + index) % 6]}", quality=100)
    (tmp_path / "own" / "readme.txt").write_text("not a class")
    (tmp_path / "own" / ".thumbnails").mkdir()
    (tmp_path / "own" / "class0" / ".hidden.png").write_text("not an image")
    return tmp_path / "own"


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A CSV that puts class 7 in val, 1 and 4 in test and the others in train."""
    split = {7: "val", 1: "test", 4: "test"}
    lines = "".join(f"class{klass},{split.get(klass, 'train')}\n" for klass in reversed(range(10)))
    (tmp_path / "splits.csv").write_text("class,split\n" + lines)
    return tmp_path / "splits.csv"


def names(dataset: Dataset) -> list[tuple[str, ...]]:
    return [getattr(dataset, split).names for split in SPLITS]


def test_images_are_those_of_their_class(root: Path) -> None:
    dataset = folder.load(root, image_size=16)
    for split in SPLITS:
        images = getattr(dataset, split)
        assert images.shape == (3, 16, 16)
        for name, start, count in zip(images.names, images.starts.tolist(), images.counts.tolist(), strict=True):
            klass = int(name.removeprefix("class"))
            assert count == klass % 3 + 1
            for index in range(count):
                expected = torch.tensor(colour(klass, index)).view(3, 1, 1).expand(3, 16, 16)
                torch.testing.assert_close(images.images[start + index].long(), expected, rtol=0, atol=3)


@pytest.mark.parametrize("suffix", ["webp", "bmp", "gif", "tif", "TIFF", "jfif"])
def test_images_of_other_formats_are_not_left_out(root: Path, suffix: str) -> None:
    for klass in range(10):
        kind = {"jfif": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        Image.new("RGB", (20, 20)).save(root / f"class{klass}" / f"x.{suffix}", kind)
    dataset = folder.load(root, image_size=4)
    for images in (dataset.train, dataset.val, dataset.test):
        assert images.counts.tolist() == [int(name[-1]) % 3 + 2 for name in images.names]


def test_other_files_are_passed_over_with_one_warning(root: Path) -> None:
    for name in ("Thumbs.db", "a.heic", "notes.txt", "b.mp4", "c.npy", "d.png.part"):
        (root / "class0" / name).touch()
    (root / "class1" / "nested").mkdir()
    Image.new("RGB", (9, 9)).save(root / "loose.png")
    Image.new("RGB", (9, 9)).save(root / ".hidden.png")
    said = line(str(root), "8 in all", "class0/Thumbs.db, class0/a.heic, class0/b.mp4, class0/c.npy, ", " and 3 more")
    with pytest.warns(UserWarning, match=said) as warned:
        folder.load(root, image_size=4)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=said):  # from the cache too
        folder.load(root, image_size=4)


def test_all_unreadable_images_are_named_at_once(root: Path) -> None:
    os.mkfifo(root / "class9" / "pipe.png")
    for klass in range(7):
        (root / f"class{klass}" / "bad.gif").write_bytes(b"no image")
    with pytest.raises(FewShotError, match=line("8 images cannot be read", "bad.gif is not an image", "and 3 more")):
        folder.load(root, image_size=4)
    for klass in range(7):
        (root / f"class{klass}" / "bad.gif").unlink()
    with pytest.raises(FewShotError, match=line("class9/pipe.png cannot be read (it is a named pipe, not a file)")):
        folder.load(root, image_size=4)


def test_what_fits_no_memory_is_refused_before_it_is_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 4000)  # 16 MB
    assert folder.load(root, image_size=500).train.shape == (3, 500, 500)
    with pytest.raises(FewShotError, match=line("19 images of 3 x 600 x 600 take 0.0 GiB", "lower image_size")):
        folder.load(root, image_size=600)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "5000"}, 5000),
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "6000"}, 6000),
        ("0::/elsewhere\n", {"memory.max": "7000"}, 7000),
        ("2:cpu:/x\n4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "8000"}, 8000),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("2:cpu:/\n", {"memory.max": "10"}, None),
        (None, {}, None),
    ],
)
def test_a_container_has_less_memory(
    tmp_path: Path, groups: str | None, limits: dict[str, str], expected: int | None
) -> None:
    for name, text in limits.items():
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(text + "\n")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_limit(tmp_path) == (expected or physical)


@pytest.fixture
def divided(root: Path) -> Path:
    """The same classes below train, val and test."""
    for split, classes in (("train", (0, 1, 2, 3, 9)), ("val", (4, 5)), ("test", (6, 7, 8))):
        (root.parent / "divided" / split).mkdir(parents=True)
        for klass in classes:
            (root / f"class{klass}").rename(root.parent / "divided" / split / f"class{klass}")
    return root.parent / "divided"


def test_folders_of_splits_divide_the_classes(divided: Path) -> None:
    dataset = folder.load(divided, image_size=4, seed=3)
    expected = [tuple(f"class{klass}" for klass in part) for part in ((0, 1, 2, 3, 9), (4, 5), (6, 7, 8))]
    assert names(dataset) == expected
    assert dataset.test.counts.tolist() == [1, 2, 3]
    assert dataset.val.images[0, :, 0, 0].tolist() == pytest.approx(colour(4, 0), abs=3)
    (divided / "train" / "loose.png").touch()
    with pytest.warns(UserWarning, match=line("1 in all", "train/loose.png")):
        folder.load(divided, image_size=4)


def test_folders_of_splits_that_are_not_as_expected(divided: Path, splits: Path) -> None:
    with pytest.raises(FewShotError, match=line("split_csv is given", "folders train, val and test")):
        folder.load(divided, split_csv=splits)
    (divided / "val" / "class4").rename(divided / "val" / "class9")
    with pytest.raises(FewShotError, match=line(str(divided), "class 'class9' is in both train and val")):
        folder.load(divided)
    for name in ("class5", "class9"):
        (divided / "val" / name).rename(divided / "test" / f"other{name}")
    with pytest.raises(FewShotError, match=line("train 5, val 0, test 5 classes")):
        folder.load(divided)


def test_classes_may_be_called_as_the_splits_are(tmp_path: Path, own_cache: Path) -> None:
    for name in SPLITS:
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "own" / name / "x.png")
    assert sorted(sum(names(folder.load(tmp_path / "own", image_size=4, fractions=(0.34, 0.33, 0.33))), ())) == sorted(
        SPLITS
    )


def test_images_are_squashed_and_antialiased(tmp_path: Path, own_cache: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, ::2] = 255
    for klass in "abcde":
        (tmp_path / "own" / klass).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "own" / klass / "x.png")
    dataset = folder.load(tmp_path / "own", image_size=10, channels=1)
    assert dataset.train.images.shape == (3, 1, 10, 10)
    image = dataset.train.images[0, 0].numpy().astype(int)
    np.testing.assert_allclose(image[:4], 127, atol=15)
    np.testing.assert_allclose(image[6:], 0, atol=2)


def test_classes_are_divided_by_fractions_and_seed(root: Path) -> None:
    first, again, other = (names(folder.load(root, image_size=4, seed=seed)) for seed in (0, 0, 1))
    assert [len(part) for part in first] == [6, 2, 2]
    assert sorted(sum(first, ())) == [f"class{klass}" for klass in range(10)]
    assert all(list(part) == sorted(part) for part in first)
    assert first == again != other
    thirds = names(folder.load(root, image_size=4, fractions=(0.3, 0.3, 0.4)))
    assert [len(part) for part in thirds] == [3, 3, 4]


def test_the_global_generator_is_left_alone(root: Path) -> None:
    before = torch.get_rng_state()
    folder.load(root, image_size=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prefix", ["", "\ufeff"])
def test_classes_are_divided_by_a_csv(root: Path, splits: Path, prefix: str) -> None:
    splits.write_text(prefix + splits.read_text().replace("\n", " \r\n").replace(",", ", ") + "\n\n", encoding="utf-8")
    expected = [tuple(f"class{klass}" for klass in part) for part in ((0, 2, 3, 5, 6, 8, 9), (7,), (1, 4))]
    assert names(folder.load(root, image_size=4, split_csv=splits)) == expected
    assert names(folder.load(root, image_size=4, split_csv=str(splits))) == expected


def test_the_second_load_is_from_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder.load(root, image_size=4)
    monkeypatch.setattr(folder, "_read", None)
    assert torch.equal(folder.load(root, image_size=4).train.images, first.train.images)


def test_a_cached_copy_of_fewer_formats_is_not_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20)).save(root / "class0" / "new.webp")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "SUFFIXES", (".png", ".jpg", ".jpeg"))
        with pytest.warns(UserWarning, match="class0/new.webp"):
            first = folder.load(root, image_size=4)
    second = folder.load(root, image_size=4)
    assert sum(len(getattr(second, split).images) - len(getattr(first, split).images) for split in SPLITS) == 1


@pytest.mark.parametrize("change", ["content", "new", "size", "channels", "seed", "csv"])
def test_whatever_changes_is_not_from_the_cache(root: Path, splits: Path, change: str) -> None:
    first = folder.load(root, image_size=4)
    settings: dict[str, object] = {"image_size": 4}
    if change == "content":
        for file in root.glob("*/0.*"):
            Image.new("L", (5, 5), 77).save(file)
    elif change == "new":
        for klass in range(10):
            Image.new("L", (5, 5), 77).save(root / f"class{klass}" / "new.png")
    else:
        settings |= {"size": {"image_size": 5}, "channels": {"channels": 1}, "seed": {"seed": 5}}.get(
            change, {"split_csv": splits}
        )
    second = folder.load(root, **settings)
    assert any(not torch.equal(getattr(first, split).images, getattr(second, split).images) for split in SPLITS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 0}, "image_size is 0; expected 1 to 10,000 pixels"),
        ({"image_size": 100_000}, "image_size is 100000; expected 1 to 10,000 pixels"),
        ({"image_size": 84.5}, "image_size is 84.5; expected 1 to 10,000 pixels"),
        ({"image_size": "84"}, "image_size is '84'"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"seed": 0.5}, "seed is 0.5; expected a whole number"),
        ({"fractions": 0.5}, "fractions are 0.5; expected three"),
        ({"fractions": ("a", "b", "c")}, "fractions are ('a', 'b', 'c'); expected three"),
        ({"channels": 2}, "channels is 2; expected 1 (grey) or 3 (RGB)"),
        ({"fractions": (0.5, 0.5, 0.5)}, "fractions are (0.5, 0.5, 0.5)"),
        ({"fractions": (1.0, 0.0, 0.0)}, "three positive shares"),
        ({"fractions": (0.5, 0.5)}, "fractions are (0.5, 0.5)"),
        ({"fractions": (float("nan"), 0.5, 0.5)}, "fractions are (nan"),
        ({"fractions": (0.9, 0.05, 0.05)}, "train 9, val 1, test 0 classes; expected at least one each; add classes"),
    ],
)
def test_bad_settings_are_named(root: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(FewShotError, match=line(said)):
        folder.load(root, **settings)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("class,split\n", "", "line 1 is 'class9,train'; expected the header 'class,split'"),
        ("class,split", "name,split", "line 1 is 'name,split'"),
        ("class9,train", "class10,train", "line 2: there is no class folder 'class10'"),
        ("class8,train", "class9,train", "line 3 repeats class 'class9'"),
        ("class8,train", "class8,training", "line 3: split 'training' is unknown; expected train, val, test"),
        ("class8,train", "class8", "line 3 has 1 fields"),
        ("class8,train", "class8,train,3", "line 3 has 3 fields"),
        ("class8,train\n", "", "does not list class8"),
        ("class7,val", "class7,train", "gives splits of train 8, val 0, test 2 classes"),
        ("class7,val", 'class7,"val', "line"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(root: Path, splits: Path, old: str, new: str, said: str) -> None:
    splits.write_text(splits.read_text().replace(old, new))
    with pytest.raises(FewShotError, match=line(str(splits), said)):
        folder.load(root, split_csv=splits)


@pytest.mark.parametrize(
    "content", ["class,split\n" + "a" * 10**7, "class,split\n\0,train\n", '"' * 10**6, "\0" * 1000]
)
def test_a_monstrous_csv_is_named(root: Path, splits: Path, content: str) -> None:
    splits.write_text(content)
    with pytest.raises(FewShotError, match=line(str(splits), "expected")) as raised:
        folder.load(root, split_csv=splits)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", None])
def test_what_is_no_csv_is_named(root: Path, splits: Path, content: bytes | None) -> None:
    splits.unlink()
    if content is not None:
        splits.write_bytes(content)
    with pytest.raises(FewShotError, match=line(str(splits), "class,split")):
        folder.load(root, split_csv=splits)


def test_a_csv_that_is_a_pipe_is_not_waited_for(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(FewShotError, match=line("pipe.csv", "named pipe", "class,split")):
        folder.load(root, split_csv=tmp_path / "pipe.csv")


def test_a_missing_root_is_named(root: Path) -> None:
    with pytest.raises(FewShotError, match=line("no root", "--data-root")):
        folder.load()
    for path in (root / "none", root / "readme.txt"):
        with pytest.raises(FewShotError, match=line(str(path), "not a folder")):
            folder.load(path)


def test_an_empty_root_is_named(root: Path) -> None:
    with pytest.raises(FewShotError, match=line(str(root / "class0"), "has no subfolders")):
        folder.load(root / "class0")


def test_classes_without_images_are_named(root: Path) -> None:
    (root / "class3/nested").mkdir()
    next((root / "class3").glob("0.*")).rename(root / "class3/nested/0.png")
    (root / "empty").mkdir()
    with pytest.raises(FewShotError, match=line(str(root), "without images: class3, empty;", ".jpeg")):
        folder.load(root)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(root: Path, content: bytes | None) -> None:
    file = root / "class3" / "bad.png"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(FewShotError, match=line(str(file), "expected")):
        folder.load(root)


def test_a_truncated_image_is_named(root: Path) -> None:
    file = next((root / "class3").glob("0.*"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FewShotError, match=line(str(file), "cannot be decoded", "expected an undamaged PNG, JPEG")):
        folder.load(root)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_are_made_alike(root: Path, channels: int) -> None:
    file = root / "class3" / "0.png"
    for other in (root / "class3").glob("0.*"):
        other.unlink()
    Image.new("L", (20, 20), 90).save(file)
    dataset = folder.load(root, image_size=4, channels=channels)
    images = next(part for part in (dataset.train, dataset.val, dataset.test) if "class3" in part.names)
    image = images.images[images.starts[images.names.index("class3")]]
    assert image.shape == (channels, 4, 4)
    assert (image == 90).all()


def test_links_that_lead_round_in_circles_are_named(root: Path) -> None:
    (root / "round").symlink_to(root, target_is_directory=True)
    with pytest.raises(FewShotError, match=line(str(root), "classes without images: round")):
        folder.load(root)
    (root / "round").unlink()
    (root / "class3" / "loop.png").symlink_to(root / "class3" / "loop.png")
    with pytest.raises(FewShotError, match=line(str(root / "class3" / "loop.png"), "expected a readable file")):
        folder.load(root)
    (root / "class3" / "loop.png").unlink()
    (root / "loop").symlink_to(root / "loop", target_is_directory=True)
    assert "loop" not in names(folder.load(root, image_size=4))[0]


def test_names_that_are_no_unicode_are_read(root: Path) -> None:
    strange = os.fsdecode(b"class\xff")
    try:
        (root / strange).mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    Image.new("RGB", (20, 20)).save(root / strange / os.fsdecode(b"\xfe.png"))
    for _ in range(2):  # the second time from the cache
        assert strange in [name for part in names(folder.load(root, image_size=4)) for name in part]
    (root / strange / os.fsdecode(b"\xfd.png")).write_bytes(b"")
    with pytest.raises(FewShotError, match="is not an image"):
        folder.load(root, image_size=4)


def test_a_cached_copy_without_names_is_built_anew(root: Path, own_cache: Path) -> None:
    first = folder.load(root, image_size=4)
    (cached,) = (own_cache / "datasets").glob("folder-*/train.safetensors")
    save_file(load_file(cached), cached)
    with pytest.warns(UserWarning, match="is damaged and built anew"):
        second = folder.load(root, image_size=4)
    assert torch.equal(first.train.images, second.train.images)
