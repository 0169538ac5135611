"""Where the package keeps files of its own."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """For decoded and downloaded data and compiled code: `$FEWSHOT_ASAM_CACHE`, or the user's cache folder.

    For a user without a home folder, as in some containers, it is one of temporary files.
    """
    import pooch

    if given := os.environ.get("FEWSHOT_ASAM_CACHE"):
        return Path(given)
    try:
        return Path(pooch.os_cache("fewshot_asam"))
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fewshot_asam-{os.getuid()}"
