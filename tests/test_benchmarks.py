"""The benchmarks run, compare what computes the same, and report what they measured. Their figures are not tested."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # at the end: the package is the installed one

from benchmarks import (  # noqa: E402
    bfloat16,
    cost_curves,
    end_to_end,
    interleave,
    learn2learn_maml,
    learn2learn_reference,
    optimizers,
    roofline,
    rules,
    scaling,
    serial_part,
    table,
    worker,
)
from benchmarks.baselines import Contestant  # noqa: E402
from benchmarks.presets import PRESETS, Preset  # noqa: E402
from fewshot_asam.data.cache import SPLITS  # noqa: E402
from fewshot_asam.data.omniglot import CHARACTERS, DRAWINGS, split_characters  # noqa: E402
from peers import import_learn2learn  # noqa: E402

SMOKE = PRESETS["smoke"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the workers; the tests run in as many processes as there are cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def learn2learn() -> Any:
    return import_learn2learn()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a benchmark's main on the smoke preset; returns the JSON that it wrote."""

    def run_main(module: Any, *arguments: str) -> dict[str, Any]:
        output = tmp_path / "results.json"
        returned = module.main(["--presets", "smoke", "--rounds", "2", "--output", str(output), *arguments])
        written: dict[str, Any] = json.loads(output.read_text("utf-8"))
        assert written == json.loads(json.dumps(returned))
        assert written["environment"]["packages"]["torch"] == torch.__version__
        return written

    return run_main


class Inline:
    """Stands for `interleave.Process`, but builds and runs the contestants in the test's own process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.worker, self.started = worker.Worker(), time.perf_counter()
        self.patch = pytest.MonkeyPatch()
        for name, value in (environment or {}).items():
            self.patch.setenv(name, value)

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()

    def __call__(self, do: str, **order: Any) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self.worker, do)(**order)
        return answer

    def timed(self, index: int) -> dict[str, Any]:
        return self.worker.run(index)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker processes, which would each import torch and learn2learn; the allocator stays as it is."""
    monkeypatch.setattr(worker, "_keep_freed_memory", lambda: None)
    for module in (interleave, end_to_end):
        monkeypatch.setattr(module, "Process", Inline)


def check_times(result: dict[str, Any], names: set[str]) -> None:
    """Both contestants with positive times, and ratios that are those of the times."""
    contestants = result["contestants"]
    assert set(contestants) == names
    for one in contestants.values():
        assert len(one["seconds"]) == 2
        assert 0 < one["min_s"] <= one["median_s"] == median(one["seconds"]) <= one["max_s"]
        assert one["first_call_s"] > 0
        assert (one["peak_bytes"] is None) == (result["form"] == "one process")
    for found in result["ratios"]:
        of, to = contestants[found["of"]], contestants[found["to"]]
        assert found["of_medians"] == pytest.approx(of["median_s"] / to["median_s"])
        assert found["quartiles"][0] <= found["median"] <= found["quartiles"][1]


def test_learn2learn_maml(
    learn2learn: Any, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In real worker processes; the form in one process is `test_rules`'s."""
    monkeypatch.setattr(interleave, "FORMS", interleave.FORMS[:1])
    (result,) = run(learn2learn_maml)["results"]
    check_times(result, {"ours", "learn2learn"})
    losses = [one["losses"] for one in result["contestants"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "| smoke  | own processes | learn2learn |" in capsys.readouterr().out


def test_rules(learn2learn: Any, inline: None, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", ("agnostic_sam",))
    *both, own = run(rules)["results"]
    assert [result["form"] for result in (*both, own)] == [*interleave.FORMS, "one process"]
    for result in both:
        check_times(result, {"ours, agnostic_sam", "transcription, agnostic_sam"})
    check_times(own, {"ours, maml", "ours, agnostic_sam", "ours, agnostic_sam, constant"})
    assert [found["of"] for found in own["ratios"]] == ["ours, agnostic_sam", "ours, agnostic_sam, constant"]


def test_meta_gradients_equal(learn2learn: Any, run: Any) -> None:
    deviations = run(rules, "--check")["deviations"]
    assert {(row["rival"], row["rule"]) for row in deviations} == {
        ("learn2learn", "maml"),
        *(("transcription", rule) for rule in learn2learn_reference.STEPS),
    }
    assert max(row["torch.float64"] for row in deviations) < 1e-8


@pytest.fixture
def short_check(learn2learn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 and at the larger radius alone."""
    monkeypatch.setattr(rules, "RADII", rules.RADII[-1:])
    monkeypatch.setattr(rules, "TOLERANCES", {torch.float64: rules.TOLERANCES[torch.float64]})


def test_check_sees_another_rule(short_check: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(learn2learn_reference.STEPS, "agnostic_sam", learn2learn_reference.sharp_maml_low)
    with pytest.raises(interleave.WorkerError, match=r"differ from ours.*agnostic_sam"):
        rules.check("auto")


def test_check_sees_a_constant_perturbation(short_check: None, monkeypatch: pytest.MonkeyPatch) -> None:
    along = learn2learn_reference.along
    monkeypatch.setattr(
        learn2learn_reference, "along", lambda g, radius: [value.detach() for value in along(g, radius)]
    )
    with pytest.raises(interleave.WorkerError, match=r"differ from ours.*sharp_maml_low"):
        rules.check("auto")


def test_losses_are_compared() -> None:
    times = {"a": interleave.Times(1.0, [1.0], [2.0]), "b": interleave.Times(1.0, [1.0], [2.03])}
    with pytest.raises(interleave.WorkerError, match="do not compute the same"):
        interleave._check_losses(dict.fromkeys(times, Contestant("ours")), times)


@pytest.fixture
def omniglot(tmp_path: Path) -> Path:
    """Trees of all characters and as many drawings as Omniglot has, each the same white square."""
    square = tmp_path / "square.png"
    Image.new("1", (28, 28), 1).save(square)
    characters = sorted(name for split in SPLITS for name in split_characters(split))
    background = CHARACTERS["images_background"]
    for part, names in (("background", characters[:background]), ("evaluation", characters[background:])):
        for name in names:
            folder = tmp_path / "data" / f"images_{part}" / name
            folder.mkdir(parents=True)
            for number in range(DRAWINGS):
                os.link(square, folder / f"0001_{number + 1:02}.png")
    return tmp_path / "data"


def test_end_to_end(learn2learn: Any, inline: None, run: Any, omniglot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ours, first run", "ours, later run", "learn2learn, first run")
    monkeypatch.setattr(end_to_end, "CONTESTANTS", names)
    arguments = ("--rounds", "1", "--updates", "3", "--data-root", str(omniglot))
    written = run(end_to_end, *arguments)
    (result,) = written["results"]
    assert written["unpacking_s"] == 0
    assert set(result["contestants"]) == set(names)
    for one in result["contestants"].values():
        assert len(one["seconds"]) == 2
        assert 0 < one["first_call_s"] < one["to_first_update_s"][0] == one["totals_s"]["1"][0]
        assert 0 < one["sampling_share"] < 1
    first, later, theirs = (result["contestants"][name]["to_first_update_s"][0] for name in names)
    assert later < first
    (ratio,) = result["ratios_of_totals"]
    assert ratio["1"] == pytest.approx(theirs / first)


def test_end_to_end_needs_omniglot(learn2learn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither images_background\.zip nor images_background/ is in"):
        end_to_end.main(["--presets", "smoke", "--data-root", str(tmp_path)])
    with pytest.raises(SystemExit):
        end_to_end.main(["--presets", "mini_5w1s", "--data-root", str(tmp_path)])
    assert "mini_5w1s is not on Omniglot" in capsys.readouterr().err


def test_cost_curves(learn2learn: Any, inline: None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_curves, "AXES", {"tasks": (1, 8)})
    (result,) = run(cost_curves, "--picture", str(tmp_path / "curves.png"), "--axes", "tasks")["results"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert set(result["curves"]["tasks"]) == {"ours", "learn2learn"}
    for name, points in result["curves"]["tasks"].items():
        assert [point["value"] for point in points] == [1, 8]
        assert all(0 < point["min_s"] <= point["median_s"] and point["peak_bytes"] > 0 for point in points)
        (slope,) = [one["median_s"] for one in result["slopes"] if one["contestant"] == name]
        assert slope == pytest.approx(math.log(points[1]["median_s"] / points[0]["median_s"], 8))


def expected_flops(p: Preset) -> int:
    """By hand, with `f` a layer's forward convolution: an inner step's forward and backward pass take 3 f, their double
    backward 4 f and the forward's own backward 2 f; 4 f in all for the first layer, whose images need no gradient.
    """
    total = 0
    for layer, side in enumerate((p.side, p.side // 2, p.side // 4, p.side // 8)):
        per_image = 2 * 9 * side * side * (p.hidden if layer else p.channels) * p.hidden
        support, query = p.ways * p.shots * per_image, p.ways * p.queries * per_image
        total += p.tasks * (p.steps * support * (9 if layer else 4) + query * (3 if layer else 2))
    return total


def spare_flops(p: Preset) -> int:
    """What PyTorch computes besides: in the first layer's double backward, the gradient of the images."""
    return p.tasks * p.steps * p.ways * p.shots * 2 * 9 * p.side * p.side * p.channels * p.hidden


@pytest.mark.parametrize(
    "preset", [SMOKE, replace(SMOKE, shots=2, channels=3, side=42, hidden=6, steps=1, tasks=3)], ids=["smoke", "other"]
)
def test_flops(preset: Preset) -> None:
    total, of_convolutions = roofline.counted_flops(preset)
    assert of_convolutions == expected_flops(preset) + spare_flops(preset)
    assert expected_flops(preset) == sum(one.flops * count for one, count in roofline.convolutions(preset).items())
    assert of_convolutions <= total < 1.05 * of_convolutions  # the statistics of patches, the head


def test_roofline(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "keep_freed_memory", lambda: None)
    (result,) = run(roofline)["results"]
    assert result["needed_flops"] == result["convolution_flops"] - spare_flops(SMOKE) == expected_flops(SMOKE)
    assert result["useful_flops"] == result["counted_flops"] - spare_flops(SMOKE)
    assert result["achieved"] == pytest.approx(result["useful_flops"] / median(result["seconds"]))
    peak = max(result["matmul_peak"], *(rate["flops_per_s"] for rate in result["rates"]))
    assert result["share_of_peak"] == pytest.approx(result["achieved"] / peak)
    assert 0 < result["share_of_peak"] < 1
    assert 0 < result["ideal_s"] < result["median_s"]


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module for workers whose contestants need no library."""
    source = (
        "def allocate(size):\n    return lambda: {'length': len(bytearray(size))}\n"
        "def fail():\n    print('noise')\n    return lambda: {}['absent']\n"
        "def end():\n    raise SystemExit(3)\n"
    )
    (tmp_path / "toys.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's account of a process's memory")
def test_processes_are_timed_on_the_same_numbers(run: Callable[..., dict[str, Any]]) -> None:
    """Their losses are compared by the benchmark itself, which the last assertion shows to be of real iterations."""
    written = run(scaling)
    (result,) = written["results"]
    one = result["contestants"]["1 process"]
    assert one["losses"][0] != one["losses"][1]
    for row, several in zip(written["efficiency"], ("2 forks", "2 processes"), strict=True):
        two = result["contestants"][several]
        assert row["of"] == several
        assert len(one["seconds"]) == len(two["seconds"]) == 2
        assert math.isclose(2 * row["efficiency"], row["speed-up"])
        assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-3


def test_bfloat16(run: Callable[..., dict[str, Any]]) -> None:
    (row,) = run(bfloat16)["bfloat16"]
    assert math.isclose(row["times as fast"], row["float32"] / row["bfloat16"])
    assert 0.5 < row["cosine"] < 1 - 1e-7


def test_serial_part(run: Callable[..., dict[str, Any]]) -> None:
    (row,) = run(serial_part)["serial_part_ms"]
    assert row["serial"] > 0
    assert row["a task"] > 0
    assert math.isclose(row["1"], row["serial"] + 2 * row["a task"])
    assert row["64"] == row["2"] < row["1"]


def test_worker_measures_memory(toys: None) -> None:
    size = 64 * 2**20
    ballast = b"x" * 4 * size  # a peak of this process, which a worker's must not contain
    with interleave.Process() as process:
        process(do="build", factory="toys:allocate", arguments={"size": size}, device="cpu")
        assert process.timed(0)["length"] == size
        assert 0.9 * size < process(do="memory")["peak_bytes"] < 1.5 * size
    del ballast


def test_worker_failures(toys: None) -> None:
    with interleave.Process() as process:
        process(do="build", factory="toys:fail", arguments={}, device="cpu")
        with pytest.raises(interleave.WorkerError, match="KeyError: 'absent'"):
            process(do="run", index=0)
        with pytest.raises(interleave.WorkerError, match="ended with status 3"):
            process(do="build", factory="toys:end", arguments={}, device="cpu")


def test_ratio() -> None:
    times = {"slow": interleave.Times(0.0, [2.0, 9.0, 8.0]), "fast": interleave.Times(0.0, [1.0, 3.0, 2.0])}
    found = interleave.ratio(times, "slow", "fast")
    assert found == {"of": "slow", "to": "fast", "of_medians": 4.0, "median": 3.0, "quartiles": [2.5, 3.5]}


def test_markdown() -> None:
    assert table.markdown([{"name": "a", "s": 0.123456}, {"name": "bcdef", "s": None}]) == (
        "| name  | s      |\n|-------|--------|\n| a     | 0.1235 |\n| bcdef |        |"
    )


def test_the_optimizers_steps(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    optimizers.main(["--networks", "small", "--rounds", "2", "--output", str(output)])
    rows = json.loads(output.read_text("utf-8"))["optimizers"]
    assert {row["optimizer"]: row["gradients"] for row in rows} == {
        "sgd": 1,
        "sam": 2,
        "friendly_sam": 2,
        "agnostic_sam": 2.5,
    }
    assert all(math.isclose(row["times SGD's"], row["step, s"] / rows[0]["step, s"]) for row in rows)
