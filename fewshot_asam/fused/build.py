"""Compiles the C++ files of this folder with the system's C++ compiler, once a machine, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from fewshot_asam.paths import cache_dir

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("tail.cpp", "first.cpp"))
FLAGS = ("-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fPIC", "-shared")
TUNED = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-fopenmp",),
    (),
)
"""Tried in this order: not every compiler knows every flag."""
SECONDS = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None, with a warning, where they cannot be built or loaded."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"convolutional blocks run unfused, which is slower: {reason}", stacklevel=2)
        return None


def _built() -> Path:
    compiler = os.environ.get("CXX", "c++")
    code = [path.read_bytes() for path in (*SOURCES, HERE / "bands.h")]
    key = hashlib.sha256(repr((code, FLAGS, TUNED, compiler, _processor())).encode()).hexdigest()[:16]
    target = cache_dir() / "fused" / f"blocks-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(compiler, Path(folder) / target.name).replace(target)
    return target


def _compile(compiler: str, target: Path) -> Path:
    failure = subprocess.SubprocessError()
    for flags in TUNED:
        command = [compiler, *FLAGS, *flags, *map(str, SOURCES), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            return target
        except subprocess.CalledProcessError as error:
            failure = subprocess.SubprocessError(f"{compiler} failed: {error.stderr[:200]}")
    raise failure


def _processor() -> str:
    """What `-march=native` depends on, for caches that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
