"""The pages: plans and ledger to Markdown, with the figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewshot_asam.reproduce import ledger, overview, overview_figure, plan_page, plots
from fewshot_asam.reproduce.plan import Plan
from fewshot_asam.reproduce.section_results import PlanResults, plan_results
from fewshot_asam.reproduce.verdicts import verdicts
from fewshot_asam.training.checkpoint import write_text


def write_pages(plans: Sequence[Plan], results: Path) -> None:
    """Writes `README.md`, a page for each plan and their figures into the folder that holds the ledger."""
    found = plan_results(plans, ledger.read_cells(results / ledger.FILE))
    results.mkdir(parents=True, exist_ok=True)
    for plan in found:
        plots.draw(plan, results)
    if panels := overview.panels(found):
        plots.save(overview_figure.differences(panels), results / overview.FIGURE)
    for name, text in render(found).items():
        write_text(results / name, text)


def render(plans: Sequence[PlanResults]) -> dict[str, str]:
    """The pages as text, by file name."""
    found = verdicts(plans)
    pages = {f"{one.plan.name}.md": plan_page.render(one, found) for one in plans}
    return {"README.md": overview.render(plans), **pages}
