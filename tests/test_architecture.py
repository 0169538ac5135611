"""`ARCHITECTURE.md` says on which floor each file stands, and the files keep to it."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fewshot_asam

PACKAGE = Path(fewshot_asam.__file__).parent
TABLE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")


def names(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


FILES = {names(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def floors() -> dict[str, int]:
    """The floor of each file or folder, by its name in the table."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", TABLE, re.MULTILINE)
    found = [(name, int(floor)) for floor, named in rows for name in re.findall(r"`([^`]+)`", named)]
    assert len(dict(found)) == len(found), "a name stands twice"
    return dict(found)


def entry(file: str) -> str:
    """The name under which a file stands in the table: its own, or its folder's."""
    return file if file in floors() else file.partition("/")[0] + "/"


def module_file(module: str) -> str | None:
    """The file of `a.b` within the package; nothing where `b` is a name in `a`."""
    path = "/".join(module.split(".")[1:])
    return next((file for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if file in FILES), None)


def imported(tree: ast.Module) -> set[str]:
    """The package's files that a file imports, wherever the statement stands in it."""
    modules: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            modules += [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [(alias.name, alias.name) for alias in node.names]
    own = (pair for pair in modules if pair[1].split(".")[0] == "fewshot_asam")
    return {file for whole, part in own if (file := module_file(whole) or module_file(part))}


GRAPH = {file: imported(tree) - {file} for file, tree in FILES.items()}


def test_every_file_has_a_floor_and_every_name_a_file() -> None:
    assert {entry(file) for file in FILES} == floors().keys()


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_floors_below_it(file: str) -> None:
    """A folder is one room, in which there are no circles either."""
    for other in GRAPH[file]:
        same_room = "/" in file and file.partition("/")[0] == other.partition("/")[0]
        assert same_room or floors()[entry(other)] < floors()[entry(file)], f"{file} imports {other}"


def test_there_are_no_circles() -> None:
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(FILES)
    assert GRAPH["learners.py"] >= {"clones.py", "engine/__init__.py"}, "the graph is that of the package"
    with pytest.raises(CycleError):
        list(TopologicalSorter(GRAPH | {"rules/perturbations.py": {"learners.py"}}).static_order())
