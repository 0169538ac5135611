"""Code, wheels and data travel in parcels, arrive whole, and come in any number of goes."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import gpu_parcels

LIMIT = 100


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, Path]]:
    """A file larger than two parcels, an empty one, small ones, and a wheel."""
    folder = tmp_path / "given"
    folder.mkdir()
    contents = {"a": bytes(range(250)), "b": b"", "c/d": b"small", "e": bytes(LIMIT)}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x-1-py3-none-any.whl", "w") as archive:
        archive.writestr("x/__init__.py", "ANSWER = 42\n")
    return [*gpu_parcels.data(folder), ("wheels/x-1-py3-none-any.whl", tmp_path / "x-1-py3-none-any.whl")]


def test_everything_arrives(files: list[tuple[str, Path]], tmp_path: Path) -> None:
    manifest = gpu_parcels.pack(files, tmp_path / "out", LIMIT)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("parcel-*"))]
    assert len(sizes) == len(manifest["parcels"]) > 4
    assert max(sizes) == LIMIT
    gpu_parcels.main(["unpack", str(tmp_path / "out"), str(tmp_path / "there")])
    for name, path in files:
        assert (tmp_path / "there" / name).read_bytes() == path.read_bytes()
    assert (tmp_path / "there" / "site" / "x" / "__init__.py").read_text() == "ANSWER = 42\n"


def test_parcels_come_one_by_one(files: list[tuple[str, Path]], tmp_path: Path) -> None:
    manifest = gpu_parcels.pack(files, tmp_path / "out", LIMIT)
    arrived, there = tmp_path / "arrived", tmp_path / "there"
    arrived.mkdir()
    shutil.copy(tmp_path / "out" / "manifest.json", arrived)
    names = [parcel["name"] for parcel in manifest["parcels"]]
    for name in reversed(names[1:]):
        shutil.copy(tmp_path / "out" / name, arrived)
        with pytest.raises(gpu_parcels.ParcelError, match=f"parcel-001.* of {len(names)} parcels still to come"):
            gpu_parcels.unpack(arrived, there)
        (arrived / name).unlink()
    shutil.copy(tmp_path / "out" / names[0], arrived)
    gpu_parcels.unpack(arrived, there)
    for name, path in files:
        assert (there / name).read_bytes() == path.read_bytes()


def test_a_damaged_parcel_is_named_and_mended(
    files: list[tuple[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    gpu_parcels.pack(files, out, LIMIT)
    whole = (out / "parcel-002").stat().st_mtime_ns, (out / "parcel-001").stat().st_mtime_ns
    (out / "parcel-002").write_bytes(bytes(LIMIT))
    with pytest.raises(SystemExit, match=r"gpu_parcels: .*parcel-002 is damaged; bring it again"):
        gpu_parcels.main(["unpack", str(out), str(there)])
    gpu_parcels.pack(files, out, LIMIT)
    assert (out / "parcel-001").stat().st_mtime_ns == whole[1], "what was whole is not made again"
    gpu_parcels.main(["unpack", str(out), str(there)])
    assert capsys.readouterr().out.startswith("all there: PYTHONPATH=")


def test_what_changed_on_the_way_is_seen(files: list[tuple[str, Path]], tmp_path: Path) -> None:
    gpu_parcels.pack(files, tmp_path / "out", LIMIT)
    gpu_parcels.unpack(tmp_path / "out", tmp_path / "there")
    (tmp_path / "there" / "data" / "c" / "d").write_bytes(b"other")
    with pytest.raises(gpu_parcels.ParcelError, match="data/c/d differ from what was packed"):
        gpu_parcels.unpack(tmp_path / "out", tmp_path / "there")
    gpu_parcels.unpack(tmp_path / "out", tmp_path / "there")


def test_a_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil").write_bytes(b"x")
    gpu_parcels.pack([("../evil2", tmp_path / "evil")], tmp_path / "out", LIMIT)
    with pytest.raises(gpu_parcels.ParcelError, match="would be written outside"):
        gpu_parcels.unpack(tmp_path / "out", tmp_path / "there")


def test_without_a_manifest_it_says_what_to_bring(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no manifest\.json; bring it with the parcels"):
        gpu_parcels.main(["unpack", str(tmp_path), str(tmp_path / "there")])


def test_the_code_is_what_git_knows() -> None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    names = [name for name, _ in gpu_parcels.code(root)]
    assert {"code/pyproject.toml", "code/fewshot_asam/__init__.py", "code/benchmarks/gpu.py"} <= set(names)
    assert not any(".venv" in name or "__pycache__" in name for name in names)
