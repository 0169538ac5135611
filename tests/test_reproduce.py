"""Plans, the queue that runs them, the ledger, what is computed from it, and the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from scipy import stats

import faults
from fewshot_asam.cli import reproduce_maml, train_maml
from fewshot_asam.errors import FewShotError
from fewshot_asam.reproduce import ledger, page, plan, plots, runner, statistics
from fewshot_asam.reproduce.plan import cells, read_plan
from fewshot_asam.reproduce.radius_sweeps import sweeps
from fewshot_asam.reproduce.section_results import look_up
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import Interval, interval
from fewshot_asam.training.run_folder import read_summary

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "plans").glob("*.yaml"))
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


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fewshot_asam.cli.reproduce_maml", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def done(tiny: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the plan was run without a stop."""
    folder = tmp_path_factory.mktemp("done")
    assert reproduce_maml.main(words(tiny, images, folder)) == 0
    return folder


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return ledger.read_cells(folder / "results" / ledger.FILE)


def outcome(folder: Path) -> dict[str, dict[str, Any]]:
    """What the ledger says, except times and whose code it was."""
    found = records(folder)
    for record in found.values():
        record.pop("wall_seconds")
        record.pop("commit")  # of the installed package in some processes, of the working tree in others
        record["validation"].pop("seconds")
        for test in record["tests"]:
            test.pop("seconds")
    return found


def test_a_cell_leaves_all_that_was_asked_for(done: Path, tiny: Path) -> None:
    found = records(done)
    assert list(found) == [cell.name for cell in cells([read_plan(tiny)])]
    record = list(found.values())[1]
    assert (record["seed"], record["settings"]["inner"], record["settings"]["rho"]) == (0, "agnostic_sam", 0.05)
    assert not {"data_root", "output_dir"} & record["settings"].keys()
    assert record["validation"]["iteration"] == [10, 20, 30]
    assert record["best_iteration"] in record["validation"]["iteration"]
    assert record["val_accuracy"] == pytest.approx(max(record["validation"]["accuracy"]), abs=1e-5)
    assert all(-1 <= cosine <= 1 for cosine in record["validation"]["congruence_after"])
    assert 0 < record["validation"]["seconds"][0] < record["validation"]["seconds"][-1] < record["wall_seconds"] + 0.1
    own, plain_maml, plain_maml_of_one_step = record["tests"]
    assert (own["inner"], own["inner_steps"], own["tasks"]) == ("agnostic_sam", 1, 640)
    assert (plain_maml["inner"], plain_maml["inner_steps"], plain_maml["tasks"]) == ("maml", 3, 40)
    assert (plain_maml_of_one_step["inner_steps"], plain_maml_of_one_step["tasks"]) == (1, 20)
    accuracies = ledger.accuracies(own)
    assert tuple(own["of_640"].values()) == pytest.approx(interval(accuracies), abs=1e-6)
    assert own["of_600"]["mean"] == pytest.approx(accuracies[:600].mean().item(), abs=1e-6)


def test_the_first_tasks_are_those_of_the_run_s_own_test(done: Path) -> None:
    for name, record in records(done).items():
        summary = read_summary(done / "runs" / name)
        first = interval(ledger.accuracies(record["tests"][0], 20))
        assert first == pytest.approx((summary["test_accuracy"], summary["test_ci95"]), abs=1e-6)


def test_what_is_done_is_not_done_again(
    done: Path, tiny: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "results" / ledger.FILE).read_bytes()
    assert reproduce_maml.main(words(tiny, images, done)) == 0
    assert capsys.readouterr().out == "4 of 4 cells are done\n"
    assert (done / "results" / ledger.FILE).read_bytes() == before


def test_killed_and_stopped_at_many_moments(done: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    """By SIGKILL, SIGTERM and the end of its minutes in turn, until the plan is done."""
    ends: list[int] = []
    for number in range(100):
        limit = ["--max-minutes", 0.02] if number % 3 == 2 else []
        process = start(*words(tiny, images, tmp_path, *limit))
        if not limit and number < 12:
            time.sleep(3 + 0.4 * number)
            process.send_signal((signal.SIGKILL, signal.SIGTERM)[number % 2])
        printed, problem = process.communicate(timeout=120)
        ends.append(process.returncode)
        assert process.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 143), problem
        assert "Traceback" not in problem
        if "4 of 4 cells are done" in printed:
            break
    assert {0, -signal.SIGKILL} <= set(ends)
    assert faults.differences(outcome(tmp_path), outcome(done)) == []


def test_a_deadline_trains_without_testing(tiny: Path, images: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    long.write_text(
        TINY.replace("iterations: 30", "iterations: 100000").replace("validate_every: 10", "validate_every: 99999")
    )
    process = start(*words(long, images, tmp_path, "--max-minutes", 0.5))
    printed, problem = process.communicate(timeout=120)
    assert process.returncode == 0, problem
    assert printed.splitlines()[-1] == "0 of 4 cells are done; the same command goes on"
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert not (run / "summary.json").exists()
    assert not any("val_accuracy" in line for line in (run / "metrics.jsonl").read_text().splitlines())
    assert list((run / "checkpoints").iterdir())


def test_a_cell_of_another_process_is_left_to_it(
    done: Path, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = list(records(done).values())
    for record in kept[1:]:
        ledger.append(tmp_path / "results" / ledger.FILE, record)
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / f"{kept[0]['cell']}.lock"):
        assert reproduce_maml.main(words(tiny, images, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "another process is at it" in printed
    assert "3 of 4 cells are done" in printed


def test_a_test_that_is_added_later_costs_no_training(done: Path, tiny: Path, images: Path, tmp_path: Path) -> None:
    more = tmp_path / "tiny.yaml"
    more.write_text(TINY.replace("rules:", "  more steps: {tasks: 10, inner_steps: 2}\nrules:"))
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", done, copy], check=True)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    assert reproduce_maml.main(words(more, images, copy)) == 0
    assert [len(record["tests"]) for record in records(copy).values()] == [3, 4, 3, 4]
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}


def test_a_run_that_diverges_is_an_outcome(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.replace("  hidden: 4", "  hidden: 4\n  meta_lr: 1.0e+18"))
    assert reproduce_maml.main(words(file, images, tmp_path)) == 0
    assert all("not finite" in r["diverged"] or "likely cause" in r["diverged"] for r in records(tmp_path).values())
    assert reproduce_maml.main([str(file), "--render", "--results", str(tmp_path / "results")]) == 0
    assert "Diverged, so without an accuracy: MAML, seed 1" in (tmp_path / "results" / "README.md").read_text()


@pytest.mark.parametrize("tail", [b'{"cell": "half', b"17", b"\xff"])
def test_a_broken_line_is_said_and_left_out(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger.append(file, {"cell": "ä"})
    with file.open("ab") as end:
        end.write(tail)
    with pytest.warns(UserWarning, match="line 2 is broken"):
        assert ledger.read(file) == [{"cell": "ä"}]
    ledger.append(file, {"cell": "c"})
    with pytest.warns(UserWarning, match="line 2 is broken"):
        assert ledger.read(file) == [{"cell": "ä"}, {"cell": "c"}]


def test_accuracies_come_back_exactly() -> None:
    right = torch.randint(0, 76, (6000,), generator=torch.Generator().manual_seed(0))
    accuracies = (right / 75).float()
    record = {"right": ledger.pack(accuracies, 75), "query_images": 75, "tasks": 6000}
    assert torch.equal(ledger.accuracies(record), right.double() / 75)
    assert torch.equal(ledger.accuracies(record, 10), right[:10].double() / 75)
    assert len(record["right"]) < 9000


@pytest.mark.parametrize("count", range(2, 11))
def test_intervals_over_seeds_are_student_s(count: int) -> None:
    values = np.random.default_rng(count).normal(0.9, 0.02, count)
    mean, half_width, seeds = statistics.over_seeds(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (mean - half_width, mean + half_width, seeds) == pytest.approx((low, high, count), rel=2e-4)


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    ease = generator.normal(0.8, 0.1, (3, 500))
    first, second = (ease + generator.normal(shift, 0.01, (3, 500)) for shift in (0.01, 0.0))
    found = statistics.compare(*({s: torch.tensor(values[s]) for s in range(3)} for values in (first, second)))
    assert found is not None
    for seed in range(3):
        expected = stats.ttest_rel(first[seed], second[seed]).confidence_interval(0.95)
        mean, half_width = found.each[seed]
        assert (mean - half_width, mean + half_width) == pytest.approx((expected.low, expected.high), rel=1e-2)
    expected = stats.ttest_1samp((first - second).mean(1), 0).confidence_interval(0.95)
    low, high = found.seeds.mean - found.seeds.half_width, found.seeds.mean + found.seeds.half_width
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=2e-4)
    assert found.tasks.mean == pytest.approx((first - second).mean())
    assert found.verdict == "better"


@pytest.mark.parametrize(
    ("tasks", "seeds", "verdict"),
    [
        ((0.02, 0.01), (0.02, 0.015, 3), "better"),
        ((-0.02, 0.01), (-0.02, 0.015, 3), "worse"),
        ((0.02, 0.03), (0.02, 0.015, 3), "inside the noise"),
        ((-0.02, 0.01), (-0.02, 0.05, 3), "inside the noise"),
        ((0.0, 0.0), (0.0, 0.0, 3), "inside the noise"),
        ((0.02, 0.01), (0.02, None, 1), "one seed: no verdict"),
    ],
)
def test_verdicts(tasks: tuple[float, float], seeds: tuple[Any, ...], verdict: str) -> None:
    assert statistics.Comparison({}, Interval(*tasks), statistics.Spread(*seeds)).verdict == verdict


def test_rules_without_a_common_seed_are_not_compared() -> None:
    assert statistics.compare({0: torch.zeros(2)}, {1: torch.zeros(2)}) is None


@pytest.mark.parametrize("count", range(5))
def test_a_partial_ledger_renders(done: Path, tiny: Path, tmp_path: Path, count: int) -> None:
    for record in list(records(done).values())[:count]:
        ledger.append(tmp_path / ledger.FILE, record)
    assert reproduce_maml.main([str(tiny), "--render", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert f"{count} of 4 runs are done" in text
    assert ("one seed: no verdict" in text) == (count in (2, 3))
    assert ("Missing" in text) == (count < 4)
    pictures = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400


def test_the_page_says_what_the_ledger_does(done: Path, tiny: Path) -> None:
    text = page.render(look_up([read_plan(tiny)], records(done)))
    by_rule = {
        rule: [r for r in records(done).values() if r["settings"]["inner"] == rule] for rule in ("maml", "agnostic_sam")
    }
    means = {rule: [r["tests"][0]["of_640"]["mean"] for r in found] for rule, found in by_rule.items()}
    (row,) = (line for line in text.splitlines() if line.startswith("| MAML (`maml`)"))
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[1].startswith(f"{100 * means['maml'][0]:.2f} ±")
    assert columns[3].startswith(f"{100 * sum(means['maml']) / 2:.2f} ±")
    assert columns[4] == "2"
    first = [r["tests"][0]["of_600"]["mean"] for r in records(done).values() if r["settings"]["inner"] == "maml"]
    assert columns[5].startswith(f"{100 * sum(first) / 2:.2f} ±")
    assert columns[5] != columns[3]
    assert columns[-1] == "50.00"
    assert "\n\nMind this.\n\n" in text
    assert "| somebody's | – | – | – | – | – | 60.50 |" in text
    ours = f"{100 * sum(means['maml']) / 2:.2f} ±"
    (row,) = (line for line in text.splitlines() if "| MAML (others) | 51.00 |" in line)
    assert ours in row
    assert f"| 2 | {50 * sum(means['maml']) - 51:.2f} ±" in row
    assert "| 30 iterations of 2 tasks, 4 filters |" in row
    rows = [line for line in text.splitlines() if line.startswith("| Agnostic-SAM − MAML") and "3-way" not in line]
    (row,) = rows
    difference = sum(means["agnostic_sam"]) / 2 - sum(means["maml"]) / 2
    assert f"| {100 * difference:.2f} ±" in row


def test_the_page_s_answers(done: Path, tiny: Path) -> None:
    found = records(done).values()
    maml, agnostic = ([r for r in found if r["settings"]["inner"] == rule] for rule in ("maml", "agnostic_sam"))
    text = page.render(look_up([read_plan(tiny)], records(done)))
    accuracies = [torch.stack([ledger.accuracies(r["tests"][0]) for r in runs]) for runs in (agnostic, maml)]
    difference = interval((accuracies[0] - accuracies[1]).mean(0))
    ratios = [one["wall_seconds"] / other["wall_seconds"] for one, other in zip(agnostic, maml, strict=True)]
    (row,) = (line for line in text.splitlines() if line.startswith("| it is better"))
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[2:4] == ["+2.50", f"{100 * difference.mean:.2f} ± {100 * difference.half_width:.2f}"]
    assert columns[5] == "2"
    assert columns[7].startswith(f"× {sum(ratios) / 2:.2f} ±")
    (asked,) = (line for line in text.splitlines() if line.startswith("| is MAML better"))
    assert f"| {-100 * difference.mean:.2f} ±" in asked
    (share,) = (
        line for line in text.splitlines() if line.startswith("| Agnostic-SAM | Folder 3-way 1-shot | 1 | 20 |")
    )
    own, plain, baseline = (
        torch.stack([ledger.accuracies(r["tests"][index], 20) for r in runs]).mean().item()
        for runs, index in ((agnostic, 0), (agnostic, 2), (maml, 0))
    )
    columns = [column.strip() for column in share.strip("|").split("|")]
    assert columns[4].startswith(f"{100 * (plain - baseline):+.2f} (tasks ±")
    assert columns[5].startswith(f"{100 * (own - plain):+.2f} (tasks ±")
    assert columns[6].startswith(f"{100 * (own - baseline):+.2f} (tasks ±")
    cosines = [
        sum(r["validation"]["congruence_after"][r["best_iteration"] // 10 - 1] for r in runs) / 2
        for runs in (agnostic, maml)
    ]
    assert f"| {cosines[0] - cosines[1]:.3f} ±" in text


def answer(text: str, folder: Path, shift: float, published: float | None, seeds: int = 2) -> str:
    """The row of the claim where Agnostic-SAM is better by `shift`; its published difference is in points."""
    figures = f"published: {{MAML: 50, Agnostic-SAM: {50 + published}}}" if published else "seeds: [0, 1]"
    plan_file = folder / "plan.yaml"
    plan_file.write_text(re.sub("published: .*", figures, text))
    read = read_plan(plan_file)
    found = {cell.name: invented(cell, {"agnostic_sam": shift}) for cell in cells([read])[: 2 * seeds]}
    rendered = page.render(look_up([read], found))
    (row,) = (line for line in rendered.splitlines() if line.startswith("| it is better"))
    words = row.split(" | ")[-2].strip("*")
    assert f"- `plan.yaml`, 1 in all: 1 {words}\n" in rendered
    return words


@pytest.mark.parametrize(
    ("shift", "published", "words"),
    [
        (0.1, 2.5, "confirmed"),
        (-0.1, 2.5, "contradicted"),
        (-0.1, -2.5, "confirmed"),
        (0.1, -2.5, "contradicted"),
        (0.0, 0.2, "not confirmed: inside the noise, the published difference too"),
        (0.0, 40.0, "not confirmed: inside the noise, the published difference outside of it"),
        (0.1, None, "in favour"),
        (-0.1, None, "against"),
        (0.0, None, "inside the noise"),
    ],
)
def test_what_becomes_of_a_claim(tmp_path: Path, shift: float, published: float | None, words: str) -> None:
    assert answer(TINY, tmp_path, shift, published) == words


def test_what_one_seed_would_have_shown(tmp_path: Path) -> None:
    """Agnostic-SAM is better by 10 points in one seed and worse by as many in the other."""
    file = tmp_path / "plan.yaml"
    file.write_text(TINY)
    read = read_plan(file)
    found = {c.name: invented(c, {"agnostic_sam": 0.1 if c.config.seed else -0.1}) for c in cells([read])}
    text = page.render(look_up([read], found))
    assert "Of the 2 differences of two rules in one seed whose verdict over seeds is inside the noise, 2 leave" in text
    assert "Of the 2 comparisons above that have a verdict, 0 are better or worse." in text
    found = {c.name: invented(c, {"agnostic_sam": 0.1}) for c in cells([read])}
    rendered = page.render(look_up([read], found))
    assert "in one seed whose verdict" not in rendered
    assert "Of the 2 comparisons above that have a verdict, 2 are better or worse." in rendered


def test_a_claim_without_runs_or_with_one_seed(tmp_path: Path) -> None:
    assert answer(TINY, tmp_path, 0.1, 2.5, seeds=1) == "one seed: no verdict"
    assert answer(TINY, tmp_path, 0.1, 2.5, seeds=0) == "not run"
    nothing = page.render(look_up([read_plan(tmp_path / "plan.yaml")], {}))
    assert "| it is better | Folder 3-way 1-shot (`plan`) | +2.50 | – | – | – | not run | – |" in nothing
    assert "reproduce_maml experiments/plan.yaml --data-root DATA" in nothing


def test_runs_that_diverged_are_said_beside_the_verdict(tiny: Path) -> None:
    read = read_plan(tiny)
    found = {cell.name: invented(cell, {}) for cell in cells([read])}
    agnostic = [name for name, record in found.items() if record["settings"]["inner"] == "agnostic_sam"]
    for name, expected in zip(agnostic, ("| 1, 1 diverged | **one seed", "| – | diverged | – |"), strict=True):
        found[name] |= {"diverged": "the loss is not finite", "tests": []}
        text = page.render(look_up([read], found))
        (row,) = (line for line in text.splitlines() if line.startswith("| it is better"))
        assert expected in row
        assert "What was not run" not in text


def test_runs_on_a_cpu_are_not_compared_with_those_on_a_gpu(tiny: Path) -> None:
    """Their generators draw other tasks."""
    read = read_plan(tiny)
    found = {cell.name: invented(cell, {"agnostic_sam": 0.1}) for cell in cells([read])}
    for record in found.values():
        if record["settings"]["inner"] == "maml":
            record["device"] = "NVIDIA H100"
    text = page.render(look_up([read], found))
    (row,) = (line for line in text.splitlines() if line.startswith("| it is better"))
    assert "| not run |" in row
    assert "confirmed" not in text.replace("is confirmed", "")


def test_a_run_whose_settings_are_other_than_its_name_says_is_refused(tiny: Path) -> None:
    read = read_plan(tiny)
    found = {cell.name: invented(cell, {}) for cell in cells([read])}
    next(iter(found.values()))["settings"]["clip_grad"] = 3.0
    with pytest.raises(FewShotError, match=r"with clip_grad 3\.0, but the plan or the package's default is None"):
        look_up([read], found)
    next(iter(found.values()))["settings"] |= {"clip_grad": None, "checkpoint_every": 3}
    assert not look_up([read], found)[0][1][0].missing


def test_a_test_that_is_added_later_leaves_what_was_found(tiny: Path, tmp_path: Path) -> None:
    found = {cell.name: invented(cell, {"agnostic_sam": 0.1}) for cell in cells([read_plan(tiny)])}
    more = tmp_path / "tiny.yaml"
    more.write_text(TINY.replace("rules:", "  more steps: {tasks: 10, inner_steps: 2}\nrules:"))
    text = page.render(look_up([read_plan(more)], found))
    assert "0 of 4 runs are done" in text
    assert "| **confirmed** |" in text


def test_the_committed_page_is_that_of_the_committed_ledger() -> None:
    results = ROOT / "results"
    expected = page.render(look_up([read_plan(file) for file in PLANS], ledger.read_cells(results / ledger.FILE)))
    assert (results / "README.md").read_text(encoding="utf-8") == expected
    pictures = {line.split("](")[1].rstrip(")") for line in expected.splitlines() if line.startswith("![")}
    assert pictures == {path.name for path in results.glob("*.png")}


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_shipped_plans_give_commands_that_give_their_runs(file: Path) -> None:
    for cell in cells([read_plan(file)]):
        given, resume = train_maml._settings(shlex.split(plan.command(cell.config))[1:], TrainConfig())
        assert not resume
        assert replace(given, data_root=None) == cell.config
        assert plan.cell_name(given) == cell.name
        assert f"--inner {cell.config.inner}" in plan.command(cell.config)


def test_the_paper_s_plan_is_the_protocol_s_files() -> None:
    sections = read_plan(ROOT / "plans" / "paper.yaml").sections
    assert [section.seeds for section in sections] == [(0, 1, 2)] * 4
    for section in sections:
        for config in section.rules.values():
            file = ROOT / "configs" / f"{config.dataset}_{config.ways}w{config.shots}s.yaml"
            shipped, _ = train_maml._settings(["--config", str(file), "--inner", config.inner], TrainConfig())
            assert replace(config, rho=5e-4, beta=0.0, congruence_tasks=0) == shipped


def test_several_inner_steps_have_an_arm_with_momentum() -> None:
    for section in read_plan(ROOT / "plans" / "paper.yaml").sections:
        betas = {config.beta for config in section.rules.values() if config.inner == "agnostic_sam"}
        assert betas == {0.0, 0.9}


def test_what_does_not_alter_the_weights_does_not_alter_the_name() -> None:
    config = TrainConfig()
    assert plan.cell_name(replace(config, data_root=Path("x"), engine="vmap", congruence_tasks=3)) == plan.cell_name(
        config
    )
    assert plan.cell_name(replace(config, meta_lr=0.1)) != plan.cell_name(config)


def test_one_run_of_several_sections_is_one_cell_with_all_tests(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        TINY + "  Again:\n    seeds: [1]\n    rules: [MAML]\n    tests: [MAML]\n    settings: {validate_every: 10}\n"
    )
    found = read_plan(file)
    assert [section.title for section in found.sections] == ["Folder 3-way 1-shot", "Again"]
    assert len(cells([found])) == len(cells([found._replace(sections=found.sections[:1])])) == 4
    assert cells([found])[2].tests == (plan.Test("maml", 1, 0.4, 640), plan.Test("maml", 3, 0.4, 40))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("seeds: [0, 1]", "", "lacks seeds"),
        ("seeds: [0, 1]", "seed: [0]", "there is no setting 'seed'; did you mean seeds"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "expected a list of different whole numbers"),
        ("seeds: [0, 1]", "seeds: 3", "seeds is 3"),
        ("seeds: [0, 1]", "seeds: []", "at least 1 and at most 10"),
        ("ways: 3", "wasy: 3", "there is no setting 'wasy'; did you mean ways"),
        ("ways: 3", "ways: three", "ways is 'three'; expected a whole number"),
        ("ways: 3", "ways: 1", "ways is 1; expected at least 2"),
        ("ways: 3", "device: cpu", "device is not a plan's to say"),
        ("ways: 3", "seed: 3", "seed is not a plan's to say"),
        ("inner: maml, rho", "inner: mmal, rho", "inner is 'mmal'"),
        ("{tasks: 640}", "{tasks: many}", "tasks is 'many'; expected a whole number"),
        ("{tasks: 640}", "{inner: maml}", "tasks is None"),
        ("{tasks: 640}", "{tasks: 1}", "at least 2, for an interval"),
        ("{tasks: 640}", "{tasks: 640, rho: 1}", "there is no setting 'rho'"),
        ("inner_steps: 3", "inner_steps: 0", "inner_steps is 0"),
        ("published: {MAML: 50,", "published: {MAML: much,", "MAML is 'much'; expected an accuracy in %"),
        ("published:", "publish:", "there is no setting 'publish'; did you mean published"),
        ("published:", "rules: [MALM]\n    published:", "there is no 'MALM'; did you mean MAML"),
        ("published:", "rules: MAML\n    published:", "expected a list of some of MAML, Agnostic-SAM"),
        ("published:", "rules: [MAML, MAML]\n    published:", "MAML stands twice"),
        ("inner: agnostic_sam, rho: 0.05}", "inner: maml, rho: 0.05}", "two of its rules are the same run"),
        ("  Agnostic-SAM:", "  MAML:", "gives MAML again"),
        ("rules:", "rules: {}\nrlues:", "there is no setting 'rlues'; did you mean rules"),
        ("rules:\n", "rules:\n  x: 3\n", "rules: x is 3; expected names"),
        ("[Agnostic-SAM, MAML]", "[Agnostic-SAM, MALM]", "it is better: no section has both Agnostic-SAM and MALM"),
        ("[Agnostic-SAM, MAML]", "[MAML]", "it is better is ['MAML']; expected a list of two rules"),
        ("note: Mind this.", "note: 3", "note is 3; expected text"),
        ("claims:", "claim:", "there is no setting 'claim'; did you mean claims"),
    ],
)
def test_bad_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, message: str) -> None:
    assert before in TINY
    file = tmp_path / "plan.yaml"
    file.write_text(TINY.replace(before, after, 1))
    assert reproduce_maml.main([str(file), "--results", str(tmp_path / "results")]) == 2
    assert_one_line(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml does not exist"),
        ([], "plans"),
        (["PLAN", "--max-minutes", "0"], "max_minutes is 0"),
        (["PLAN", "--rnuds", "x"], "rnuds"),
        (["PLAN", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce_maml.main([str(tiny) if word == "PLAN" else word for word in arguments]) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "results").exists()


def test_several_processes_are_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert reproduce_maml.main([str(tiny)]) == 2
    assert_one_line(capsys, "expected one")


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training")]
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert message in error[0]


def invented(cell: plan.Cell, more: dict[str, float]) -> dict[str, Any]:
    """A record of a run whose accuracy is about 0.85, and so much more for some rules or rules of some radius."""
    generator = torch.Generator().manual_seed(zlib.crc32(cell.name.encode()))
    images = cell.config.ways * cell.config.queries
    better = more.get(cell.config.inner, more.get(f"{cell.config.inner} {cell.config.rho}", 0.0))
    tests = []
    for test in cell.tests:
        right = torch.rand(test.tasks, images, generator=generator) < 0.85 + better + 0.01 * cell.config.seed
        adaptation = {"inner": test.inner, "inner_steps": test.inner_steps, "inner_lr": test.inner_lr}
        packed = ledger.pack(right.float().mean(1), images)
        tests.append(adaptation | {"tasks": test.tasks, "query_images": images, "right": packed})
    course = {"iteration": [500, 1000], "seconds": [60.0, 120.0], "accuracy": [0.8, 0.9]}
    course |= {"congruence_before": [0.3, 0.4], "congruence_after": [0.2, 0.5]}
    where = {"commit": "abc", "device": "cpu", "threads": 2, "engine": "loop", "versions": {"torch": "2"}}
    head = {"cell": cell.name, "seed": cell.config.seed, "settings": runner.plain(cell.config), "tests": tests}
    return head | where | {"wall_seconds": 120.0, "iterations": 1000, "best_iteration": 1000, "validation": course}


def test_the_small_plan_s_page_when_all_is_done(tmp_path: Path) -> None:
    small = read_plan(ROOT / "plans" / "small.yaml")
    found = {cell.name: invented(cell, {"agnostic_sam 0.05": 0.1}) for cell in cells([small])}
    (tmp_path / ledger.FILE).write_text("".join(json.dumps(record) + "\n" for record in found.values()))
    page.write_page([small], tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{len(found)} of {len(found)} runs are done" in text
    assert "Missing" not in text
    verdicts = {row.split(" | ")[0].strip("| "): row.split(" | ")[-1].strip("| ") for row in text.splitlines()}
    assert verdicts["Agnostic-SAM 5e-2 − MAML"] == "better"
    assert verdicts["Agnostic-SAM 5e-4 − MAML"] == "inside the noise"
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
    assert "not run" not in text
    (sweep,) = plots.sweep_names(small, sweeps(look_up([small], found)[0][1])).items()
    assert sweep[0] == "small-radii-1.png"
    radii = {name: sorted(family) for name, family in sweep[1].items()}
    assert radii["agnostic_sam"] == [5e-4, 5e-3, 5e-2]
    assert radii["agnostic_sam, augment"] == [5e-2]
    assert radii["sharp_maml_low"] == [5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1]
    assert radii["maml"] == [0.0]
    over = {name: {r: point.over_maml for r, point in family.items()} for name, family in sweep[1].items()}
    assert over["maml"] == {0.0: None}
    assert over["agnostic_sam"][5e-2].seeds == 6
    assert over["agnostic_sam"][5e-2].mean == pytest.approx(0.1, abs=0.005)
    assert over["agnostic_sam, augment"][5e-2].mean == pytest.approx(0.1, abs=0.005)
    assert over["agnostic_sam"][5e-4].mean == pytest.approx(0.0, abs=0.005)
    pictures = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == len(small.sections) + 1
