"""The plan of noisy labels: its cells, its page, and the statistics on it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from fewshot_asam.runtime.yaml_settings import read_yaml

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "noisy_labels.py"))
PLAN = ROOT / "experiments" / "supervised" / "noisy_labels.yaml"
RESULTS = ROOT / "results" / "supervised"


def test_holm_is_that_of_a_worked_example() -> None:
    """As R's `p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")` gives it."""
    assert SCRIPT["holm"]([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert SCRIPT["holm"]([0.9, 0.8]) == [1.0, 1.0]


def test_p_is_that_of_a_paired_t_test() -> None:
    """t of 1, 2, 3 is 2 / (1 / sqrt(3)); with two degrees of freedom p is 1 - t / sqrt(2 + t**2)."""
    t = 2 * 3**0.5
    assert SCRIPT["Difference"]("", "", "a", "b", (1.0, 2.0, 3.0)).p == pytest.approx(1 - t / (2 + t * t) ** 0.5)


def test_the_arms_of_a_section_cost_what_the_plan_says() -> None:
    cells = list(SCRIPT["cells"](read_yaml(PLAN, 6), "plan"))
    cost = {
        (section, arm): cell.config.epochs * cell.config.gradients_a_step
        for section, arm, seed, cell in cells
        if seed == 0
    }
    for section in ("80 % label noise", "40 % label noise", "No label noise"):
        assert {cost[section, arm] for arm in ("sam", "friendly_sam", "sgd, 20 epochs", "agnostic_sam, 8 epochs")} == {
            20
        }
        assert (cost[section, "sgd"], cost[section, "agnostic_sam"]) == (10, 25)
    assert all(cell.config.seed == cell.config.noise_seed == seed for _, _, seed, cell in cells)
    halved = {cell.config.rho for section, _, _, cell in cells if section == "80 % label noise"}
    assert halved == {0.05}, "half of the radius of the others"


def test_the_committed_page_is_that_of_the_committed_ledger() -> None:
    assert SCRIPT["page"](PLAN, RESULTS) == (RESULTS / "noisy_labels.md").read_text("utf-8")


def test_a_page_says_what_was_run_and_compares_by_seed(tmp_path: Path) -> None:
    accuracies = {"sgd": (0.30, 0.40, 0.50), "sam": (0.31, 0.42, 0.53), "friendly_sam": (0.3, 0.4)}
    records: list[dict[str, Any]] = []
    for section, arm, seed, cell in SCRIPT["cells"](read_yaml(PLAN, 6), "plan"):
        if section == "80 % label noise" and seed < len(accuracies.get(arm, ())):
            found = {"last_test_accuracy": accuracies[arm][seed], "test_accuracy": 0.25, "gradients": 200, "steps": 100}
            found |= {"device": "cpu", "threads": 1, "commit": "abc", "versions": {"torch": "2"}, "core_seconds": 60.0}
            records.append({"cell": cell.name, "settings": {"epochs": 10}, **found})
    (tmp_path / "noisy_labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = SCRIPT["page"](PLAN, tmp_path)
    assert "8 of 69 trainings" in text
    assert "80 % label noise (10); 40 % label noise (18)" in text
    assert "| sam | 10 | 20 | 3 | 42.00 ± 27.33 | 25.00 ± 0.00 |" in text
    assert "| sam − sgd | equal epochs | 3 | 2.00 ± 2.48 | 0.074 | 0.074 |" in text
    assert "| friendly_sam − sgd | equal epochs | 2 | 0.00 ± 0.00 |" in text
    assert "not all seeds" in text
