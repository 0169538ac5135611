"""What a command says of itself: without PyTorch, in named groups, an example on top."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import pytest

import fewshot_asam
from fewshot_asam import FewShotError
from fewshot_asam.cli.parsing import Parser, add_settings, parse
from fewshot_asam.cli.surroundings import COMMANDS
from fewshot_asam.training.config import GROUPS, TrainConfig

ROOT = Path(fewshot_asam.__file__).parents[1]


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing PyTorch ends the process."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    path = [str(tmp_path), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "COLUMNS": "100"}


def say(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env=environment, check=False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("short", [False, True])
def test_a_command_says_what_it_can_do_without_pytorch(command: str, short: bool, no_torch: dict[str, str]) -> None:
    start = ["fewshot_asam", command.removesuffix("_maml")] if short else [f"fewshot_asam.cli.{command}"]
    version = say(no_torch, "-m", *start, "--version")
    assert (version.stdout, version.stderr) == (f"{command} {fewshot_asam.__version__}\n", "")
    help_ = say(no_torch, "-m", *start, "--help")
    assert (help_.returncode, help_.stderr) == (0, "")
    assert re.match(rf"usage: {command} .*\n\n[^\n]+\.\n\nexamples:\n  {command} ", help_.stdout)
    assert say(no_torch, "-m", *start, "--help", "--seed=1").stderr.strip() == "torch was imported", "it is a stand-in"


def test_the_help_has_every_setting_in_its_group(no_torch: dict[str, str]) -> None:
    text = say(no_torch, "-m", "fewshot_asam.cli.train_maml", "--help").stdout
    names = [field.name for field in fields(TrainConfig) if field.metadata.get("flag", True)]
    assert GROUPS.keys() <= set(names)
    options = re.findall(r"^  --([a-z0-9-]+)|^(\S.*):$", text.partition("\noptions:")[2], re.MULTILINE)
    found, group = {}, ""
    for option, title in options:
        group = title or group
        if option.replace("-", "_") in names:
            found[option.replace("-", "_")] = group
    assert list(found) == names
    starts = {title: next(name for name in found if found[name] == title) for title in GROUPS.values()}
    assert starts == {title: name for name, title in GROUPS.items()}
    assert "--inner-steps N" in text
    assert "inner steps, in training and testing (default: 1)" in " ".join(text.split())
    assert max(map(len, text.partition("\noptions:")[2].splitlines())) <= 100


def test_the_commands_are_listed_with_their_own_first_lines(no_torch: dict[str, str]) -> None:
    listed = say(no_torch, "-m", "fewshot_asam")
    assert listed.returncode == 0
    for command in COMMANDS:
        summary = say(no_torch, "-m", f"fewshot_asam.cli.{command}", "--help").stdout.split("\n\n")[1]
        assert re.search(rf"^  {command.removesuffix('_maml')} +{re.escape(summary)}$", listed.stdout, re.MULTILINE)
    assert say(no_torch, "-m", "fewshot_asam", "--version").stdout == f"fewshot_asam {fewshot_asam.__version__}\n"


def test_a_command_that_there_is_not(no_torch: dict[str, str]) -> None:
    done = say(no_torch, "-m", "fewshot_asam", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no command 'trian'; expected one of ")
    assert done.stderr.endswith("; did you mean train?\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_command_s_mistakes_are_the_same_however_it_is_started() -> None:
    done = say(dict(os.environ), "-m", "fewshot_asam", "eval", "--taks", "3", "nowhere")
    assert done.returncode == 2
    assert "did you mean --tasks?" in done.stderr


def test_importing_the_package_does_not_import_pytorch(no_torch: dict[str, str]) -> None:
    done = say(no_torch, "-c", "import fewshot_asam; print(dir(fewshot_asam)[0])")
    assert done.stderr == ""


def test_a_shell_completes_settings_and_choices_without_pytorch(no_torch: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    for line, expected in (("train_maml --inner-s", "--inner-steps"), ("train_maml --schedule c", "constant")):
        asked = {
            "_ARGCOMPLETE": "1",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "COMP_TYPE": "9",
            "_ARGCOMPLETE_IFS": "\n",
        }
        written = tmp_path / "completions"
        environment = {**no_torch, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(written)}
        say(environment, "-m", "fewshot_asam.cli.train_maml")
        assert expected in written.read_text().split()


@dataclass(frozen=True)
class Foreign:
    """Settings that somebody else wrote."""

    needs_validation: ClassVar[bool] = False
    depth: int = 3
    """how deep"""
    start: float | None = None
    mode: bool = True
    """which of 2 % ways"""
    net: Literal["small", "large"] | str = "small"
    given: str = field(default="", metadata={"flag": False})


def test_any_dataclass_becomes_options_of_a_group_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="own", description="Own.\n\nexamples:\n  own --depth 4   # deeper")
    add_settings(parser, Foreign, {"depth": "Foreign"})
    given = parse(parser, ["--depth", "4", "--start=0.5"])
    assert (given["depth"], given["start"], given["mode"]) == (4, 0.5, True)
    with pytest.raises(SystemExit):
        parse(parser, ["--help"])
    text = capsys.readouterr().out
    assert "examples:\n  own --depth 4   # deeper\n" in text
    own = [" ".join(line.split()) for line in text.partition("\nForeign:\n")[2].splitlines()]
    assert own == [
        "--depth N how deep (default: 3)",
        "--start X",
        "--mode {true,false} which of 2 % ways (default: true)",
        "--net {small,large} or TEXT (default: small)",
    ]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--detph", "4"], "; did you mean --depth?"),
        (["fast"], "; did you mean --mode fast?"),
        (["quick"], ""),
    ],
)
def test_what_was_meant_is_said(words: list[str], meant: str) -> None:
    parser = Parser(prog="own", description=None)
    parser.add_argument("--mode", type=Literal["fast", "slow"], default="slow")
    parser.add_argument("--depth", type=int, default=1)
    with pytest.raises(FewShotError) as error:
        parse(parser, words)
    assert str(error.value) == f"unrecognized arguments: {' '.join(words)}{meant} (--help lists the options)"


def test_settings_that_cannot_be_options_are_refused() -> None:
    @dataclass
    class Bare:
        depth: int

    parser = Parser(prog="own", description=None)
    with pytest.raises(FewShotError, match=r"Bare\.depth has no default"):
        add_settings(parser, Bare)
    add_settings(parser, Foreign)
    with pytest.raises(FewShotError, match=r"Foreign\.depth: there is an option --depth already"):
        add_settings(parser, Foreign)
