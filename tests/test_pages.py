"""What the pages say of a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats

from fewshot_asam.cli import reproduce_maml
from fewshot_asam.errors import FewShotError
from fewshot_asam.reproduce import ledger, plots
from fewshot_asam.reproduce.plan import cells, read_plan
from fewshot_asam.reproduce.radius_sweeps import radius_sweeps
from fewshot_asam.reproduce.section_results import plan_results
from fewshot_asam.training.evaluation import interval
from tiny_plan import TINY, all_invented, by_rule, columns, invented, overview, rendered, written

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "experiments").glob("*.yaml"))


def means(records: list[dict[str, Any]], index: int, tasks: int | None = None) -> list[float]:
    return [ledger.accuracies(record["tests"][index], tasks).mean().item() for record in records]


def over_seeds(values: list[float]) -> str:
    low, high = stats.t.interval(0.95, len(values) - 1, sum(values) / len(values), stats.sem(values))
    return f"{50 * (low + high):.2f} ± {50 * (high - low):.2f}"


@pytest.mark.parametrize("count", range(5))
def test_a_partial_ledger_renders(tmp_path: Path, count: int) -> None:
    plan = written(tmp_path)
    for record in list(all_invented(plan).values())[:count]:
        ledger.append(tmp_path / ledger.FILE, record)
    assert reproduce_maml.main([str(plan.path), "--render", "--results", str(tmp_path)]) == 0
    page, first = ((tmp_path / name).read_text() for name in ("tiny.md", "README.md"))
    assert page.startswith(f"# Plan `tiny.yaml`: {count} of 4 runs are done\n")
    assert f"[tiny](tiny.md): {count} of 4 runs are done" in first
    assert "This plan is not registered, so it gives no verdicts" in page
    assert ("## Missing" in page) == ("## What was not run" in first) == (count < 4)
    assert "reproduce_maml experiments/tiny.yaml --data-root DATA" in first or count == 4
    pictures = {line.split("](")[1].rstrip(")") for line in (page + first).splitlines() if line.startswith("![")}
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == (0, 1, 1, 1, 2)[count], "the first page's needs two seeds"
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300


def test_a_section_shows_what_the_ledger_does(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = all_invented(plan)
    text = rendered(plan, found)
    _, maml = by_rule(found)
    row = columns(text, "| MAML | 50.00")
    own, three_steps = (over_seeds(means(maml, index)) for index in (0, 1))
    assert row[2] == own
    assert row[3] == "70.00 ± 0.00"
    assert row[-1] == "2"
    assert columns(text, "| MAML | " + own)[1:3] == [own, three_steps]
    each = [interval(ledger.accuracies(record["tests"][0])) for record in maml]
    expected = [f"{100 * mean:.2f} ± {100 * half_width:.2f}" for mean, half_width in each]
    assert columns(text, f"| MAML | {expected[0]}")[1:] == [*expected, over_seeds(means(maml, 0, 600))]
    assert "\n\nMind this.\n\n" in text
    assert columns(text, "| somebody's |")[1] == "60.50"


def test_claims_and_questions(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = all_invented(plan)
    for record in by_rule(found)[0]:
        record["wall_seconds"] *= 2.5
    text = rendered(plan, found)
    agnostic, maml = by_rule(found)
    accuracies = [torch.stack([ledger.accuracies(r["tests"][0]) for r in runs]) for runs in (agnostic, maml)]
    mean, half_width = interval((accuracies[0] - accuracies[1]).mean(0))
    row = columns(text, "| it is better |")
    assert row[2:4] == ["+2.50", f"{100 * mean:.2f} ± {100 * half_width:.2f}"]
    assert row[6:] == ["2", "not registered: no verdict", "× 2.50 ± 0.00"]
    assert columns(text, "| is MAML better |")[2] == "-2.50"
    assert columns(text, "| is MAML better |")[3].startswith(f"{-100 * mean:.2f} ±")


def test_training_and_adapting_are_told_apart(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = all_invented(plan, {"agnostic_sam": 0.05})
    agnostic, maml = by_rule(found)
    own, plain, baseline = (
        sum(means(records, index, 20)) / 2 for records, index in ((agnostic, 0), (agnostic, 2), (maml, 0))
    )
    row = columns(rendered(plan, found), "| Agnostic-SAM | Folder 3-way 1-shot | 1 | 20 |")
    for column, expected in zip(row[4:7], (plain - baseline, own - plain, own - baseline), strict=True):
        assert column.startswith(f"{100 * expected:+.2f} (tasks ±")


def test_congruence_is_that_of_the_best_weights(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = all_invented(plan)
    for record, after in zip(by_rule(found)[0], (0.6, 0.7), strict=True):
        record["best_iteration"] = 500
        record["validation"]["congruence_after"] = [after, 0.1]
    row = columns(rendered(plan, found), "| Agnostic-SAM − MAML | Folder 3-way 1-shot | -0.100")
    assert row[3] == f"0.150 ± {12.706 * 0.05:.3f}"  # 0.65 - 0.5


def test_a_claim_without_runs_or_with_one_seed(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = list(all_invented(plan, {"agnostic_sam": 0.1}).items())
    text = rendered(plan, dict(found[:2]))
    assert columns(text, "| it is better |")[-3:-1] == ["1", "not registered: no verdict"]
    text = rendered(plan, {})
    assert "it is better" not in text
    assert "- Folder 3-way 1-shot, seed 0, 1: MAML; Agnostic-SAM" in text
    first = overview([plan], {})
    assert "Nothing has been run with the present defaults yet." in first
    assert "![" not in first


def test_runs_that_diverged_are_said_beside_the_verdict(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = all_invented(plan)
    agnostic = [name for name, record in found.items() if record["settings"]["inner"] == "agnostic_sam"]
    for name, expected in zip(agnostic, ("1, 1 diverged", "0, 2 diverged"), strict=True):
        found[name] |= {"diverged": "the loss is not finite", "tests": []}
        text = rendered(plan, found)
        row = columns(text, "| it is better |")
        assert [cell for cell in row if "diverged" in cell] == [expected]
        assert "## Missing" not in text


def test_runs_on_a_cpu_are_not_compared_with_those_on_a_gpu(tmp_path: Path) -> None:
    """Their generators draw other tasks."""
    plan = written(tmp_path)
    found = all_invented(plan, {"agnostic_sam": 0.1})
    for record in by_rule(found)[1]:
        record["device"] = "NVIDIA H100"
    text = rendered(plan, found)
    assert "it is better" not in text
    assert "Agnostic-SAM − MAML" not in text


def test_a_run_whose_settings_are_other_than_its_name_says_is_refused(tmp_path: Path) -> None:
    plan = written(tmp_path)
    found = all_invented(plan)
    next(iter(found.values()))["settings"]["clip_grad"] = 3.0
    with pytest.raises(FewShotError, match=r"with clip_grad 3\.0, but the plan or the package's default is None"):
        plan_results([plan], found)
    next(iter(found.values()))["settings"] |= {"clip_grad": None, "checkpoint_every": 3}
    assert not plan_results([plan], found)[0].sections[0].missing


def test_a_test_that_is_added_later_leaves_what_was_found(tmp_path: Path) -> None:
    found = all_invented(written(tmp_path), {"agnostic_sam": 0.1})
    more = written(tmp_path, TINY.replace("rules:", "  more steps: {tasks: 10, inner_steps: 2}\nrules:"))
    text = rendered(more, found)
    assert "0 of 4 runs are done" in text
    assert "| it is better |" in text


def test_the_small_plan_s_page_when_all_is_done() -> None:
    small = read_plan(ROOT / "experiments" / "small.yaml")
    found = {cell.name: invented(cell, {"agnostic_sam 0.05": 0.1}) for cell in cells([small])}
    text = rendered(small, found)
    assert f"{len(found)} of {len(found)} runs are done" in text
    assert "Missing" not in text
    assert "What was not run" not in overview([small], found)
    with_maml = [section for section in small.sections if "MAML" in section.rules]
    assert text.count("| MAML | 0.0005 | augmented copy | 0.400 ± 0.000 | 0.500 ± 0.000 |") == len(with_maml)
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.endswith("| 0.000 ± 0.000 | 20 | 3 |")]
    assert rows.count("| Agnostic-SAM 5e-4 − MAML") == 3
    assert rows.count("| Agnostic-SAM 5e-2, augmented − Agnostic-SAM 5e-2") == 1
    for apart in (
        "5e-2 − MAML",
        "5e-4 − Sharp-MAML_low 1e-3",
        "split − Agnostic-SAM 5e-2",
        "ASAM − Sharp-MAML_low 5e-3",
    ):
        assert not any(row.endswith(apart) for row in rows), f"the cosines of {apart} are not taken alike"
    (sweep,) = plots.sweep_names(small, radius_sweeps(plan_results([small], found)[0].sections)).items()
    assert sweep[0] == "small-radii-1.png"
    radii = {name: sorted(curve) for name, curve in sweep[1].items()}
    assert radii["agnostic_sam"] == [5e-4, 5e-3, 5e-2]
    assert radii["agnostic_sam, augment"] == [5e-2]
    assert radii["sharp_maml_low"] == [5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1]
    assert radii["maml"] == [0.0]
    over = {name: {r: point.over_maml for r, point in curve.items()} for name, curve in sweep[1].items()}
    assert over["maml"] == {0.0: None}
    assert over["agnostic_sam"][5e-2].seeds == 6
    assert over["agnostic_sam"][5e-2].mean == pytest.approx(0.1, abs=0.005)
    assert over["agnostic_sam, augment"][5e-2].mean == pytest.approx(0.1, abs=0.005)
    assert over["agnostic_sam"][5e-4].mean == pytest.approx(0.0, abs=0.005)
    pictures = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {*(plots.curves_name(small, section) for section in small.sections), sweep[0]}
