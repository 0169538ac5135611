"""The one command for a GPU runs through on a CPU; parts that fail or take too long cost nothing but themselves."""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # at the end: the package is the installed one

from benchmarks import gpu, learn2learn_reference  # noqa: E402
from benchmarks.baselines import copy_weights, their_name  # noqa: E402
from benchmarks.learn2learn_stand_in import learn2learn as stand_in  # noqa: E402
from benchmarks.presets import PRESETS, PROTOCOL, episodes  # noqa: E402
from fewshot_asam.engine.candidates import parsed  # noqa: E402
from fewshot_asam.learners import MAML, MetaAgnosticSAM, SharpMAML  # noqa: E402
from fewshot_asam.models import build_model  # noqa: E402
from peers import import_learn2learn  # noqa: E402

SMOKE = PRESETS["smoke"]


def test_every_part_runs_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.main(["--device", "cpu", "--smoke", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "gpu.json").read_text("utf-8")) == found
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]
    page = (tmp_path / "out" / "gpu.md").read_text("utf-8")
    assert page in capsys.readouterr().out
    parts = found["parts"]
    assert [*parts] == ["ceilings", "preset smoke", "iterations", "kernels", "tests"]
    with_triton = "done" if find_spec("triton") else "skipped"
    ended = {name: part["status"] for name, part in parts.items()}
    assert ended == {**dict.fromkeys(parts, "done"), "kernels": with_triton}
    if with_triton == "done":
        tails, tiles = parts["kernels"]["tables"].values()
        assert [row["format"] for row in tails] == ["contiguous", "channels-last"]
        assert all(row["of copy bandwidth"] > 0 for row in tails)
        assert len(tiles) == 1
    assert parts["ceilings"]["copy_bytes_per_s"] > 0
    ways, options, rules = parts["preset smoke"]["tables"].values()
    assert ways[0]["way"].startswith("learn2learn's style (")
    assert [parsed(row["way"]) is not None for row in ways[1:]] == [True] * 4
    assert all(row["alike"] and row["ms"] > 0 for row in ways[1:])
    assert len(options) == 6
    assert [row["cosine to float32"] > 0.9 for row in options] == [True] * 6
    assert [row["rule"] for row in rules] == ["sharp_maml_low", "agnostic_sam"]
    (rows,) = parts["iterations"]["tables"].values()
    assert all(row["hours"] == pytest.approx(60_000 / row["iterations/s"] / 3600) for row in rows)
    assert parts["tests"]["counts"]["passed"] > 0
    assert "failed" not in parts["tests"]["counts"]


def test_a_part_that_fails_or_takes_too_long_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [gpu.Part("broken", "no_such_part", "", 60), gpu.Part("slow", "preset", "smoke", 1)]
    monkeypatch.setattr(gpu, "SMOKE_PATIENCE", 1)
    monkeypatch.setattr(gpu, "parts", lambda presets: given)
    parts = gpu.main(["--device", "cpu", "--smoke", "--output", str(tmp_path)])["parts"]
    assert parts["broken"]["status"] == parts["slow"]["status"] == "stopped"
    assert "no_such_part" in parts["broken"]["reason"]
    assert parts["slow"]["reason"] == "not done in 1 s"
    assert "not done in 1 s" in (tmp_path / "gpu.md").read_text("utf-8")


def test_what_a_part_found_before_it_stopped_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stderr = 1, "Traceback\nRuntimeError: CUDA error\n"

    def run(command: list[str], **_: Any) -> Done:
        Path(command[command.index("--output") + 1]).write_text('{"tables": {"ways": [{"a": 1}, {"b": 2}]}}')
        return Done()

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "parts", lambda presets: [gpu.Part("one", "preset", "smoke", 9)])
    part = gpu.main(["--output", str(tmp_path)])["parts"]["one"]
    assert (part["status"], part["reason"]) == ("stopped", "RuntimeError: CUDA error")
    assert "| 1 |   |" in (tmp_path / "gpu.md").read_text("utf-8")


def test_no_part_begins_after_the_minutes(tmp_path: Path) -> None:
    parts = gpu.main(["--minutes", "0.01", "--output", str(tmp_path)])["parts"]
    assert {part["status"] for part in parts.values()} == {"skipped"}
    assert len(parts) == 4 + len(PROTOCOL)
    assert sum(part.seconds for part in gpu.parts(list(PRESETS)[:4])[:-3]) < 8.5 * 60


@pytest.mark.parametrize("rule", ["maml", "sharp_maml_low", "agnostic_sam"])
def test_the_stand_in_computes_what_learn2learn_and_we_compute(rule: str) -> None:
    batch = episodes(SMOKE, dtype=torch.float64)
    ours = build_model("conv4", SMOKE.ways, SMOKE.image_shape, SMOKE.hidden, seed=0).double()
    kinds: dict[str, Any] = {"maml": MAML, "sharp_maml_low": SharpMAML, "agnostic_sam": MetaAgnosticSAM}
    options = {} if rule == "maml" else {"rho": 0.05}
    kinds[rule](ours, learn2learn_reference.LR, engine="loop", **options).meta_backward(batch, SMOKE.steps)
    packages = [stand_in]
    with contextlib.suppress(pytest.skip.Exception):
        packages.append(import_learn2learn())
    for l2l in packages:
        theirs = learn2learn_reference.build_model(l2l, SMOKE).double()
        copy_weights(ours, theirs)
        maml = l2l.algorithms.MAML(theirs, lr=learn2learn_reference.LR)
        step = None if rule == "maml" else learn2learn_reference.STEPS[rule]
        learn2learn_reference.meta_gradient(l2l, maml, batch, SMOKE.steps, step, 0.05)
        found = dict(theirs.named_parameters())
        for name, value in ours.named_parameters():
            torch.testing.assert_close(found[their_name(name)].grad, value.grad, rtol=1e-7, atol=1e-9)
