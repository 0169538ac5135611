"""The site's table of contents, pictures and figures are those of the repository."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from fewshot_asam import __version__
from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.plan import read_plan
from fewshot_asam.reproduce.section_results import plan_results

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs" / "index.md").read_text("utf-8")
PAGES = [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
RESULTS = (ROOT / "docs" / "results.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_stands_in_the_table_of_contents(page: str) -> None:
    trees = re.findall(r"```\{toctree\}\n(.*?)```", INDEX, re.DOTALL)
    assert sum(tree.splitlines().count(page) for tree in trees) == 1


def test_the_drawing_is_of_the_table() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "architecture_picture.py"))
    drawn = script["picture"](script["floors"]((ROOT / "ARCHITECTURE.md").read_text("utf-8")))
    stored = (ROOT / "docs" / "architecture.svg").read_text("utf-8")
    assert drawn == stored, "run scripts/architecture_picture.py docs/architecture.svg"


def test_the_charts_can_be_drawn_from_the_tables() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "readme_charts.py"))
    datasets = {row[0]: row[1] for row in script["rows"]("results.md", "dataset")}
    assert datasets.keys() == {"Omniglot", "Mini-ImageNet"}
    assert all(f"{figure} % on {dataset}" in README for dataset, figure in datasets.items())
    ratios = [float(row[3].split()[0]) for row in script["rows"]("speed.md", "problem")]
    assert "a sixth to a quarter of learn2learn's time" in README
    assert abs(1 / max(ratios) - 1 / 6) < 0.03
    assert abs(1 / min(ratios) - 1 / 4) < 0.03


def test_the_accuracy_is_that_of_the_ledger() -> None:
    plan = read_plan(ROOT / "experiments" / "omniglot.yaml")
    (found,) = plan_results([plan], ledger.read_cells(ROOT / "results" / ledger.FILE))
    first = found.sections[0]
    assert len(first.runs) == 3
    for rule in first.runs:
        mean, half_width = first.means(rule, first.main_test)[0]
        assert f"{100 * mean:.2f} ± {100 * half_width:.2f}" in RESULTS


def test_files_for_others_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    assert {"run": "make test"} in workflow["jobs"]["test"]["steps"]
