"""Plans: what a file may say, the names of its runs, and the plans that are shipped."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fewshot_asam.cli import reproduce_maml, train_maml
from fewshot_asam.reproduce import plan
from fewshot_asam.reproduce.plan import cells, read_plan
from fewshot_asam.training.config import TrainConfig
from tiny_plan import TINY, assert_one_line

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_shipped_plans_give_commands_that_give_their_runs(file: Path) -> None:
    found = cells([read_plan(file)])
    for cell in (*(cell for cell in found if cell.config.seed == 0), found[-1]):
        given, resume = train_maml._settings(shlex.split(plan.command(cell.config))[1:], TrainConfig())
        assert not resume
        assert replace(given, data_root=None, init_from=None) == cell.config
        assert plan.cell_name(given) == cell.name
        assert f"--inner {cell.config.inner}" in plan.command(cell.config)


def test_the_paper_s_plan_is_the_protocol_s_files() -> None:
    sections = read_plan(ROOT / "experiments" / "paper.yaml").sections
    assert [section.seeds for section in sections] == [(0, 1, 2)] * 4
    for section in sections:
        for config in section.rules.values():
            file = ROOT / "configs" / f"{config.dataset}_{config.ways}w{config.shots}s.yaml"
            shipped, _ = train_maml._settings(["--config", str(file), "--inner", config.inner], TrainConfig())
            assert replace(config, rho=5e-4, beta=0.0, congruence_tasks=0) == shipped


@pytest.mark.parametrize("name", ["paper", "omniglot", "mini_imagenet"])
def test_several_inner_steps_have_an_arm_with_momentum(name: str) -> None:
    for section in read_plan(ROOT / "experiments" / f"{name}.yaml").sections:
        configs = [config for config in section.rules.values() if config.inner == "agnostic_sam"]
        several = any(config.inner_steps > 1 for config in configs)
        assert {config.beta for config in configs} == ({0.0, 0.9} if several else {0.0} if configs else set())


FIRST_SECTIONS = {
    "omniglot": {
        "MAML": "omniglot-5w1s-maml-seed0-6146ccfded",
        "Sharp-MAML_low": "omniglot-5w1s-sharp_maml_low-seed0-d034f799d9",
        "Agnostic-SAM": "omniglot-5w1s-agnostic_sam-seed0-c25eba89f0",
    },
    "mini_imagenet": {
        "MAML": "mini_imagenet-5w1s-maml-seed0-a323becf44",
        "Agnostic-SAM": "mini_imagenet-5w1s-agnostic_sam-seed0-bf5c1bf7f1",
        "Sharp-MAML_low": "mini_imagenet-5w1s-sharp_maml_low-seed0-ec6ea657b4",
    },
}


@pytest.mark.parametrize("name", FIRST_SECTIONS)
def test_runs_keep_their_names(name: str) -> None:
    """What a plan or the package says beside a run must not make the ledger lose it."""
    read = read_plan(ROOT / "experiments" / f"{name}.yaml")
    names = {rule: read.sections[0].cell(rule, 0).name for rule in FIRST_SECTIONS[name]}
    assert names == FIRST_SECTIONS[name]
    assert [cell.name for cell in cells([read])][: len(names)] == [*names.values()]


def test_new_plans_test_the_last_weights_too() -> None:
    for name in ("omniglot", "mini_imagenet"):
        for section in read_plan(ROOT / "experiments" / f"{name}.yaml").sections[1:]:
            for cell in section.cells():
                assert {test.tasks for test in cell.tests if test.adaptation.weights == "last"} == {6000}


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
    one, three = plan.Adaptation("maml", 1, 0.4), plan.Adaptation("maml", 3, 0.4)
    last = plan.Test(one._replace(weights="last"), 20)
    assert cells([found])[2].tests == (plan.Test(one, 640), plan.Test(three, 40), last)


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
        ("weights: last", "weights: middle", "tests: last: weights is 'middle'; expected best or last"),
        ("weights: last", "weights: [last]", "expected best or last"),
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
        ("claims:", "superseded: [1]\nclaims:", "superseded is [1]; expected text"),
        ("claims:", "controls: {same: [MAML, MALM]}\nclaims:", "controls: same: no section has both MAML and MALM"),
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
