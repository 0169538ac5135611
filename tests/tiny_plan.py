"""A plan of four runs of a second or so, its run folders, and records that nobody ran.

Test files import its fixtures.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
from fewshot_asam.cli import reproduce_maml
from fewshot_asam.reproduce import ledger, pages
from fewshot_asam.reproduce.plan import Cell, Plan, cells, read_plan
from fewshot_asam.reproduce.section_results import plan_results
from fewshot_asam.training.config import plain

Records = dict[str, dict[str, Any]]
TINY = """
seeds: [0, 1]
defaults:
  dataset: folder
  image_size: 16
  ways: 3
  queries: 2
  hidden: 4
  iterations: 30
  meta_batch_size: 2
  validate_every: 10
  validate_tasks: 4
  test_tasks: 20
  checkpoint_every: 10
  congruence_tasks: 2
  engine: vmap
tests:
  own: {tasks: 640}
  MAML: {tasks: 40, inner: maml, inner_steps: 3}
  plain: {tasks: 20, inner: maml}
  last: {tasks: 20, weights: last}
rules:
  MAML: {inner: maml, rho: 0.05}
  Agnostic-SAM: {inner: agnostic_sam, rho: 0.05}
claims:
  it is better: [Agnostic-SAM, MAML]
questions:
  is MAML better: [MAML, Agnostic-SAM]
sections:
  Folder 3-way 1-shot:
    note: Mind this.
    published: {MAML: 50, MAML (others): 51, Agnostic-SAM: 52.5, somebody's: 60.5}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of four cells of a second or so."""
    file = tmp_path_factory.mktemp("plans") / "tiny.yaml"
    file.write_text(TINY)
    return file


def words(file: Path, images: Path, folder: Path, *more: object) -> list[str]:
    places = ["--data-root", images, "--results", folder / "results", "--runs", folder / "runs"]
    return list(map(str, [file, *places, *more]))


@pytest.fixture(scope="module")
def done(tiny: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the plan was run without a stop."""
    folder = tmp_path_factory.mktemp("done")
    assert reproduce_maml.main(words(tiny, images, folder)) == 0
    return folder


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return ledger.read_cells(folder / "results" / ledger.FILE)


def invented(cell: Cell, more: dict[str, float]) -> dict[str, Any]:
    """A record of a run whose accuracy is about 0.85, and so much more for some rules or rules of some radius."""
    generator = torch.Generator().manual_seed(zlib.crc32(cell.name.encode()))
    images = cell.config.ways * cell.config.queries
    better = more.get(cell.config.inner, more.get(f"{cell.config.inner} {cell.config.rho}", 0.0))
    tests = []
    for test in cell.tests:
        right = torch.rand(test.tasks, images, generator=generator) < 0.85 + better + 0.01 * cell.config.seed
        packed = ledger.pack(right.float().mean(1), images)
        tests.append(test.adaptation._asdict() | {"tasks": test.tasks, "query_images": images, "right": packed})
    course = {"iteration": [500, 1000], "seconds": [60.0, 120.0], "accuracy": [0.8, 0.9]}
    course |= {"congruence_before": [0.3, 0.4], "congruence_after": [0.2, 0.5]}
    where = {"commit": "abc", "device": "cpu", "threads": 2, "engine": "loop", "versions": {"torch": "2"}}
    head = {"cell": cell.name, "seed": cell.config.seed, "settings": plain(cell.config), "tests": tests}
    where |= {"last_test_accuracy": 0.7, "last_test_ci95": 0.01, "test_tasks": 600}
    return head | where | {"wall_seconds": 120.0, "iterations": 1000, "best_iteration": 1000, "validation": course}


def written(folder: Path, text: str = TINY, name: str = "tiny") -> Plan:
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return read_plan(file)


def all_invented(plan: Plan, more: dict[str, float] | None = None) -> Records:
    return {cell.name: invented(cell, more or {}) for cell in cells([plan])}


def rendered(plan: Plan, found: Records) -> str:
    return pages.render(plan_results([plan], found))[f"{plan.name}.md"]


def overview(plans: list[Plan], found: Records) -> str:
    return pages.render(plan_results(plans, found))["README.md"]


def columns(text: str, start: str) -> list[str]:
    """The cells of the only row that starts so."""
    (row,) = (line for line in text.splitlines() if line.startswith(start))
    return [column.strip() for column in row.strip("|").split(" | ")]


def by_rule(found: Records) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of Agnostic-SAM and of MAML."""
    agnostic, maml = (
        [record for record in found.values() if record["settings"]["inner"] == rule]
        for rule in ("agnostic_sam", "maml")
    )
    return agnostic, maml


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training")]
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert message in error[0]
