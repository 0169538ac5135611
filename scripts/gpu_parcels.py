"""Take this package and its data to a machine without a network, in parcels of a limited size.

    python scripts/gpu_parcels.py pack OUT --data DATA     # here: code, wheels and data as OUT/parcel-001 and so on
    python scripts/gpu_parcels.py unpack OUT WHERE         # there, as often as parcels arrive

`pack` makes `OUT/manifest.json` with the parcels' SHA-256, and makes again only parcels that are missing or damaged.
`unpack` says what is missing, checks every parcel before it writes, and then leaves `WHERE/code`, `WHERE/site` (the
wheels, unpacked: put it on PYTHONPATH beside `WHERE/code`) and `WHERE/data`. It needs nothing but Python itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTES = 60
WHEELS = ("jsonargparse", "docstring-parser", "pooch", "platformdirs")
"""What the package needs beyond PyTorch, NumPy and the like, which a machine with a GPU has."""
MANIFEST = "manifest.json"


class ParcelError(Exception):
    """Something that the user can mend, in one line."""


def digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _old_digest(file)


def _old_digest(file: Any) -> str:
    made = hashlib.sha256()
    while block := file.read(1 << 20):
        made.update(block)
    return made.hexdigest()


def code(root: Path) -> Iterator[tuple[str, Path]]:
    """The files of the repository that git knows or would add, by their names in the parcels."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
    for name in sorted(filter(None, listed.split("\0"))):
        if (root / name).is_file():
            yield f"code/{name}", root / name


def wheels(folder: Path, python: str, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Wheels for another machine's Python, downloaded by pip without what they need in turn."""
    if names:
        target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        target += [
            word
            for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
            for word in ("--platform", f"{tag}_x86_64")
        ]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *target, "-d", str(folder), *names]
        if subprocess.run(command).returncode:
            raise ParcelError(f"pip could not download {' '.join(names)} for Python {python}")
    for path in sorted(folder.glob("*.whl")):
        yield f"wheels/{path.name}", path


def data(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file of the data."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield f"data/{path.relative_to(folder).as_posix()}", path


def pieces(files: Sequence[tuple[str, Path]], limit: int) -> list[list[tuple[str, Path, int, int]]]:
    """Parcels of `(name, file, first byte, bytes)`, each of at most `limit` bytes; a large file is cut."""
    parcels: list[list[tuple[str, Path, int, int]]] = [[]]
    room = limit
    for name, path in files:
        start, size = 0, path.stat().st_size
        while True:
            if room == 0:
                parcels.append([])
                room = limit
            part = min(room, size - start)
            parcels[-1].append((name, path, start, part))
            start, room = start + part, room - part
            if start >= size:
                break
    return parcels


def pack(files: Sequence[tuple[str, Path]], out: Path, limit: int) -> dict[str, Any]:
    """Writes the parcels that are not there yet; returns the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "files": {name: digest(path) for name, path in files},
        "bytes": {name: path.stat().st_size for name, path in files},
        "parcels": [],
    }
    for index, parcel in enumerate(pieces(files, limit)):
        target = out / f"parcel-{index + 1:03d}"
        fresh = target.with_suffix(".new")
        with fresh.open("wb") as sink:
            for _, path, start, size in parcel:
                with path.open("rb") as source:
                    source.seek(start)
                    _copy(source, sink, size)
        entries = [{"name": name, "start": start, "bytes": size} for name, _, start, size in parcel]
        found = digest(fresh)
        if target.exists() and digest(target) == found:
            fresh.unlink()
        else:
            fresh.replace(target)
        manifest["parcels"].append({"name": target.name, "sha256": found, "entries": entries})
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _copy(source: Any, sink: Any, size: int) -> None:
    while size:
        block = source.read(min(size, 1 << 20))
        if not block:
            raise ParcelError("a file became shorter while it was packed; pack again")
        sink.write(block)
        size -= len(block)


def unpack(folder: Path, where: Path) -> None:
    """Writes what the parcels hold; raises `ParcelError` where one is missing or damaged, before it is used.

    Parcels that were unpacked before are remembered in `WHERE/.unpacked`, and may be gone by then.
    """
    manifest = _manifest(folder)
    where.mkdir(parents=True, exist_ok=True)
    log = where / ".unpacked"
    done = set(log.read_text("utf-8").split()) if log.exists() else set()
    missing = []
    for parcel in manifest["parcels"]:
        path = folder / parcel["name"]
        if parcel["sha256"] in done:
            continue
        if not path.exists():
            missing.append(parcel["name"])
            continue
        if digest(path) != parcel["sha256"]:
            raise ParcelError(f"{path} is damaged; bring it again")
        with path.open("rb") as source:
            for entry in parcel["entries"]:
                _write(source, _inside(where, entry["name"]), entry["start"], entry["bytes"])
        with log.open("a", encoding="utf-8") as file:
            file.write(parcel["sha256"] + "\n")
    if missing:
        raise ParcelError(f"{', '.join(missing)} of {len(manifest['parcels'])} parcels still to come")
    for name, size in manifest["bytes"].items():
        with _inside(where, name).open("r+b") as file:
            file.truncate(size)  # where an older and longer one was there
    wrong = [name for name, known in manifest["files"].items() if digest(_inside(where, name)) != known]
    if wrong:
        log.unlink()
        raise ParcelError(f"{', '.join(wrong[:3])} differ from what was packed; unpack all parcels again")
    for wheel in sorted((where / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(where / "site")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        raise ParcelError(f"{folder} has no {MANIFEST}; bring it with the parcels") from None
    return found


def _inside(where: Path, name: str) -> Path:
    """A file's place; a name that leads out of the folder is refused."""
    path = (where / name).resolve()
    if not path.is_relative_to(where.resolve()):
        raise ParcelError(f"{name} would be written outside {where}")
    return path


def _write(source: Any, path: Path, start: int, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "wb") as sink:
        sink.seek(start)
        _copy(source, sink, size)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make the parcels")
    packing.add_argument("out", type=Path)
    packing.add_argument("--data", type=Path, help="folder of the datasets' files")
    packing.add_argument("--python", default="3.12", help="of the other machine (%(default)s)")
    packing.add_argument("--wheels", nargs="*", default=list(WHEELS), help="what to bring (%(default)s)")
    packing.add_argument("--mebibytes", type=float, default=MEBIBYTES, help="of a parcel (%(default)s)")
    unpacking = commands.add_parser("unpack", help="unpack what has arrived")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("where", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.command == "unpack":
            unpack(options.folder, options.where)
            print(f"all there: PYTHONPATH={options.where}/code:{options.where}/site, data in {options.where}/data")
            return
        with tempfile.TemporaryDirectory() as folder:
            given = [*code(ROOT), *wheels(Path(folder), options.python, options.wheels)]
            given += data(options.data) if options.data else []
            manifest = pack(given, options.out, round(options.mebibytes * 2**20))
        print(f"{len(manifest['files'])} files in {len(manifest['parcels'])} parcels in {options.out}")
    except (ParcelError, OSError) as error:
        sys.exit(f"gpu_parcels: {error}")


if __name__ == "__main__":
    main()
