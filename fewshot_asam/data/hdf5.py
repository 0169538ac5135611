"""Reading HDF5 so that a file gives its own bytes alone: HDF5 itself follows links and references to any other file."""

from __future__ import annotations

import itertools
import math
import zlib
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5z
from numpy.typing import NDArray

from fewshot_asam.errors import FewShotError

LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)
COMPRESSIONS = (h5z.FILTER_DEFLATE, h5z.FILTER_LZF, h5z.FILTER_SZIP)
FILTERS = (*COMPRESSIONS, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)
MOST_CHUNKS = 100_000


def own_member(group: h5py.Group, name: str, kind: type, origin: str) -> Any:
    """The member of a group that is stored in the same file, a group or a dataset; `origin` is what an error calls it.

    Raises `FewShotError` where it is a link to elsewhere or of another kind, and `KeyError` where there is none.
    """
    link = group.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise FewShotError(f"{origin} is a {type(link).__name__}; expected data in the file itself")
    member = group[name]
    if not isinstance(member, kind):
        raise FewShotError(f"{origin} is a {type(member).__name__}; expected a group datasets of one dataset a class")
    return member


def read_bytes(stored: h5py.Dataset, shape: tuple[int, ...], origin: str) -> NDArray[np.uint8]:
    """The content of a dataset of that shape and of uint8; `origin` is what an error calls it.

    Raises `FewShotError` where it is of another kind, kept in another file, compressed by a filter that does not come
    with HDF5, or larger than it claims once decompressed.
    """
    plist = stored.id.get_create_plist()
    if plist.get_layout() not in LAYOUTS or plist.get_external_count():
        raise FewShotError(f"{origin} lies in other files; expected data in the file itself")
    if stored.dtype != np.uint8 or stored.shape != shape:
        raise FewShotError(f"{origin} is {stored.dtype} {list(stored.shape or ())}; expected uint8 {list(shape)}")
    _check_filters(stored, [plist.get_filter(index)[0] for index in range(plist.get_nfilters())], origin)
    content: NDArray[np.uint8] = stored[()]
    return content


def _check_filters(stored: h5py.Dataset, filters: list[int], origin: str) -> None:
    if not set(filters) <= set(FILTERS) or sum(number in COMPRESSIONS for number in filters) > 1:
        raise FewShotError(
            f"{origin} has the filters {filters}; expected one of gzip, lzf and szip at most, and shuffle"
        )
    if stored.chunks is None:
        return
    largest = math.prod(stored.chunks)
    corners = [range(0, size, chunk) for size, chunk in zip(stored.shape, stored.chunks, strict=True)]
    if largest > stored.size or math.prod(map(len, corners)) > MOST_CHUNKS:
        raise FewShotError(
            f"{origin} has chunks of {list(stored.chunks)}; expected at most {MOST_CHUNKS:,}, none larger"
        )
    if h5z.FILTER_DEFLATE in filters:
        for corner in itertools.product(*corners):
            mask, content = stored.id.read_direct_chunk(corner)
            skipped = mask >> filters.index(h5z.FILTER_DEFLATE) & 1
            if not skipped and _inflates_beyond(content, largest):
                raise FewShotError(f"{origin} inflates to more than its chunks hold; expected an undamaged file")


def _inflates_beyond(content: bytes, largest: int) -> bool:
    """Whether HDF5, which inflates to the end, would make more bytes of this than `largest` and a checksum's four."""
    return len(zlib.decompressobj().decompress(content, largest + 5)) > largest + 4
