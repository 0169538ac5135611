"""Registered plans: what they commit themselves to, and what the runs' records say of that."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fewshot_asam.cli import reproduce_maml
from fewshot_asam.errors import FewShotError
from fewshot_asam.reproduce import registration
from fewshot_asam.reproduce.plan import cells, read_plan
from fewshot_asam.reproduce.registration import UNCOMMITTED
from tiny_plan import TINY, images, records, words

__all__ = ["images"]
REGISTERED = """
registered:
  runs: 4
  hypotheses: [They differ.]
  tests: A t test.
  stopping: All of them.
  margin: 0.5
"""


def test_what_a_plan_says_is_digested(tmp_path: Path) -> None:
    """Whatever the order and the comments; what became of it may be added, and nothing else."""

    def digest(text: str) -> str:
        (tmp_path / "plan.yaml").write_text(text)
        return read_plan(tmp_path / "plan.yaml").digest

    first = digest(REGISTERED + TINY)
    assert first == digest(TINY + "# a comment\n" + REGISTERED)
    assert first == digest(REGISTERED + TINY + "deviations: [One run was repeated.]\n")
    assert first != digest(REGISTERED + TINY.replace("tasks: 640", "tasks: 660"))
    assert first != digest(REGISTERED.replace("margin: 0.5", "margin: 1") + TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("runs: 4", "runs: 5"), "runs is 5, but its sections have 4"),
        (("runs: 4", "runs: four"), "runs is 'four'; expected the number of different runs"),
        (("margin: 0.5", "margin: 0"), "margin is 0; expected points"),
        (("margin: 0.5", "margins: 0.5"), "margins"),
        (("[They differ.]", "They differ."), "hypotheses is 'They differ.'; expected text"),
        (("  stopping: All of them.\n", ""), "lacks stopping"),
        (("  tests: A t test.", "  tests: [1]"), "tests is"),
    ],
)
def test_a_registration_says_all_that_it_must(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(REGISTERED.replace(*change) + TINY)
    with pytest.raises(FewShotError, match=message):
        read_plan(file)


def test_the_commit_of_a_plan(tmp_path: Path) -> None:
    """Its last one, and none while it is changed."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def found() -> str:
        registration.commit_of.cache_clear()
        return registration.commit_of(tmp_path / "plan.yaml")

    (tmp_path / "plan.yaml").write_text("a: 1")
    assert found() == UNCOMMITTED
    git("init", "-q")
    assert found() == UNCOMMITTED
    git("add", ".")
    git("commit", "-qm", "plan")
    first = git("log", "-1", "--format=%h")
    assert found() == first
    (tmp_path / "other.yaml").write_text("b: 1")
    git("add", ".")
    git("commit", "-qm", "other")
    assert found() == first
    (tmp_path / "plan.yaml").write_text("a: 2")
    assert found() == UNCOMMITTED


def test_records_say_under_which_plan_and_with_which_data(tmp_path: Path, images: Path) -> None:
    """A run of several plans is of all of those that are registered; a test elsewhere says of which images."""
    registration.commit_of.cache_clear()
    text = TINY.replace("seeds: [0, 1]", "seeds: [0]").replace("tasks: 640", "tasks: 20")
    text = text.replace("  last: {tasks: 20", "  noisy: {tasks: 20, label_noise: 0.5}\n  last: {tasks: 20")
    text = text.replace("  plain: {tasks: 20, inner: maml}", "  elsewhere: {tasks: 20, test_dataset: folder}")
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml", tmp_path / "three.yaml"]
    files[0].write_text(REGISTERED.replace("runs: 4", "runs: 2") + text)
    files[1].write_text(text)
    files[2].write_text(REGISTERED.replace("runs: 4", "runs: 2").replace("0.5", "1.5") + text)
    digests = {file.stem: read_plan(file).digest for file in files}
    assert len({cell.registered for cell in cells(map(read_plan, files))}) == 1
    assert reproduce_maml.main([*map(str, files[1:]), *words(files[0], images, tmp_path)]) == 0
    for record in records(tmp_path).values():
        stamps = {stamp["plan"]: (stamp["digest"], stamp["commit"]) for stamp in record["registered"]}
        assert stamps == {name: (digests[name], UNCOMMITTED) for name in ("one", "three")}
        assert set(record["data"]) == {"classes", "images"}
        tests = {json.dumps([test.get("label_noise"), test.get("test_dataset")]): test for test in record["tests"]}
        assert "--label-noise 0.5" in tests["[0.5, null]"]["command"]
        assert "--test-dataset folder" in tests['[null, "folder"]']["command"]
        assert [name for name, test in tests.items() if "test_images" in test] == ['[null, "folder"]']
