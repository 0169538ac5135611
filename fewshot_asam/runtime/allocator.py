"""Memory: the C library's allocator, told to keep what it was given, and how much was used."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks of any size for the next allocation.

    By default each large activation goes back to the kernel and is faulted in again page by page, which costs an eager
    84x84 task about a third of its time on a CPU. Where the C library is another one, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: by PyTorch on a GPU, else by this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
