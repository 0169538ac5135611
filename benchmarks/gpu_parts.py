"""The parts of `benchmarks.gpu`, each a function of an argument, the device, whether to be brief, and `save`.

Each returns, and saves as it goes, plain data: `tables` (lists of rows by title), `notes`, and what else it found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import learn2learn_reference as theirs
from benchmarks.baselines import copy_weights
from benchmarks.gpu import ITERATIONS, ROOT, Save
from benchmarks.learn2learn_stand_in import learn2learn as stand_in
from benchmarks.presets import PRESETS, Preset, episodes
from benchmarks.roofline import convolutions
from benchmarks.table import environment
from fewshot_asam.data.images import ImageSet
from fewshot_asam.engine.candidates import Candidate, alike, candidates
from fewshot_asam.engine.cuda_graph import CudaGraphs
from fewshot_asam.engine.precision import precision
from fewshot_asam.episodes import EpisodeSampler
from fewshot_asam.learners import MetaLearner
from fewshot_asam.models import build_model, gpu_kernels
from fewshot_asam.models.gpu_kernels import Kernels, convolution, norm_relu_pool
from fewshot_asam.models.norm import EPS
from fewshot_asam.rules import rule_class
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.gpu_rehearsal import device_clock, timed
from fewshot_asam.training.meta_step import iteration, optimizer

Found = dict[str, Any]
PRECISIONS: tuple[Any, ...] = ("float32", "tf32", "bfloat16")
REPEATS = 10


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median of some runs, after one or two more, the device's work included."""
    for _ in range(min(2, repeats)):
        run()
    times = []
    for _ in range(repeats):
        started = device_clock()
        run()
        times.append(device_clock() - started)
    return median(times)


def ceilings(_: str, device: str, smoke: bool, save: Save) -> Found:
    """The most that the device moves and multiplies: a copy, and products of matrices in each precision."""
    elements = 2**18 if smoke else 2**29
    x = torch.rand(elements, device=device)
    y = torch.empty_like(x)
    found: Found = {"environment": environment(device), "copy_bytes_per_s": 8 * elements / seconds(lambda: y.copy_(x))}
    for name in PRECISIONS:
        found[f"{name}_flops_per_s"] = product_rate(name, device, smoke)
    rows = [{"what": "copy, GB/s", "measured": found["copy_bytes_per_s"] / 1e9}]
    rows += [{"what": f"{name}, TFLOP/s", "measured": found[f"{name}_flops_per_s"] / 1e12} for name in PRECISIONS]
    return {**found, "tables": {"measured": rows}}


def product_rate(name: Any, device: str, smoke: bool) -> float:
    """FLOP/s of a product of two square matrices in that precision."""
    side = 256 if smoke else 8192
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    with precision(name, torch.device(device)):
        return 2 * side**3 / seconds(lambda: a @ b)


def kernels(_: str, device: str, smoke: bool, save: Save) -> Found:
    """The Triton block's tail against the same in PyTorch, at the shapes of Mini-ImageNet, with its bandwidth."""
    if not gpu_kernels.runs_on(torch.device(device)):
        return {"reason": "needs Triton, and a GPU or TRITON_INTERPRET=1"}
    copy = ceilings("", device, smoke, save)["copy_bytes_per_s"]
    found: Found = {"tables": {"the tail after a convolution": []}}
    shapes = [(2, 4, 6, 6)] if smoke else [(n, 128, side, side) for n in (5, 75) for side in (84, 42, 21, 10)]
    for shape in shapes:
        for channels_last in (False, True):
            found["tables"]["the tail after a convolution"].append(_tail(shape, channels_last, device, copy, smoke))
            save(found)
    found["tables"]["tiles"] = _tiles(shapes[0], device, smoke)
    return found


def _tiles(shape: tuple[int, ...], device: str, smoke: bool) -> list[Found]:
    """The tail to second order with other tiles and warps than `norm_relu_pool` has."""
    y = torch.randn(shape, device=device, requires_grad=True)
    gamma, beta = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))
    usual, options, rows = norm_relu_pool.TILE, dict(norm_relu_pool.OPTIONS), []
    try:
        for tile, warps in product(*([64], [4]) if smoke else ([256, 512, 1024, 2048], [2, 4, 8])):
            norm_relu_pool.TILE, norm_relu_pool.OPTIONS["num_warps"] = tile, warps
            run = partial(_to_second_order, norm_relu_pool.norm_relu_pool, y, gamma, beta)
            taken = seconds(run, 1 if smoke else REPEATS)
            row = {"shape": str(list(shape)), "tile": tile, "warps": warps}
            rows.append({**row, "to second order us": 1e6 * taken})
    finally:
        norm_relu_pool.TILE = usual
        norm_relu_pool.OPTIONS.update(options)
    return rows


def _to_second_order(function: Callable[..., Tensor], y: Tensor, gamma: Tensor, beta: Tensor) -> None:
    out = function(y, gamma, beta, EPS)
    first = torch.autograd.grad(out.sum(), [y, gamma, beta], create_graph=True)
    torch.autograd.grad(first[0].square().sum() + first[1].sum(), [y, gamma])


def _tail(shape: tuple[int, ...], channels_last: bool, device: str, copy: float, smoke: bool) -> Found:
    kind = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.randn(shape, device=device).contiguous(memory_format=kind).requires_grad_()
    gamma, beta = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))

    def plain(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        scale = gamma * torch.rsqrt(var + eps)
        shift = beta - mean * scale
        pooled = torch.nn.functional.max_pool2d(y, 2)
        return torch.relu(pooled * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))

    row: Found = {"shape": str(list(shape)), "format": "channels-last" if channels_last else "contiguous"}
    dense, pooled, repeats = y.numel() * 4, y.numel(), 1 if smoke else REPEATS
    for name, function in (("Triton", norm_relu_pool.norm_relu_pool), ("PyTorch", plain)):
        with torch.no_grad():
            taken = seconds(lambda: function(y, gamma, beta, EPS), repeats)  # noqa: B023
        row[f"forward us, {name}"] = 1e6 * taken
        if name == "Triton":
            row["of copy bandwidth"] = (dense + 3.5 * pooled) / taken / copy  # y once; best written, read; place; out
        both = partial(_to_second_order, function, y, gamma, beta)
        row[f"to second order us, {name}"] = 1e6 * seconds(both, repeats)
    return row


def tests(_: str, device: str, smoke: bool, save: Save) -> Found:
    """The tests that need a GPU and the kernels' own; on a CPU the kernels are interpreted."""
    if find_spec("pytest") is None:
        return {"reason": "pytest is not installed"}
    interpreted = device == "cpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu_kernel_cases.py"]
    command += ["tests/test_gpu.py", "-rfE", "--tb=short", *["-k", "ties or plan or training_on"] * smoke]
    variables = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"counts": counts, "tables": {"counts": [counts]} if counts else {}, "notes": wrong, "log": lines[-200:]}


def preset(name: str, device: str, smoke: bool, save: Save) -> Found:
    """Every way to run one meta-gradient, learn2learn's style on the same device, options of the fastest way."""
    wanted = PRESETS[name]
    batch = episodes(wanted, device)
    flops = sum(one.flops * count for one, count in convolutions(wanted).items())
    found: Found = {"text": wanted.text, "convolution_flops": flops, "tables": {"ways": [], "options": [], "rules": []}}
    ways, options, rules = found["tables"].values()
    peak = product_rate("float32", device, smoke)
    rival = _their_seconds(wanted, batch, "maml")
    ways.append({"way": f"learn2learn's style ({_their_name()})", "ms": 1e3 * rival["seconds"], "MB": rival["MB"]})
    save(found)
    expected: Tensor | None = None
    best = (float("inf"), Candidate("vmap"))
    recorded = device == "cuda"
    given = candidates(_learner(wanted, device, "maml").model, torch.device(device))
    for candidate in given[:4] if smoke else given:
        row: Found = {"way": candidate.text}
        try:
            trial, memory = _trial(candidate, wanted, batch, recorded)
        except Exception as error:
            row["ms"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        else:
            row |= {"ms": 1e3 * trial.seconds, "MB": memory, "learn2learn / ours": rival["seconds"] / trial.seconds}
            row |= {"TFLOP/s": flops / trial.seconds / 1e12, "of the matrix peak": flops / trial.seconds / peak}
            expected = trial.gradient if expected is None else expected
            row["alike"] = alike(trial.gradient, expected)
            best = min(best, (trial.seconds, candidate), key=lambda pair: pair[0])
        ways.append(row)
        save(found)
    found["best"] = best[1].text
    found["fastest_convolutions"] = convolution.choices()
    _options(best[1], wanted, batch, device, options, lambda: save(found))
    for rule in ("sharp_maml_low", "agnostic_sam"):
        trial, _ = _trial(best[1], wanted, batch, recorded, rule)
        rival = _their_seconds(wanted, batch, rule)
        ratio = rival["seconds"] / trial.seconds
        row = {"rule": rule, "ms": 1e3 * trial.seconds, "transcription ms": 1e3 * rival["seconds"], "ratio": ratio}
        rules.append(row)
        save(found)
    return found


def _options(
    best: Candidate, wanted: Preset, batch: Any, device: str, rows: list[Found], save: Callable[[], None]
) -> None:
    """The best way with cuDNN's benchmark, with and without a CUDA graph, and in each precision."""
    exact = _trial(best, wanted, batch, False)[0].gradient
    benchmark = best._replace(kernels=Kernels(best.kernels.convolution, best.kernels.triton, cudnn_benchmark=True))
    for candidate in (best, benchmark):
        for graph in (True, False) if device == "cuda" else (False,):
            for name in PRECISIONS:
                with precision(name, torch.device(device)):
                    trial, memory = _trial(candidate, wanted, batch, graph)
                cosine = torch.cosine_similarity(trial.gradient.double(), exact.double(), dim=0).item()
                row = {"way": candidate.text, "CUDA graph": graph, "precision": name, "ms": 1e3 * trial.seconds}
                rows.append({**row, "MB": memory, "cosine to float32": cosine})
                save()


def _learner(wanted: Preset, device: str, rule: str) -> MetaLearner:
    model = build_model("conv4", wanted.ways, wanted.image_shape, wanted.hidden, seed=0).to(device)
    return MetaLearner(model, theirs.LR, rule_class(rule)())


def _trial(
    candidate: Candidate, wanted: Preset, batch: Any, graph: bool, rule: str = "maml"
) -> tuple[Any, float | None]:
    """A meta-gradient's time and gradient, and the megabytes that it needs beside weights and images."""
    device = batch.support_x.device.type
    learner = _learner(wanted, device, rule)
    learner.engine = candidate.batching
    before = _reset(device)
    with gpu_kernels.using(candidate.kernels):
        trial = timed(learner, learner.batch(batch), wanted.steps, recorder=CudaGraphs() if graph else None)
    return trial, _peak(device, before)


def _reset(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str, before: int) -> float | None:
    return (torch.cuda.max_memory_allocated() - before) / 1e6 if device == "cuda" else None


def _their_name() -> str:
    return "learn2learn" if _their_package() is not stand_in else "benchmarks/learn2learn_stand_in.py"


def _their_package() -> Any:
    """learn2learn where it is installed, else what stands in for it."""
    try:
        from benchmarks.peer_packages import import_learn2learn

        return import_learn2learn()
    except ImportError:
        return stand_in


def _their_seconds(wanted: Preset, batch: Any, rule: str) -> Found:
    """The same meta-gradient in learn2learn's style, from the same weights."""
    l2l, device = _their_package(), batch.support_x.device.type
    model = theirs.build_model(l2l, wanted).to(device)
    copy_weights(_learner(wanted, "cpu", "maml").model, model)
    maml = l2l.algorithms.MAML(model, lr=theirs.LR)
    step = None if rule == "maml" else theirs.STEPS[rule]

    def run() -> None:
        maml.zero_grad()
        theirs.meta_gradient(l2l, maml, batch, wanted.steps, step, 5e-4)

    before = _reset(device)
    return {"seconds": seconds(run, 3 if rule == "maml" else 1), "MB": _peak(device, before)}


def iterations(_: str, device: str, smoke: bool, save: Save) -> Found:
    """Whole iterations of Mini-ImageNet's protocol as `train_maml` has them: tasks drawn on the device, Adam's step."""
    wanted = PRESETS["smoke" if smoke else "mini_5w1s"]
    rows: list[Found] = []
    found: Found = {"tables": {f"{ITERATIONS:,} iterations of {wanted.text}": rows}}
    random = torch.randint(0, 256, (64 * 20, *wanted.image_shape), dtype=torch.uint8)
    images = ImageSet(random, torch.full((64,), 20), tuple(f"class{i:02d}" for i in range(64))).to(device)
    given, batch = candidates(_learner(wanted, device, "maml").model, torch.device(device)), episodes(wanted, device)
    for name in PRECISIONS:
        with precision(name, torch.device(device)):
            tried = [(_caught(one, wanted, batch), one) for one in (given[:2] if smoke else given)]
            best = min(tried, key=lambda pair: pair[0])[1]
            for rule in ("maml", "agnostic_sam"):
                with gpu_kernels.using(best.kernels):
                    taken = _an_iteration(wanted, images, rule, best, smoke)
                row = {"rule": rule, "precision": name, "way": best.text}
                rows.append({**row, "iterations/s": 1 / taken, "hours": ITERATIONS * taken / 3600})
                save(found)
    return found


def _caught(candidate: Candidate, wanted: Preset, batch: Any) -> float:
    """The seconds of a meta-gradient, recorded on a GPU; infinite where the candidate fails."""
    try:
        return float(_trial(candidate, wanted, batch, batch.support_x.device.type == "cuda")[0].seconds)
    except Exception:
        return float("inf")


def _an_iteration(wanted: Preset, images: ImageSet, rule: str, best: Candidate, smoke: bool) -> float:
    """Seconds of one, on the mean of many that are waited for together."""
    device = images.images.device.type
    config = TrainConfig(inner=rule, ways=wanted.ways, shots=wanted.shots, queries=wanted.queries, iterations=1000)
    learner = _learner(wanted, device, rule)
    learner.engine = best.batching
    adam = optimizer(learner, config)
    iterate = iteration(learner, adam, config)
    sampler = EpisodeSampler(images, wanted.ways, wanted.shots, wanted.queries, seed=0)

    def once() -> None:
        iterate(learner.batch(sampler.sample(wanted.tasks)))

    for _ in range(5):
        once()
    many = 2 if smoke else 50
    started = device_clock()
    for _ in range(many):
        once()
    return (device_clock() - started) / many
