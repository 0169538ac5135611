"""Where the package keeps files of its own."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """For decoded and downloaded data and compiled code: `$FEWSHOT_ASAM_CACHE`, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("FEWSHOT_ASAM_CACHE") or pooch.os_cache("fewshot_asam"))
