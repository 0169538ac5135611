"""The API page has every public name with an example, and the examples say what they show."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import fewshot_asam

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "api.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^### `([\w.]+)`\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE))
PAGES = {page.name: page.read_text("utf-8") for page in DOCS.glob("*.md")}


def test_every_public_name_has_a_section() -> None:
    assert set(fewshot_asam.__all__) <= SECTIONS.keys()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_an_example_with_the_name(name: str) -> None:
    examples = re.findall(r"```pycon\n(.*?)```", SECTIONS[name], re.DOTALL)
    assert examples
    described = re.findall(r"^\.\. auto\w+:: fewshot_asam\.([\w.]+)$", SECTIONS[name], re.MULTILINE)
    assert described == [name] or name == "__version__"


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_imports_is_in_the_reference(name: str) -> None:
    found = re.findall(r"^from (fewshot_asam[\w.]*) import ([\w, ]+)$", PAGES[name], re.MULTILINE)
    known = {f"fewshot_asam.{section}" for section in SECTIONS} | {"fewshot_asam.rules.perturbations"}
    assert [one for module, names in found for one in names.split(", ") if f"{module}.{one}" not in known] == []


def test_the_examples_say_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = "\n".join(re.findall(r"```pycon\n(.*?)```", TEXT, re.DOTALL))
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(examples, {}, "docs/api.md", None, 0)
    results = doctest.DocTestRunner().run(test, out=said.append)
    assert results.attempted > 60
    assert results.failed == 0, "".join(said)
