"""Where the package keeps files of its own, and paths as people write them."""

import os
from pathlib import Path

from fewshot_asam.errors import FewShotError


def cache_dir() -> Path:
    """For decoded and downloaded data and compiled code: `$FEWSHOT_ASAM_CACHE`, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("FEWSHOT_ASAM_CACHE") or pooch.os_cache("fewshot_asam"))


def expanded(path: Path) -> Path:
    """The path with a leading `~` or `~user` as that home folder; raises `FewShotError` where there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise FewShotError(f"{path} begins with a home folder that is not known; write it out") from error
