"""Archives, images and downloads: what is read is right, and what cannot be read is named in one line."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageOps

from fewshot_asam.data import archives
from fewshot_asam.data.archives import (
    decode_image,
    fetch,
    list_tree,
    locate,
    open_zip,
    read_file,
    read_member,
    read_tar,
)
from fewshot_asam.errors import FewShotError
from test_files import make


def line(*parts: str) -> str:
    """A pattern for `pytest.raises`: one line that holds all of `parts`."""
    return r"\A" + "".join(rf"(?=.*{re.escape(part)})" for part in parts) + r".*\Z"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a web server on this machine that serves a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def encode(pixels: np.ndarray, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.fixture
def photo() -> np.ndarray:
    """A smooth uint8 `[40, 60, 3]` image whose corners differ."""
    rows, columns = np.mgrid[0:40, 0:60]
    return np.stack([rows * 6, columns * 4, 255 - rows * 3 - columns * 2], -1).astype(np.uint8)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/first.txt", b"first " * 100)
        file.writestr("a/second.bin", np.random.default_rng(0).bytes(5000))
    return path


def test_locate_looks_in_the_root_first_and_then_in_its_subfolders(tmp_path: Path) -> None:
    for name in ("sub/a.zip", "sub/b.zip", "b.zip", "other/c/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert locate(tmp_path, ["a.zip", "b.zip"], ["sub"]) == tmp_path / "b.zip"
    assert locate(tmp_path, ["a.zip"], ["none", "sub"]) == tmp_path / "sub/a.zip"
    assert locate(tmp_path, ["c.zip", "c"], ["sub", "other"]) == tmp_path / "other/c"
    assert locate(tmp_path, ["a.zip"]) is None
    assert locate(tmp_path / "none", ["a.zip"], ["sub"]) is None


def test_members_are_read(archive: Path) -> None:
    with open_zip(archive) as opened:
        assert read_member(opened, "a/first.txt") == b"first " * 100
        assert len(read_member(opened, "a/second.bin")) == 5000


def test_a_member_that_is_not_there_is_named(archive: Path) -> None:
    with open_zip(archive) as opened, pytest.raises(FewShotError, match=line(str(archive), "a/third.txt")):
        read_member(opened, "a/third.txt")


def test_a_strange_name_costs_one_line_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a\nb", b"content")
    for name in ("a\nb", "c\nd"):
        with open_zip(tmp_path / "some.zip") as file, pytest.raises(FewShotError, match=line(repr(name))):
            read_member(file, name)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_what_is_no_zip_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FewShotError, match=line(str(path), "expected a complete zip archive")), open_zip(path):
        pass


def test_a_zip_cut_short_anywhere_is_named(archive: Path) -> None:
    whole = archive.read_bytes()
    for length in range(0, len(whole), 97):
        archive.write_bytes(whole[:length])
        with pytest.raises(FewShotError, match=line(str(archive), "complete zip archive")), open_zip(archive):
            pass


def test_a_zip_cut_short_while_open_is_named(archive: Path) -> None:
    with open_zip(archive) as opened:
        archive.write_bytes(archive.read_bytes()[:1000])
        with pytest.raises(FewShotError, match=line(str(archive), "a/second.bin", "undamaged")):
            read_member(opened, "a/second.bin")


def test_any_flipped_byte_is_noticed_or_harmless(archive: Path) -> None:
    """A flipped byte never surfaces as another exception nor as other content."""
    whole = archive.read_bytes()
    with open_zip(archive) as opened:
        content = {name: read_member(opened, name) for name in opened.namelist()}
    positions = [*range(100), *range(100, len(whole) - 300, 101), *range(len(whole) - 300, len(whole))]
    noticed = []
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        archive.write_bytes(damaged)
        try:
            with open_zip(archive) as opened:
                assert all(read_member(opened, name) == data for name, data in content.items())
        except FewShotError as error:
            noticed.append(str(error))
    assert all(re.search(line(str(archive)), message) for message in noticed)
    assert len(noticed) > len(positions) // 2


def test_grey_and_colour_are_decoded_channels_first(photo: np.ndarray) -> None:
    colour = decode_image(encode(photo), "x.png", "RGB", (40, 60))
    assert colour.dtype == np.uint8
    assert colour.flags.c_contiguous
    np.testing.assert_array_equal(colour, photo.transpose(2, 0, 1))
    grey = decode_image(encode(photo), "x.png", "L", (40, 60))
    assert grey.shape == (1, 40, 60)
    np.testing.assert_allclose(grey[0], photo @ [0.299, 0.587, 0.114], atol=1)


def test_resizing_is_height_by_width_and_antialiased() -> None:
    stripes = np.zeros((40, 60), np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(encode(stripes), "x.png", "L", (10, 12))
    assert small.shape == (1, 10, 12)
    np.testing.assert_allclose(small, 127, atol=15)


def test_jpeg_is_turned_upright(photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encode(np.rot90(photo).copy(), "JPEG", quality=95, exif=exif)
    np.testing.assert_allclose(decode_image(stored, "x.jpg", "RGB", (40, 60)), photo.transpose(2, 0, 1), atol=12)


@pytest.mark.parametrize(
    ("kind", "settings", "off"),
    [
        ("PNG", {}, 0),
        ("JPEG", {"quality": 95}, 12),
        ("WEBP", {"lossless": True}, 0),
        ("BMP", {}, 0),
        ("GIF", {}, 40),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
    ],
)
def test_formats(photo: np.ndarray, kind: str, settings: dict[str, object], off: int) -> None:
    decoded = decode_image(encode(photo, kind, **settings), "x", "RGB", (40, 60))
    np.testing.assert_allclose(decoded, photo.transpose(2, 0, 1), atol=off)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    buffer = io.BytesIO()
    first, *rest = (Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue"))
    first.save(buffer, kind, save_all=True, append_images=rest, **({"lossless": True} if kind == "WEBP" else {}))
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8)[:, None, None], (3, 7, 9))
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), "x", "RGB", (7, 9)), red)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "settings"), [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_every_orientation_is_turned_as_pillow_does(
    photo: np.ndarray, kind: str, settings: dict[str, object], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(photo, kind, exif=exif, **settings)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))))
    size = (60, 40) if orientation > 4 else (40, 60)
    np.testing.assert_array_equal(decode_image(stored, "x", "RGB", size), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_damaged_exif_gives_an_image_or_the_one_error(photo: np.ndarray, kind: str) -> None:
    chance, exif, read, messages = np.random.default_rng(0), Image.Exif(), 0, []
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x0128] = 6, "maker", 72.0, 2
    whole = encode(photo, kind, exif=exif)
    start = whole.index(exif.tobytes().removeprefix(b"Exif\0\0")[:8]) if kind != "TIFF" else 0
    stop = len(whole) if kind == "TIFF" else min(len(whole), start + len(exif.tobytes()))
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(chance.integers(1, 4)):
            damaged[chance.integers(start, stop)] = chance.integers(256)
        if kind == "PNG":
            at = damaged.index(b"eXIf")
            length = int.from_bytes(damaged[at - 4 : at], "big")
            damaged[at + 4 + length : at + 8 + length] = struct.pack(">I", zlib.crc32(damaged[at : at + 4 + length]))
        try:
            read += decode_image(bytes(damaged), "x.bin", "L", (8, 8)).shape == (1, 8, 8)
        except FewShotError as error:
            messages.append(str(error))
    assert all(re.search(line("x.bin", "expected"), message) for message in messages)
    assert read > (100 if kind == "TIFF" else 1000)


def test_transparency_is_laid_over_white() -> None:
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2:5, 2:5, 3] = 255
    expected = np.full((8, 8), 255)
    expected[2:5, 2:5] = 0
    np.testing.assert_array_equal(decode_image(encode(ink), "x.png", "L", (8, 8))[0], expected)
    palette = io.BytesIO()
    indices = Image.fromarray(np.where(expected, 0, 1).astype(np.uint8), "L").convert("P")
    indices.putpalette([9, 9, 9, 0, 0, 0])
    indices.save(palette, "PNG", transparency=b"\x00\xff")
    np.testing.assert_array_equal(decode_image(palette.getvalue(), "x.png", "L", (8, 8))[0], expected)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparency_in_bands_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, mode: Literal["RGB", "L"], kind: str
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 4), np.uint8)).convert(kind)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **({"transparency": bytes(range(256))} if kind == "P" else {}))
    layer = Image.open(buffer).convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert(mode)
    expected = np.asarray(whole.resize((20, 10), Image.Resampling.BILINEAR))
    for rows in (7, 50, 256):
        monkeypatch.setattr(archives, "BAND", rows)
        decoded = decode_image(buffer.getvalue(), "x", mode, (10, 20))
        np.testing.assert_array_equal(decoded, expected[None] if mode == "L" else expected.transpose(2, 0, 1))


def test_sixteen_bit_grey_is_scaled() -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(decode_image(encode(ramp), "x.png", "L", (8, 8))[0], ramp // 256)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.full((8, 8), 70_000, np.int32), "more than 16 bits"),
        (np.full((8, 8), -1, np.int32), "more than 16 bits"),
        (np.full((8, 8), 0.5, np.float32), "fractions"),
    ],
)
def test_grey_of_unknown_range_is_refused(pixels: np.ndarray, said: str) -> None:
    with pytest.raises(FewShotError, match=line("x.tif", said, "expected")):
        decode_image(encode(pixels, "TIFF"), "x.tif", "L", (8, 8))


def test_the_number_of_pixels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(np.zeros((100, 100), np.uint8))
    warnings.simplefilter("ignore")  # as on the command line, where Pillow's warning would be one line among others
    for limit in (9_000, 1_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(FewShotError, match=line("x.png", "10000 pixels")):
            decode_image(data, "x.png", "L", (8, 8))


def write_zip_bomb(path: Path, claimed: int) -> None:
    """An archive of 4 MB whose member `x.png` inflates to 4 GB, whatever size it claims."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    megabyte = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.png", megabyte * 4000 + packer.flush())
        archive.filelist[0].compress_type = zipfile.ZIP_DEFLATED
        archive.filelist[0].file_size = claimed


def write_png(path: Path, width: int, height: int, content: bytes) -> None:
    """Well-formed grey PNG of that size, whatever it holds."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(content))]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


LIMITED = """
import resource, sys
from pathlib import Path
from fewshot_asam.data.archives import decode_image, open_zip, read_member
from fewshot_asam.errors import FewShotError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
path = Path(sys.argv[1])
try:
    if path.suffix == ".png":
        data = path.read_bytes()
    else:
        with open_zip(path) as archive:
            data = read_member(archive, "x.png")
    decode_image(data, path.name, "RGB", (8, 8))
except FewShotError as error:
    print(error)
"""
"""Decodes an image, or the image in an archive, with 200 MB to spare."""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory cannot be limited here")
@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("bomb.zip", lambda path: write_zip_bomb(path, 4000 * 2**20), "member x.png has 4,194,304,000 bytes"),
        ("liar.zip", lambda path: write_zip_bomb(path, 10), "member x.png cannot be read"),
        ("huge.png", lambda path: write_png(path, 60_000, 60_000, bytes(1000)), "huge.png cannot be decoded"),
        ("high.png", lambda path: write_png(path, 1, 80_000_000, bytes(160_000_000)), "1 x 80000000 pixels"),
        ("wide.png", lambda path: write_png(path, 80_000_000, 1, bytes(80_000_001)), "80000000 x 1 pixels"),
    ],
)
def test_what_inflates_is_refused_in_little_memory(
    tmp_path: Path, name: str, write: Callable[[Path], None], said: str
) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 5_000_000
    command = [sys.executable, "-c", LIMITED, str(tmp_path / name)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(line(said, "expected"), done.stdout.strip())


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_without_bounds_is_refused(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "some.zip", "w", method) as file:
        file.writestr("x.png", bytes(1000))
    with open_zip(tmp_path / "some.zip") as file, pytest.raises(FewShotError, match=line("x.png", f"method {method};")):
        read_member(file, "x.png")


def test_a_link_in_an_archive_leads_nowhere(tmp_path: Path, photo: np.ndarray) -> None:
    (tmp_path / "target.png").write_bytes(encode(photo))
    link = zipfile.ZipInfo("x.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as file:
        file.writestr(link, str(tmp_path / "target.png"))
    with open_zip(tmp_path / "some.zip") as file, pytest.raises(FewShotError, match=line("x.png is not an image")):
        decode_image(read_member(file, "x.png"), "x.png", "RGB", (8, 8))


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png"])
def test_a_member_is_read_and_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with zipfile.ZipFile("some.zip", "w") as file:
        file.writestr(name, b"content")
    with open_zip(Path("some.zip")) as file:
        assert read_member(file, name) == b"content"
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "some.zip"]


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(FewShotError, match=line("some/x.png", "expected an undamaged PNG, JPEG")):
        decode_image(data, "some/x.png", "L", (8, 8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_image_raises_nothing_else(photo: np.ndarray, kind: str) -> None:
    """Any cut and any flipped byte gives an image or the one error; a cut through the pixels gives the error."""
    whole = encode(photo, kind)
    messages = []
    for position in range(0, len(whole), 2):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        for data in (bytes(flipped), whole[:position]):
            try:
                assert decode_image(data, "x.bin", "RGB", (8, 8)).shape == (3, 8, 8)
            except FewShotError as error:
                messages.append(str(error))
    assert all(re.search(line("x.bin", "expected"), message) for message in messages)
    with pytest.raises(FewShotError, match=line("x.bin", "runcated")):
        decode_image(whole[: -len(whole) // 3], "x.bin", "RGB", (8, 8))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


MEMBERS = {"x/a": os.urandom(50_000), "./x/b": b"second", "x/c": os.urandom(10_000)}


def test_members_of_a_tar_are_read_and_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "some.tar.gz", {**MEMBERS, "../out": b"out"})
    assert read_tar(tmp_path / "some.tar.gz", ("x/a", "x/b"), 10**6) == {"x/a": MEMBERS["x/a"], "x/b": b"second"}
    assert [path.name for path in tmp_path.rglob("*")] == ["some.tar.gz"]
    with pytest.raises(FewShotError, match=line("some.tar.gz has no member x/d")):
        read_tar(tmp_path / "some.tar.gz", ("x/a", "x/d"), 10**6)


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.tar.gz"
    write_tar(path, MEMBERS)
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[:200], whole[:-4], whole[:9000] + b"?" + whole[9001:]):
        path.write_bytes(damaged)
        with pytest.raises(FewShotError, match=line("some.tar.gz", "fetch it again")):
            read_tar(path, ("x/a",), 10**6)


def test_a_tar_that_is_damaged_anywhere_raises_nothing_else(tmp_path: Path) -> None:
    """Bytes of the tar itself are changed under a right CRC."""
    chance, messages = np.random.default_rng(0), []
    write_tar(tmp_path / "some.tar.gz", {"x/a": bytes(2000), "x/b": b"second"})
    whole = gzip.decompress((tmp_path / "some.tar.gz").read_bytes())
    for _ in range(500):
        damaged = bytearray(whole[: chance.integers(512, 5000)])
        for _ in range(chance.integers(1, 4)):
            damaged[chance.integers(len(damaged))] = chance.integers(256)
        (tmp_path / "some.tar.gz").write_bytes(gzip.compress(bytes(damaged), 1))
        try:
            read_tar(tmp_path / "some.tar.gz", ("x/a", "x/b"), 10**6)
        except FewShotError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(re.search(line("some.tar.gz", "expected"), message) for message in messages)


@pytest.mark.parametrize("kind", ["content", "header", "sparse", "link"])
def test_a_tar_does_not_inflate(tmp_path: Path, kind: str) -> None:
    """A member, a header of a header and a hole of a gigabyte, and a link to a file outside."""
    (tmp_path / "secret").write_text("secret")
    info = tarfile.TarInfo("x/a")
    info.size = 2**30
    if kind == "header":
        info.type = tarfile.XHDTYPE
    elif kind == "link":
        info.type, info.linkname, info.size = tarfile.SYMTYPE, str(tmp_path / "secret"), 0
    elif kind == "sparse":
        info.pax_headers = {"GNU.sparse.map": "", "GNU.sparse.size": str(2**40), "GNU.sparse.major": "0"}
        info.size = 0
    with gzip.open(tmp_path / "some.tar.gz", "wb", 1) as file:
        file.write(info.tobuf(tarfile.PAX_FORMAT))
        for _ in range(info.size // 2**20):
            file.write(bytes(2**20))
        file.write(bytes(2**14))
    tracemalloc.start()
    with pytest.raises(FewShotError, match=line("some.tar.gz", "expected")):
        read_tar(tmp_path / "some.tar.gz", ("x/a",), 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_trees_are_listed_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a/3.png", "a/.3.png", ".c/4.png", "a/d/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    listed = list_tree(tmp_path, "*/*.png")
    assert list(listed) == ["a/3.png", "b/1.png", "b/2.png"]
    assert listed["a/3.png"][0] == 7
    assert read_file(tmp_path / "a/3.png") == b"a/3.png"
    (tmp_path / "a/3.png").write_bytes(b"changed")
    assert list_tree(tmp_path, "*/*.png") != listed


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FewShotError, match=line(str(tmp_path / "none.png"), "expected")):
        read_file(tmp_path / "none.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").symlink_to(tmp_path / "none.png")
    with pytest.raises(FewShotError, match=line(str(tmp_path / "a/x.png"), "expected")):
        list_tree(tmp_path, "*/*")


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path / "x", kind)
    with pytest.raises(FewShotError, match=line(str(path), kind)):
        read_file(path)
    with pytest.raises(FewShotError, match=line(str(path), kind)), open_zip(path):
        pass


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FewShotError, match=line("sparse.png", "more than 100,000,000 bytes")):
        read_file(tmp_path / "sparse.png")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A served file's address and its hash."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/data.bin").write_bytes(b"data " * 1000)
    with serve(tmp_path / "site") as address:
        yield f"{address}/data.bin", f"md5:{hashlib.md5(b'data ' * 1000).hexdigest()}"


def test_a_download_is_kept(own_cache: Path, site: tuple[str, str], tmp_path: Path) -> None:
    path = fetch(*site, "kept.bin")
    assert path == own_cache / "downloads/kept.bin"
    assert path.read_bytes() == b"data " * 1000
    (tmp_path / "site/data.bin").unlink()
    assert fetch(*site, "kept.bin") == path


def test_a_damaged_download_is_fetched_anew(own_cache: Path, site: tuple[str, str]) -> None:
    fetch(*site, "kept.bin").write_bytes(b"damaged")
    assert fetch(*site, "kept.bin").read_bytes() == b"data " * 1000


def test_a_download_may_have_no_published_hash(own_cache: Path, site: tuple[str, str]) -> None:
    assert fetch(site[0], None, "kept.bin").stat().st_size == 5000


def test_another_hash_is_named_and_nothing_kept(own_cache: Path, site: tuple[str, str]) -> None:
    expected = "md5:" + "0" * 32
    with pytest.raises(FewShotError, match=line("kept.bin", site[0], site[1][4:], expected, "--data-root")):
        fetch(site[0], expected, "kept.bin")
    assert list((own_cache / "downloads").iterdir()) == []


def test_a_missing_page_is_named(own_cache: Path, site: tuple[str, str]) -> None:
    with pytest.raises(FewShotError, match=line("kept.bin", f"{site[0]}.none", "404", site[1], "--data-root")):
        fetch(f"{site[0]}.none", site[1], "kept.bin")


def test_a_refused_connection_is_named(own_cache: Path, tmp_path: Path) -> None:
    with serve(tmp_path) as address:
        pass
    with pytest.raises(FewShotError, match=line("kept.bin", address, "md5:12", "--data-root")):
        fetch(f"{address}/data.bin", "md5:12", "kept.bin")


def test_a_cache_folder_that_cannot_be_made_is_named(own_cache: Path, site: tuple[str, str]) -> None:
    own_cache.write_text("a file")
    with pytest.raises(FewShotError, match=line("kept.bin", str(own_cache))):
        fetch(*site, "kept.bin")
