"""What the README and the pages in docs/ show runs as it stands, and what they link to is there."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest

from fewshot_asam.cli import analyze_maml, eval_maml, predict_maml, reproduce_maml, train_classifier, train_maml
from fewshot_asam.cli.parsing import Parser, add_settings, parse
from fewshot_asam.supervised.config import ClassifierConfig
from fewshot_asam.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")] + sorted(ROOT.glob("docs/*.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    (name, *block) for name, text in TEXTS.items() for block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
]
ELSEWHERE = ("docs/your_own_images.md",)
"""Pages whose Python is run by other tests: test_predict.py has the run that it needs."""
PYTHON = {name: [code for page, kind, code in BLOCKS if (page, kind) == (name, "python")] for name in TEXTS}
LINES = [line for _, kind, code in BLOCKS if kind in ("", "bash") for line in code.replace("\\\n", " ").splitlines()]
STARTS = re.compile(r"(\w+_maml|train_classifier|python -m fewshot_asam|torchrun|srun torchrun)\b")
COMMANDS = [line for line in LINES if STARTS.match(line)]


def write_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that begin with a file's name, as those files, to be imported from there."""
    for code in itertools.chain.from_iterable(PYTHON.values()):
        if named := re.match(r"# (\w+)\.py\n", code):
            (folder / f"{named[1]}.py").write_text(code, encoding="utf-8")
            monkeypatch.delitem(sys.modules, named[1], raising=False)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("name", [name for name, blocks in PYTHON.items() if blocks and name not in ELSEWHERE])
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after another."""
    monkeypatch.chdir(tmp_path)
    write_modules(tmp_path, monkeypatch)
    names: dict[str, object] = {"__name__": "page"}
    for code in PYTHON[name]:
        if not re.match(r"# \w+\.py\n", code):
            exec(code, names)


def words_of(command: str) -> list[str]:
    """The command's name and its words, without what starts it and without the shell's own substitutions."""
    line = re.sub(r"\$\(.*?\)", "", command.replace('"$RUN"', "RUN"))
    line = re.sub(r"^(srun )?torchrun .*-m fewshot_asam\.cli\.", "", line)
    line = re.sub(r"^python -m fewshot_asam ?(\w*)", lambda found: f"{found[1]}_maml" if found[1] else "", line)
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_modules(tmp_path, monkeypatch)
    monkeypatch.chdir(ROOT)
    name, *words = words_of(command) or ["nothing"]
    if words in (["--help"], ["--version"], []):
        assert name in ("train_maml", "nothing")
    elif name == "train_maml":
        assert isinstance(train_maml._settings(words, TrainConfig())[0], TrainConfig)
    elif name == "train_classifier":
        assert isinstance(train_classifier.settings(words, ClassifierConfig())[0], ClassifierConfig)
    else:
        parser = Parser(prog=name, description=None)
        parser.add_argument("things", nargs="+")
        configs = {"eval_maml": eval_maml.EvalConfig, "predict_maml": predict_maml.PredictConfig}
        configs["analyze_maml"] = analyze_maml.AnalysisConfig
        if name == "reproduce_maml":
            parser.add_argument("--render", action="store_true")
        add_settings(parser, configs.get(name, reproduce_maml.QueueConfig))
        things = parse(parser, words)["things"]
        assert name != "reproduce_maml" or all(any(file.is_file() for file in Path().glob(plan)) for plan in things)


def test_there_are_blocks_and_command_lines() -> None:
    assert sum(map(len, PYTHON.values())) >= 8
    assert {words_of(line)[0] for line in COMMANDS if words_of(line)} == {
        *("train_maml", "train_classifier", "eval_maml", "predict_maml", "analyze_maml", "reproduce_maml")
    }
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
    section = TEXTS["docs/results.md"].split("### The rules after equally many iterations")[1].split("\n### ")[0]
    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("results/**/*.md"))
    figures = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", section)
    assert figures
    assert [figure for figure in figures if f"| {figure} |" not in pages] == []
