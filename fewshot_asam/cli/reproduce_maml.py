"""Run plans of experiments into a ledger, or render the ledger as pages.

examples:
  reproduce_maml experiments/omniglot.yaml --data-root DATA                     # what two CPU cores can answer
  reproduce_maml experiments/paper.yaml --data-root DATA --max-minutes 9        # in pieces of nine minutes
  reproduce_maml experiments/*.yaml --render                                    # the pages, from results/ledger.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fewshot_asam.cli.surroundings import importing

with importing():
    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.reproduce.plan import Plan, cells, read_plan
    from fewshot_asam.reproduce.runner import Place, run_queue
    from fewshot_asam.runtime.allocator import keep_freed_memory


@dataclass(frozen=True)
class QueueConfig:
    """Settings of the queue; the docstrings are the command line's help."""

    data_root: Path | None = None
    """folder that holds the datasets' files"""
    results: Path = Path("results")
    """folder of the ledger, the pages and their figures"""
    runs: Path = Path("runs/reproduce")
    """folder of the run folders"""
    test_data_root: Path | None = None
    """folder that holds the files of the datasets that runs are tested on besides their own; data_root if not given"""
    init_from: Path | None = None
    """run, or file of weights, that the plan's forks begin from"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""
    max_minutes: float | None = None
    """stop after so many minutes, everything saved; the same command goes on"""


def _write_pages(plans: Sequence[Plan], results: Path) -> None:
    """Imports what the pages need only now, as running plans does without it."""
    try:
        from fewshot_asam.reproduce.pages import write_pages
    except ImportError as error:
        raise FewShotError(
            f"pages need SciPy and statsmodels ({error}): pip install 'fewshot_asam[reproduce]'"
        ) from error
    write_pages(plans, results)


def command(argv: Sequence[str]) -> None:
    """Parses the arguments, then runs what the ledger lacks or, with `--render`, writes the pages."""
    parser = Parser(prog="reproduce_maml", description=__doc__)
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="YAML files, run in this order")
    parser.add_argument(
        "--render",
        action="store_true",
        help="run nothing; write README.md, a page for each plan and their figures from the ledger",
    )
    add_settings(parser, QueueConfig)
    given: Any = parse(parser, argv)
    settings = QueueConfig(**{field.name: given[field.name] for field in fields(QueueConfig)})
    if settings.max_minutes is not None and not 0 < settings.max_minutes < 1e6:
        raise FewShotError(f"max_minutes is {settings.max_minutes}; expected a number above 0 and below 1e6")
    plans = [read_plan(Path(name)) for name in given.plans]
    if given.render:
        _write_pages(plans, settings.results)
        return
    keep_freed_memory()
    data, others, start = (
        path and path.absolute() for path in (settings.data_root, settings.test_data_root, settings.init_from)
    )
    place = Place(data, settings.results, settings.runs, settings.device, others, start)
    run_queue(cells(plans), place, settings.max_minutes)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv, several=False)


if __name__ == "__main__":
    raise SystemExit(main())
