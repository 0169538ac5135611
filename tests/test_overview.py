"""The first page of the results, what one seed is called, and the committed pages."""

from __future__ import annotations

from pathlib import Path

from fewshot_asam.reproduce import ledger, pages
from fewshot_asam.reproduce.overview import table_rows
from fewshot_asam.reproduce.plan import cells, read_plan
from fewshot_asam.reproduce.section_results import plan_results
from fewshot_asam.reproduce.verdicts import verdicts
from fewshot_asam.training.evaluation import interval
from test_registration import REGISTERED
from tiny_plan import TINY, all_invented, by_rule, columns, invented, overview, rendered, written

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "experiments").glob("*.yaml"))


def test_superseded_runs_are_apart(tmp_path: Path) -> None:
    """On a page of their own that says so, and never among those that give verdicts."""
    old = written(tmp_path, "superseded: They began elsewhere.\n" + REGISTERED + TINY, "old")
    new = written(tmp_path, REGISTERED + TINY.replace("hidden: 4", "hidden: 8"), "new")
    found = all_invented(old) | all_invented(new)
    plans = plan_results([old, new], found)
    assert {row.plan.plan.name for row in table_rows(plans)} == {"new"}
    assert verdicts(plans).sections.keys() == {("new", "Folder 3-way 1-shot")}
    assert "> **Superseded.** They began elsewhere.\n" in rendered(old, found)
    assert "Superseded" not in rendered(new, found)
    assert "Nothing has been run with the present defaults yet." in overview([old], found)


def test_the_first_page_is_short(tmp_path: Path) -> None:
    """At most ten rows in its one table, however many sections there are; three sentences."""
    sections = "".join(f"  Section {n}:\n    settings: {{hidden: {4 + n}}}\n" for n in range(1, 13))
    plan = written(tmp_path, TINY + sections)
    first = overview([plan], all_invented(plan))
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 10
    answers = first.split("![")[0]
    assert answers.count("\n- **") == 3
    assert len(answers.split()) < 130


def test_the_committed_pages_are_those_of_the_committed_ledger() -> None:
    results = ROOT / "results"
    found = plan_results([read_plan(file) for file in PLANS], ledger.read_cells(results / ledger.FILE))
    expected = pages.render(found)
    assert {path.name: path.read_text(encoding="utf-8") for path in results.glob("*.md")} == expected
    lines = [line for text in expected.values() for line in text.splitlines() if line.startswith("![")]
    assert {line.split("](")[1].rstrip(")") for line in lines} == {path.name for path in results.glob("*.png")}


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    """Its interval is over tasks, and nothing is said of the rules."""
    plan = written(tmp_path, TINY.replace("seeds: [0, 1]", "seeds: [0]"))
    found = all_invented(plan, {"agnostic_sam": 0.1})
    text, first = rendered(plan, found), overview([plan], found)
    _, (maml,) = by_rule(found)
    mean, half_width = interval(ledger.accuracies(maml["tests"][0]))
    assert columns(text, "| MAML | 50.00")[2:4] == [f"{100 * mean:.2f} ± {100 * half_width:.2f}", "70.00 ± 1.00"]
    assert f"MAML reaches {100 * mean:.2f} ± {100 * half_width:.2f} % on Folder 3-way 1-shot ([tiny](tiny.md)" in first
    assert "one seed each" in first
    assert "Not known: no plan is registered." in first
    for word in ("better**", "worse**", "equal within"):
        assert word not in text
    assert "Paired differences" not in text


def test_what_one_seed_would_have_shown(tmp_path: Path) -> None:
    """Agnostic-SAM is better by 10 points in one seed and worse by as many in the other."""
    plan = written(tmp_path)
    found = {c.name: invented(c, {"agnostic_sam": 0.1 if c.config.seed else -0.1}) for c in cells([plan])}
    text = rendered(plan, found)
    assert "of 2 differences within one seed where several seeds show none, 2 have an interval" in text
    assert "Of 2 comparisons over several seeds, 0 have intervals" in text
    text = rendered(plan, all_invented(plan, {"agnostic_sam": 0.1}))
    assert "One seed misleads" not in text
