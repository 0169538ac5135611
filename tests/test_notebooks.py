"""Every notebook runs from top to bottom, and the outputs that it stores are those of its code."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "run_notebooks.py"))
LARGEST = 400_000
"""Bytes of a file."""


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks() -> None:
    assert {path.stem[0] for path in NOTEBOOKS} >= set("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_fresh(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    made_of = notebook.metadata.get("outputs_of")
    assert made_of == SCRIPT["made_of"](notebook), f"run scripts/run_notebooks.py notebooks/{path.name}"
    assert pictures(notebook) >= 3
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_reader_elsewhere_can_install_the_package(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "run_line_magic('pip', 'install" in TransformerManager().transform_cell(first.source)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    assert pictures(SCRIPT["executed"](path)) == pictures(stored)
