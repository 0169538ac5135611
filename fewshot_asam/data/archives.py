"""Reading archives and images safely: in memory, with every failure named in one line."""

from __future__ import annotations

import glob
import gzip
import io
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pooch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.cache_folder import cache_dir
from fewshot_asam.runtime.files import open_regular

TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""
LARGEST_MEMBER = 100_000_000
"""Bytes of an archive's member or an image: ten times a large photograph."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
LONGEST_SIDE = 65_535
"""Pixels, as in JPEG; Pillow keeps an address and more for each row, whatever its length."""
BAND = 256
"""Rows that are laid over white at once."""
_IMAGE = "an undamaged PNG, JPEG, WebP, BMP, GIF or TIFF"
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF."""


def locate(root: Path, names: Sequence[str], subfolders: Sequence[str] = ()) -> Path | None:
    """The first file or folder that exists of `names` in `root`, then in each of `root/subfolder`; else `None`."""
    for folder in (root, *(root / subfolder for subfolder in subfolders)):
        for name in names:
            if (folder / name).exists():
                return folder / name
    return None


def list_tree(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """The files in `folder` that match a glob pattern, hidden ones left out, with what changes when they do.

    **Returns:** relative name, with forward slashes and sorted, to `(bytes, modification time in ns)`.
    Raises `FewShotError` where a file cannot be looked at.
    """
    names = sorted(name.replace(os.sep, "/") for name in glob.glob(pattern, root_dir=folder))
    try:
        stats = [os.stat(f"{folder}/{name}") for name in names]
    except OSError as error:
        raise FewShotError(f"{error.filename} cannot be read ({_line(error)}); expected a readable file") from error
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)}


def read_file(path: Path, most: int = LARGEST_MEMBER) -> bytes:
    """The bytes of a file. Raises `FewShotError` where it cannot be read or has more than `most`."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, most))
    except OSError as error:
        raise FewShotError(f"{path} cannot be read ({_line(error)}); expected a readable file") from error
    if size > most:
        raise FewShotError(f"{path} has more than {most:,} bytes; expected an image or a table")
    return content


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Within, the zip archive at `path`, opened for reading.

    Raises `FewShotError` where the file is missing, truncated or no zip archive.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open_regular(path))))
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise FewShotError(f"{path} cannot be opened ({_line(error)}); expected a complete zip archive") from error
        yield archive


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of one member of a zip archive, checked against its CRC; safe to call from several threads.

    Raises `FewShotError` where there is no such member, or it is truncated, damaged, encrypted, inflates to more than
    `LARGEST_MEMBER`, or is compressed in a way whose output cannot be bounded.
    """
    shown = name if name.isprintable() else repr(name)
    try:
        member = archive.getinfo(name)
        if member.file_size > LARGEST_MEMBER or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FewShotError(
                f"{archive.filename}: member {shown} has {member.file_size:,} bytes by compression method "
                f"{member.compress_type}; expected at most {LARGEST_MEMBER:,}, stored or deflated"
            )
        with archive.open(member) as file:
            return file.read(member.file_size + 1)  # to its end, but without inflating more than it claims
    except KeyError as error:
        raise FewShotError(f"{archive.filename} has no member {shown}; expected one of that name") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
        raise FewShotError(
            f"{archive.filename}: member {shown} cannot be read ({_line(error)}); "
            "expected an undamaged archive, so fetch it again"
        ) from error


def read_tar(path: Path, names: Collection[str], most: int) -> dict[str, bytes]:
    """The members of those names of a gzipped tar archive, checked against its CRC; no other one is looked at.

    Raises `FewShotError` where one of them is missing, or the archive is truncated, damaged or inflates to more than
    `most` bytes.
    """
    found: dict[str, bytes] = {}
    try:
        with open_regular(path) as file, gzip.GzipFile(fileobj=file) as inflated:
            stream = _Bounded(inflated, most)
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    name = member.name.removeprefix("./")
                    if name in names and member.isreg() and not member.issparse():
                        content = archive.extractfile(member)
                        found[name] = content.read() if content else b""
            while stream.read(2**16):  # to the CRC
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, RecursionError) as error:
        raise FewShotError(
            f"{path} cannot be read ({_line(error)}); expected a complete tar.gz archive, so fetch it again"
        ) from error
    if missing := [name for name in names if name not in found]:
        raise FewShotError(f"{path} has no member {missing[0]}; expected the official archive")
    return found


class _Bounded:
    """A stream that raises once it has given more than `most` bytes, and where it is read on after its end.

    `tarfile` reads on for as many blocks as a header claims.
    """

    def __init__(self, stream: BinaryIO | gzip.GzipFile, most: int) -> None:
        self.stream, self.most, self.given, self.ended = stream, most, 0, False

    def read(self, size: int) -> bytes:
        if self.ended:
            raise EOFError("it ends too early")
        content = self.stream.read(size)
        self.given, self.ended = self.given + len(content), not content
        if self.given > self.most:
            raise OSError(f"it inflates to more than {self.most:,} bytes")
        return content


def decode_image(
    data: bytes,
    name: str,
    mode: Literal["L", "RGB"],
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> NDArray[np.uint8]:
    """Decodes one image and resizes it, antialiased and without regard to its aspect ratio.

    It is turned upright as its EXIF data says (damaged EXIF data says nothing), transparency is laid over white, 16-bit
    grey is scaled to 8 bits, and of an animation the first frame is taken.

    **Arguments:**

    - `data`: the bytes of the file.
    - `name`: what an error calls the file.
    - `mode`: `"L"` for one channel, `"RGB"` for three.
    - `size`: `(height, width)` of the result, in pixels.
    - `resample`: Pillow's filter.

    **Returns:** uint8 `[C, H, W]`. Raises `FewShotError` where the data has none of `FORMATS`, is truncated or damaged,
    or decodes to more pixels than Pillow allows, or to a side longer than `LONGEST_SIDE`.
    """
    try:
        with _many_pixels_refused(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) > LONGEST_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, a side of more than {LONGEST_SIDE:,}")
            return squashed(image, mode, size, resample)
    except UnidentifiedImageError as error:
        raise FewShotError(f"{name} is not an image; expected {_IMAGE}") from error
    except Exception as error:  # of any kind: Pillow's readers unpack whatever a damaged file holds
        raise FewShotError(f"{name} cannot be decoded ({_line(error)}); expected {_IMAGE}") from error


def squashed(
    image: Image.Image, mode: Literal["L", "RGB"], size: tuple[int, int], resample: Image.Resampling
) -> NDArray[np.uint8]:
    """What `decode_image` makes of an image that is open already, uint8 `[C, H, W]`; errors are Pillow's own."""
    height, width = size
    pixels: NDArray[np.uint8] = np.array(_converted(_upright(image), mode).resize((width, height), resample))
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def fetch(url: str, known_hash: str | None, filename: str) -> Path:
    """The file behind `url`, downloaded with a progress bar to `cache_dir()/downloads` unless it is already there.

    **Arguments:**

    - `url`: an `http` or `https` address.
    - `known_hash`: the published hash, as `"md5:<hex>"` or `"sha256:<hex>"`; `None` where none is published.
    - `filename`: the name to keep the file under.

    **Returns:** its path. Raises `FewShotError` where the download fails or its hash is another.
    """
    expected = known_hash or "not published"
    try:
        path: str = pooch.retrieve(
            url,
            known_hash,
            fname=filename,
            path=cache_dir() / "downloads",
            downloader=pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT),
        )
    except (OSError, ValueError) as error:
        raise FewShotError(
            f"{filename} could not be downloaded from {url} ({_line(error)}); expected hash {expected}; "
            "get the file by other means and name its folder with --data-root"
        ) from error
    return Path(path)


@contextmanager
def _many_pixels_refused() -> Iterator[None]:
    """Within, Pillow raises at its limit instead of only at twice that, and warns of nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = None
    if "exif" in image.info:  # Pillow turns TIFFs itself
        with suppress(Exception):
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image as grey or RGB, laid over white band by band, as a large one would else be there four times."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("grey values of more than 16 bits")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("grey values that are fractions")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image if image.mode == mode else image.convert(mode)
    whole = Image.new(mode, image.size)
    for top in range(0, image.height, BAND):
        layer = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        whole.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert(mode), (0, top))
    return whole


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
