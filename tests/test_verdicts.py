"""Verdicts of registered plans: when there is one, what it is called, and what keeps one from being said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.plan import Plan, read_plan
from fewshot_asam.reproduce.section_results import plan_results
from fewshot_asam.reproduce.verdicts import Verdict, unregistered_runs, verdicts
from test_registration import REGISTERED
from tiny_plan import TINY, Records, all_invented, overview, rendered

CONTROLLED = (REGISTERED + TINY).replace("runs: 4", "runs: 15").replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4]")
CONTROLLED = CONTROLLED.replace(
    "claims:",
    "  current point: {inner: agnostic_sam, rho: 0.05, val_grad_point: current}\ncontrols:\n"
    "  the same: [Agnostic-SAM, current point]\nclaims:",
).replace("questions:\n  is MAML better: [MAML, Agnostic-SAM]\n", "")


def planned(folder: Path, text: str = CONTROLLED) -> Plan:
    (folder / "tiny.yaml").write_text(text)
    return read_plan(folder / "tiny.yaml")


def runs(plan: Plan, shift: float, spread: float = 0.002, control: float = 0.0) -> Records:
    """Records with the plan's stamp, whose accuracies are 85 % and those of Agnostic-SAM more by `shift`.

    A run's own part varies with rule and seed by `spread`; the control's second rule is apart by `control` besides.
    """
    found = all_invented(plan)
    section = plan.sections[0]
    for number, rule in enumerate(section.rules):
        for seed in section.seeds:
            record: dict[str, Any] = found[section.cell(rule, seed).name]
            test, own = record["tests"][0], spread * ((3 * number + 2 * seed) % 5 - 2)
            base = ledger.accuracies(found[section.cell("MAML", 0).name]["tests"][0]) * 0 + 0.85
            more = shift * (rule != "MAML") + control * (rule == "current point") * (1 if seed % 2 else -1)
            wanted = (base.mean() + own + more).item()
            images, tasks = test["query_images"], test["tasks"]
            right = round(wanted * images * tasks)
            counts = base * 0 + right // tasks / images
            counts[: right % tasks] += 1 / images
            test["right"] = ledger.pack(counts, images)
            record["registered"] = [{"plan": "tiny", "digest": plan.digest, "commit": "abc1234"}]
    return found


def verdict(plan: Plan, found: Records) -> Verdict:
    return verdicts(plan_results([plan], found)).pairs["tiny", "Folder 3-way 1-shot", "Agnostic-SAM", "MAML"]


@pytest.mark.parametrize(
    ("shift", "spread", "words"),
    [
        (0.05, 0.002, "better"),
        (-0.05, 0.002, "worse"),
        (0.0, 0.0004, "equal within 0.5 points"),
        (0.004, 0.02, "not decided"),
    ],
)
def test_what_a_verdict_is_called(shift: float, spread: float, words: str, tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = runs(plan, shift, spread)
    assert verdict(plan, found).words == words
    assert f"Of 1 registered comparisons: 1 {words}." in overview([plan], found)


def test_what_a_control_shows_too_is_no_headline(tmp_path: Path) -> None:
    """Better by 5 points, when two equal rules differ by a point or two, and when by up to twelve."""
    plan = planned(tmp_path)
    assert verdict(plan, runs(plan, 0.05, control=0.001)).words == "better"
    found = runs(plan, 0.05, 0.0, 0.0)
    section = plan.sections[0]
    for seed in section.seeds:
        test = found[section.cell("current point", seed).name]["tests"][0]
        lower = (ledger.accuracies(test) - 0.12).clamp(0, 1)
        test["right"] = ledger.pack(lower, test["query_images"])
    assert verdict(plan, found).words == "no more than the control shows"


def test_no_verdict_before_the_registered_number_of_runs(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = runs(plan, 0.05)
    found.pop(plan.sections[0].cell("MAML", 4).name)
    assert verdict(plan, found) == Verdict("unfinished: 14 of 15 runs")
    first = overview([plan], found)
    assert "Not known yet: no registered plan is finished (runs done: [tiny](tiny.md) 14 of 15)." in first
    assert "unfinished: 14 of 15 runs" in first
    assert "**better" not in rendered(plan, found)


def test_no_verdict_of_another_plan_than_the_registered_one(tmp_path: Path) -> None:
    """Whose file said something else when a run was made, or was not committed then."""
    plan = planned(tmp_path)
    for stamp in ({"digest": "0" * 12}, {"commit": "uncommitted"}, {"plan": "other"}):
        found = runs(plan, 0.05)
        record = found[plan.sections[0].cell("MAML", 2).name]
        record["registered"] = [record["registered"][0] | stamp]
        assert verdict(plan, found).words.startswith("made under another plan")
        assert unregistered_runs(*plan_results([plan], found)) == [record["cell"]]
        assert "1 runs were made before the plan was committed" in rendered(plan, found)
    assert "Nothing deviated." in rendered(plan, runs(plan, 0.05))
    noted = planned(tmp_path, CONTROLLED + "deviations: [The machine was changed.]\n")
    assert verdict(noted, runs(plan, 0.05)).words == "better"
    assert "- The machine was changed.\n" in rendered(noted, runs(plan, 0.05))


def test_more_registered_tests_make_each_harder(tmp_path: Path) -> None:
    """Those of other plans that are not finished count, so that a p-value is final."""
    plan = planned(tmp_path)
    found = runs(plan, 0.05)
    (tmp_path / "more.yaml").write_text(CONTROLLED.replace("hidden: 4", "hidden: 8"))
    alone, other = verdict(plan, found), read_plan(tmp_path / "more.yaml")
    both = verdicts(plan_results([plan, other], found))
    assert alone.p is not None
    together = both.pairs["tiny", "Folder 3-way 1-shot", "Agnostic-SAM", "MAML"].p
    assert together == pytest.approx(2 * alone.p, rel=0.35)
    assert both.pairs["more", "Folder 3-way 1-shot", "Agnostic-SAM", "MAML"].words == "unfinished: 0 of 15 runs"


def test_pairs_across_commits_are_marked_and_other_data_not_compared(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = runs(plan, 0.05)
    assert "†" not in "".join(line for line in rendered(plan, found).splitlines() if line.startswith("|"))
    record = found[plan.sections[0].cell("MAML", 2).name]
    record["commit"] = "def"
    assert "| it is better † |" in rendered(plan, found)
    assert "Agnostic-SAM − MAML †" in rendered(plan, found) or "MAML †" in rendered(plan, found)
    for one in found.values():
        one["data"] = {"classes": "a", "images": "b" if one is record else "c"}
    (results,) = plan_results([plan], found)[0].sections
    assert results.complete_seeds == [0, 1, 3, 4]
