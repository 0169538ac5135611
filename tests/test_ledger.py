"""Records of the ledger that somebody edited or forged: one line that names the file, the line and what is wrong."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewshot_asam import FewShotError
from fewshot_asam.cli import reproduce_maml
from fewshot_asam.reproduce import ledger
from fewshot_asam.reproduce.schema import cell_problem

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "results" / ledger.FILE).read_text(encoding="utf-8").splitlines()
Forgery = Callable[[dict[str, Any]], object]


def test_the_committed_ledger_is_whole() -> None:
    assert [cell_problem(json.loads(line)) for line in LINES] == [""] * len(LINES)
    assert len(ledger.read_cells(ROOT / "results" / ledger.FILE)) == len(LINES)


def packed(*values: int) -> str:
    return base64.b64encode(zlib.compress(np.array(values, "<u2").tobytes())).decode()


def put(*path: Any) -> Forgery:
    """Sets the value that a path of names and indices leads to."""

    def forge(record: Any) -> None:
        *way, last, value = path
        for name in way:
            record = record[name]
        record[last] = value

    return forge


def drop(*path: Any) -> Forgery:
    def forge(record: Any) -> None:
        *way, last = path
        for name in way:
            record = record[name]
        del record[last]

    return forge


FORGED: list[tuple[Forgery, str]] = [
    (put("cell", 3), "cell is 3"),
    (put("cell", ["a"]), "cell is ['a']"),
    (put("cell", "omniglot"), "cell is 'omniglot'; expected a run's name"),
    (drop("cell"), "cell is missing"),
    (put("seed", "0"), "seed is '0'"),
    (put("seed", True), "seed is True"),
    (put("seed", 7), "seed is 7, but cell"),
    (drop("settings"), "settings is missing"),
    (put("settings", []), "settings is []"),
    (put("settings", "wasy", 5), "no setting 'wasy'"),
    (put("settings", "ways", "5"), "settings: ways is '5'"),
    (put("settings", "queries", 0), "settings: queries is 0"),
    (drop("tests"), "tests is missing"),
    (put("tests", {}), "tests is {}"),
    (put("tests", [3]), "tests is [3]"),
    (put("tests", 0, "inner", "sgd"), "inner is 'sgd'; expected one of agnostic_sam"),
    (put("tests", 0, "inner", ["maml"]), "inner is ['maml']"),
    (put("tests", 0, "inner_steps", 1.5), "inner_steps is 1.5"),
    (put("tests", 0, "weights", "middle"), "weights is 'middle'; expected best or last"),
    (put("tests", 0, "weights", ["last"]), "weights is ['last']"),
    (put("last_test_accuracy", 97), "last_test_accuracy is 97"),
    (put("last_test_accuracy", 0.97), "last_test_ci95 is missing"),
    (put("tests", 0, "inner_lr", float("nan")), "inner_lr is nan"),
    (put("tests", 0, "tasks", 10**12), "tasks is 1000000000000"),
    (put("tests", 0, "tasks", 5999), "right does not hold 5,999 numbers"),
    (drop("tests", 0, "right"), "right is missing"),
    (put("tests", 0, "right", 5), "right is 5"),
    (put("tests", 0, "right", "not base64!"), "right does not hold 6,000 numbers from 0 to 25"),
    (put("tests", 0, "right", base64.b64encode(b"not zlib").decode()), "right does not hold"),
    (put("tests", 0, "right", packed(*[1500] * 6000)), "right does not hold"),
    (put("tests", 0, "right", packed(*[25] * 6001)), "right does not hold"),
    (put("tests", 0, "right", base64.b64encode(zlib.compress(bytes(10**8))).decode()), "right does not hold"),
    (put("tests", 0, "right", packed(*[25] * 6000)), "which is not that of the answers"),
    (put("tests", 0, "query_images", 0), "query_images is 0"),
    (put("tests", 0, "query_images", 50), "of the answers"),
    (put("tests", 0, "of_600", "mean", 60.0), "of_600: mean is 60.0"),
    (put("tests", 0, "of_600", 0.9), "of_600 is 0.9"),
    (drop("device"), "device is missing"),
    (put("device", "cpu\n\n# Mine"), "device is 'cpu"),
    (put("threads", 0), "threads is 0"),
    (put("versions", "2.13"), "versions is '2.13'"),
    (drop("versions", "torch"), "versions: torch is missing"),
    (put("iterations", 0), "iterations is 0"),
    (put("wall_seconds", float("inf")), "wall_seconds is inf"),
    (put("wall_seconds", 10**400), "wall_seconds is 1000"),
    (put("wall_seconds", -1), "wall_seconds is -1"),
    (put("best_iteration", 17), "best_iteration is 17"),
    (drop("validation"), "validation is missing"),
    (put("validation", "accuracy", 3), "validation: accuracy is 3"),
    (put("validation", "accuracy", 0, 81.58), "validation: accuracy is [81.58"),
    (drop("validation", "accuracy", 0), "not of one length"),
    (put("validation", "congruence_before", 0, 9), "congruence_before is [9"),
    (put("diverged", 3), "diverged is 3"),
]


def write(folder: Path, forge: Forgery) -> Path:
    record = json.loads(LINES[0])
    forge(record)
    file = folder / ledger.FILE
    file.write_text(LINES[1] + "\n" + json.dumps(record) + "\n")
    return file


@pytest.mark.parametrize(("forge", "message"), FORGED, ids=[message for _, message in FORGED])
def test_forged_records(tmp_path: Path, forge: Forgery, message: str) -> None:
    file = write(tmp_path, forge)
    with pytest.raises(FewShotError) as error:
        ledger.read_cells(file)
    assert str(error.value).startswith(f"{file} line 2: ")
    assert message in str(error.value)


def test_a_forged_record_is_not_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, put("tests", 0, "of_600", "mean", 60.0))
    assert reproduce_maml.main([str(ROOT / "experiments" / "small.yaml"), "--render", "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file} line 2: ")
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [ledger.FILE]


@pytest.mark.parametrize("forge", [drop("right"), put("tasks", 3), put("inner", 4), put("query_images", None)])
def test_forged_tests_of_a_run_folder(tmp_path: Path, forge: Forgery) -> None:
    record = json.loads(LINES[0])["tests"][0]
    forge(record)
    (tmp_path / "tests.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(FewShotError, match=r"tests\.jsonl line 1: "):
        ledger.read_tests(tmp_path / "tests.jsonl")


def test_a_ledger_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(FewShotError, match="is no file"):
            ledger.read_cells(path)
