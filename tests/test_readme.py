"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fewshot_asam.cli import train_maml
from fewshot_asam.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in README.splitlines() if line.startswith("train_maml ") and "--help" not in line]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block: str) -> None:
    names: dict[str, object] = {}
    exec(block, names)
    assert "loss" in names


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    assert isinstance(train_maml._settings(words[1:], TrainConfig())[0], TrainConfig)


def test_there_are_command_lines() -> None:
    assert len(COMMANDS) >= 4


def test_the_reproduction_s_figures_are_those_of_its_page() -> None:
    section = README.split("## Do the published claims hold?")[1].split("\n## ")[0]
    page = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*.md"))
    figures = re.findall(r"-?\d+\.\d+ ± \d+\.\d+", section)
    assert figures
    assert [figure for figure in figures if f"| {figure} |" not in page] == []
