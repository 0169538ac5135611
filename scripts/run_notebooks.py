"""Run the notebooks and store them with their outputs, so that a reader of the pages sees the pictures.

python scripts/run_notebooks.py                          # all of notebooks/
python scripts/run_notebooks.py notebooks/1_*.ipynb

A notebook without a cell that installs the package, for Colab, gets one. Each notebook notes which code
and which version of the package its outputs are of; `tests/test_notebooks.py` compares.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from fewshot_asam import __version__

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 600
"""The longest that a cell may take."""

INSTALL = """\
# In Colab, or wherever the package is missing, this installs it: from the clone around this notebook, or by its name.
from importlib.util import find_spec
from pathlib import Path

if find_spec("fewshot_asam") is None:
    source = ".." if Path("../pyproject.toml").exists() else "fewshot_asam"
    %pip install --quiet {source}
"""


def made_of(notebook: Any) -> dict[str, str]:
    """What the outputs depend on: the package's version and a digest of the code cells."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return {"version": __version__, "code": hashlib.sha256(code.encode()).hexdigest()}


def executed(path: Path) -> Any:
    """The notebook of a file with new outputs; raises `CellExecutionError` where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    if not any("%pip install" in cell.source for cell in notebook.cells):
        notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL.rstrip()))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, resources=resources).execute()
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["outputs_of"] = made_of(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """The command."""
    for path in [Path(word) for word in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        print(f"{path} ...", flush=True)
        nbformat.write(executed(path), path)


if __name__ == "__main__":
    main()
