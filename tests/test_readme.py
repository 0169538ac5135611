"""What the README and the pages in docs/ show runs as it stands, and what they link to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fewshot_asam.cli import eval_maml, reproduce_maml, train_maml
from fewshot_asam.cli.parsing import Parser, add_settings, parse
from fewshot_asam.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")] + sorted(ROOT.glob("docs/*.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    (name, *block) for name, text in TEXTS.items() for block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
]
PYTHON = [
    pytest.param(code, id=f"{name}-{number}") for number, (name, kind, code) in enumerate(BLOCKS) if kind == "python"
]
LINES = [line for _, kind, code in BLOCKS if kind in ("", "bash") for line in code.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if re.match(r"(\w+_maml|python -m fewshot_asam|torchrun|srun torchrun)\b", line)]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def words_of(command: str) -> list[str]:
    """The command's name and its words, without what starts it and without the shell's own substitutions."""
    line = re.sub(r"\$\(.*?\)", "", command.replace('"$RUN"', "RUN"))
    line = re.sub(r"^(srun )?torchrun .*-m fewshot_asam\.cli\.", "", line)
    line = re.sub(r"^python -m fewshot_asam ?(\w*)", lambda found: f"{found[1]}_maml" if found[1] else "", line)
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, *words = words_of(command) or ["nothing"]
    if words in (["--help"], ["--version"], []):
        assert name in ("train_maml", "nothing")
    elif name == "train_maml":
        assert isinstance(train_maml._settings(words, TrainConfig())[0], TrainConfig)
    else:
        parser = Parser(prog=name, description=None)
        parser.add_argument("things", nargs="+")
        if name == "reproduce_maml":
            parser.add_argument("--render", action="store_true")
        add_settings(parser, {"eval_maml": eval_maml.EvalConfig, "reproduce_maml": reproduce_maml.QueueConfig}[name])
        things = parse(parser, words)["things"]
        assert name == "eval_maml" or all(Path(plan).is_file() for plan in things)


def test_there_are_blocks_and_command_lines() -> None:
    assert len(PYTHON) >= 3
    assert {words_of(line)[0] for line in COMMANDS if words_of(line)} == {"train_maml", "eval_maml", "reproduce_maml"}
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_named_files_are_there(name: str) -> None:
    text, folder = TEXTS[name], (ROOT / name).parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:tests|docs|scripts|configs|experiments|notebooks|benchmarks)/[\w/.]+)`", text)
    named += re.findall(r"\b((?:tests|scripts)/\w+\.py)\b", text)
    missing = [link for link in links if not (folder / link).exists()]
    assert missing + [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_is_short() -> None:
    prose = re.sub(r"```.*?```", "", TEXTS["README.md"], flags=re.DOTALL)
    assert len(prose.split()) < 700


def test_the_reproduction_s_figures_are_those_of_its_page() -> None:
    section = TEXTS["docs/accuracy.md"].split("### The rules after equally many iterations")[1].split("\n### ")[0]
    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("results/**/*.md"))
    figures = re.findall(r"-?\d+\.\d+ ± \d+\.\d+", section)
    assert figures
    assert [figure for figure in figures if f"| {figure} |" not in pages] == []
