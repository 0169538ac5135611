"""Install learn2learn, torchmeta and higher, which the tests compare with, into the running interpreter's environment.

Run it after the package itself: `python scripts/install_peers.py`. What is there already is left alone, so a second
run is quick. They declare dependencies of their own day (torchmeta wants torch below 1.10), so nothing is
installed but what they import and the package does not bring; torchvision is the release that goes with torch 2.13.
learn2learn's source carries C files made for an old Python; they are made anew from its Cython files, which takes a C
compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LEARN2LEARN = "0.2.0"
TORCHMETA = "1.8.0"
HELPERS = {"gym": "0.26.2", "higher": "0.2.1", "ordered-set": "4.1.0", "scipy": "1.15.3", "torchvision": "0.28.0"}
BUILD = """[build-system]
requires = ["setuptools==80.9.0", "cython==0.29.37"]
build-backend = "setuptools.build_meta"
"""


def installed(name: str) -> str | None:
    """The version of a package in this environment, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip(*arguments: str) -> None:
    """Run pip in this environment; ends the script with one line where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
        errors = dict.fromkeys(line for line in lines if "error: " in line.lower()) or dict.fromkeys(lines[-1:])
        sys.exit(f"install_peers: pip {' '.join(arguments)} failed: {'; '.join(errors)}")


def wheels() -> list[str]:
    """The requirements that pip can install as they are and that are not there yet."""
    missing = [f"{name}=={pinned}" for name, pinned in HELPERS.items() if installed(name) is None]
    return missing if installed("torchmeta") == TORCHMETA else [*missing, f"torchmeta=={TORCHMETA}"]


def unpack(archive: Path, folder: Path) -> Path:
    """The folder of learn2learn's source: the package and its `setup.py`, without the stale C files."""
    root = archive.name.removesuffix(".tar.gz")
    wanted = re.compile(rf"{re.escape(root)}/(setup\.py|README\.md|learn2learn/.*(?<!\.c))")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, [member for member in tar if wanted.fullmatch(member.name)], filter="data")
    return folder / root


def use_cython(setup: Path) -> None:
    """Make `setup.py` compile the Cython files, and leave the choice of Cython to `BUILD`."""
    text, found = re.subn(r"^use_cython = .*$", "use_cython = True", setup.read_text("utf-8"), flags=re.MULTILINE)
    text, also_found = re.subn(r"^ *setup_requires=.*\n", "", text, flags=re.MULTILINE)
    if (found, also_found) != (1, 1):
        sys.exit(f"install_peers: learn2learn {LEARN2LEARN}'s setup.py is not the known one; mend use_cython() here")
    setup.write_text(text, "utf-8")
    setup.with_name("pyproject.toml").write_text(BUILD, "utf-8")


def install_learn2learn() -> None:
    """Build learn2learn from its source distribution and install it."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"install_peers: there is no C compiler {compiler}, which learn2learn's build needs; install one")
    name = f"learn2learn=={LEARN2LEARN}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip("download", "--no-deps", "--no-binary", "learn2learn", "--dest", temporary, name)
        source = unpack(folder / f"learn2learn-{LEARN2LEARN}.tar.gz", folder)
        use_cython(source / "setup.py")
        pip("wheel", "--no-deps", "--wheel-dir", temporary, str(source))
        (built,) = folder.glob("learn2learn-*.whl")
        pip("install", "--no-deps", str(built))


def main() -> None:
    """Install what is missing, and say what is there then."""
    if installed("torch") is None:
        sys.exit("install_peers: torch is not installed in this environment; install the package first")
    if missing := wheels():
        pip("install", "--no-deps", *missing)
    if installed("learn2learn") != LEARN2LEARN:
        install_learn2learn()
    print("peers:", ", ".join(f"{name} {installed(name)}" for name in ("learn2learn", "torchmeta", *HELPERS)))


if __name__ == "__main__":
    main()
