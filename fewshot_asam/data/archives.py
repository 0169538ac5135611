"""Reading archives and images safely: in memory, with every failure named in one line."""

from __future__ import annotations

import glob
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pooch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fewshot_asam.errors import FewShotError
from fewshot_asam.paths import cache_dir

TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""
LARGEST_MEMBER = 100_000_000
"""Bytes of an archive's member: ten times a large photograph."""


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


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises `FewShotError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FewShotError(f"{path} cannot be read ({_line(error)}); expected a readable file") from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """The zip archive at `path`, opened for reading; the caller closes it.

    Raises `FewShotError` where the file is missing, truncated or no zip archive.
    """
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise FewShotError(f"{path} cannot be opened ({_line(error)}); expected a complete zip archive") from error


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of one member of a zip archive, checked against its CRC; safe to call from several threads.

    Raises `FewShotError` where there is no such member, or it is truncated, damaged, encrypted, inflates to more than
    `LARGEST_MEMBER`, or is compressed in a way whose output cannot be bounded.
    """
    try:
        member = archive.getinfo(name)
        if member.file_size > LARGEST_MEMBER or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FewShotError(
                f"{archive.filename}: member {name} has {member.file_size:,} bytes by compression method "
                f"{member.compress_type}; expected at most {LARGEST_MEMBER:,}, stored or deflated"
            )
        with archive.open(member) as file:
            return file.read(member.file_size + 1)  # to its end, but without inflating more than it claims
    except KeyError as error:
        raise FewShotError(f"{archive.filename} has no member {name}; expected one of that name") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
        raise FewShotError(
            f"{archive.filename}: member {name} cannot be read ({_line(error)}); "
            "expected an undamaged archive, so fetch it again"
        ) from error


def decode_image(
    data: bytes,
    name: str,
    mode: Literal["L", "RGB"],
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> NDArray[np.uint8]:
    """Decodes one PNG or JPEG and resizes it, antialiased and without regard to its aspect ratio.

    It is turned upright as its EXIF data says, transparency is laid over white, 16-bit grey is scaled to 8 bits.

    **Arguments:**

    - `data`: the bytes of the file.
    - `name`: what an error calls the file.
    - `mode`: `"L"` for one channel, `"RGB"` for three.
    - `size`: `(height, width)` of the result, in pixels.
    - `resample`: Pillow's filter.

    **Returns:** uint8 `[C, H, W]`. Raises `FewShotError` where the data is no PNG or JPEG, is truncated or damaged,
    or decodes to more pixels than Pillow allows.
    """
    height, width = size
    try:
        with _many_pixels_refused(), Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            resized = _opaque(upright).convert(mode).resize((width, height), resample)
    except UnidentifiedImageError as error:
        raise FewShotError(f"{name} is not an image; expected an undamaged PNG or JPEG") from error
    except (
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise FewShotError(f"{name} cannot be decoded ({_line(error)}); expected an undamaged PNG or JPEG") from error
    pixels: NDArray[np.uint8] = np.array(resized)
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
    """Within, Pillow raises at its limit instead of only at twice that."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
