"""How far a MAML meta-gradient is from the fastest that this machine computes its convolutions.

FLOPs are counted by PyTorch's `FlopCounterMode` on one meta-gradient of engine `loop`, and again from the equations:
`convolutions` says how often each layer's forward, input-gradient and weight-gradient convolution is needed, and a
disagreement is printed, since an engine that computes something twice must not be paid for it: PyTorch's own second
derivative of a convolution has one for images that need no gradient, which is not counted. Peaks are measured in
the same run, between the meta-gradients: the best rate of any of the network's own convolutions, on the images of one
task and of all tasks at once, in channels-last and in plain memory, and of a product of two 2048x2048 matrices.

- `of the peak` is the achieved rate over the best of all these. FLOPs are those of sums over taps. Ours convolves with
  fewer products, by Winograd's minimal filtering, so its convolutions may exceed PyTorch's best rate.
- `ideal` is the time if each convolution ran at its own best rate and all else were free: what is left to gain.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import table
from benchmarks.baselines import Contestant, make
from benchmarks.presets import PRESETS, Preset, episodes
from fewshot_asam.runtime.allocator import keep_freed_memory

KINDS = ("forward", "input gradient", "weight gradient")
FORMATS = (torch.contiguous_format, torch.channels_last)
MATRIX = 2048
SHORTEST = 0.01
"""Seconds of a measurement; a kernel that is shorter is repeated."""


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution with padding 1, or one of its gradients; all three take the same FLOPs.

    **Arguments:** `images` of `side` pixels, `channels` in, `filters` out, `kind` of `KINDS`.
    """

    images: int
    side: int
    channels: int
    filters: int
    kind: str

    @property
    def flops(self) -> int:
        """A multiplication and an addition count as two."""
        return 2 * 9 * self.images * self.side**2 * self.channels * self.filters


def convolutions(preset: Preset) -> dict[Convolution, int]:
    """How often each is needed in one second-order MAML meta-gradient of Conv4, over all tasks.

    An inner step: the forward pass, both gradients, and in the meta-gradient the derivative of both, which is a forward
    twice and each gradient once, and then both gradients of the forward pass again. The queries: forward and both
    gradients. The first block needs no gradient of its images, and what depends on one falls away.
    """
    found: dict[Convolution, int] = {}
    inner, query = preset.steps * preset.tasks, preset.tasks
    for layer in range(4):
        channels = preset.channels if layer == 0 else preset.hidden
        for images, often, counts in (
            (preset.ways * preset.shots, inner, (2, 0, 2) if layer == 0 else (3, 3, 3)),
            (preset.ways * preset.queries, query, (1, 0, 1) if layer == 0 else (1, 1, 1)),
        ):
            for kind, count in zip(KINDS, counts, strict=True):
                one = Convolution(images, preset.side // 2**layer, channels, preset.hidden, kind)
                found[one] = found.get(one, 0) + often * count
    return {one: count for one, count in found.items() if count}


def counted_flops(preset: Preset) -> tuple[int, int]:
    """FLOPs of one meta-gradient of engine `loop` in plain PyTorch, which is counted: all, and of convolutions."""
    run = make(Contestant("ours", engine="loop", processes=1), preset, episodes(preset))
    with FlopCounterMode(display=False) as counter:
        run()
    by_operator = counter.get_flop_counts()["Global"]
    convolving = sum(flops for operator, flops in by_operator.items() if "convolution" in str(operator))
    return counter.get_total_flops(), convolving


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    options = table.parser("roofline", __doc__, rounds=5).parse_args(argv)
    keep_freed_memory()
    report = table.Report(options.device)
    for name in options.presets:
        print(f"{name}: {PRESETS[name].text}", file=sys.stderr)
        result = {"preset": name, **_measured(PRESETS[name], options.device, options.engine, options.rounds)}
        report.data["results"].append(result)
        report.tables.setdefault("limit", []).append(_row(result))
        if result["convolution_flops"] != result["needed_flops"]:
            counted, needed = (f"{result[key]:,}" for key in ("convolution_flops", "needed_flops"))
            print(f"{name}: {counted} FLOPs of convolutions counted, {needed} needed and rated", file=sys.stderr)
    return report.finish(options.output)


def _measured(preset: Preset, device: str, engine: str, rounds: int) -> dict[str, Any]:
    """Meta-gradients and kernels in turn; the median of the former, the best of the latter."""
    total, convolving = counted_flops(preset)
    needed = convolutions(preset)
    run = make(Contestant("ours", engine=engine), preset, episodes(preset, device))
    run()
    seconds: list[float] = []
    matmul, rates = 0.0, dict.fromkeys(needed, 0.0)
    for _ in range(rounds):
        seconds.append(_seconds(run, device))
        matmul = max(matmul, 2 * MATRIX**3 / _repeated(_product(device), device))
        for one in needed:
            rates[one] = max(rates[one], *_rates(one, preset.tasks, device))
    useful = total - convolving + sum(one.flops * count for one, count in needed.items())
    taken, peak = median(seconds), max(matmul, *rates.values())
    ideal = sum(one.flops * count / rates[one] for one, count in needed.items())
    return {
        "engine": engine,
        "counted_flops": total,
        "convolution_flops": convolving,
        "needed_flops": sum(one.flops * count for one, count in needed.items()),
        "useful_flops": useful,
        "seconds": seconds,
        "median_s": taken,
        "achieved": useful / taken,
        "matmul_peak": matmul,
        "convolution_peak": max(rates.values()),
        "share_of_peak": useful / taken / peak,
        "ideal_s": ideal,
        "share_of_ideal": ideal / taken,
        "rates": [{**asdict(one), "count": count, "flops_per_s": rates[one]} for one, count in needed.items()],
    }


def _row(result: dict[str, Any]) -> table.Row:
    return {
        "preset": result["preset"],
        "engine": result["engine"],
        "GFLOP": result["useful_flops"] / 1e9,
        "median s": result["median_s"],
        "GFLOP/s": result["achieved"] / 1e9,
        "best convolution": result["convolution_peak"] / 1e9,
        "matmul": result["matmul_peak"] / 1e9,
        "of the peak": result["share_of_peak"],
        "ideal s": result["ideal_s"],
        "of the ideal": result["share_of_ideal"],
    }


def _rates(one: Convolution, tasks: int, device: str) -> Iterator[float]:
    """FLOP/s of a convolution on one task's images and on those of all, in both memory formats."""
    for images in sorted({one.images, one.images * tasks}):
        sized = replace(one, images=images)
        for memory_format in FORMATS:
            yield sized.flops / _repeated(_kernel(sized, memory_format, device), device)


def _kernel(one: Convolution, memory_format: torch.memory_format, device: str) -> Callable[[], object]:
    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device).contiguous(memory_format=memory_format)

    x = random(one.images, one.channels, one.side, one.side)
    filters = random(one.filters, one.channels, 3, 3)
    if one.kind == "forward":
        return lambda: torch.conv2d(x, filters, padding=1)
    y = random(one.images, one.filters, one.side, one.side)
    wanted = [one.kind == kind for kind in KINDS[1:]]
    return lambda: torch.ops.aten.convolution_backward(
        y, x, filters, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False]
    )


def _product(device: str) -> Callable[[], object]:
    a, b = (torch.rand(MATRIX, MATRIX, device=device) for _ in range(2))
    return lambda: a @ b


def _repeated(kernel: Callable[[], object], device: str) -> float:
    """Seconds of a kernel, after a warm-up, as the mean of as many runs as fill `SHORTEST`."""
    kernel()
    times = max(1, round(SHORTEST / _seconds(kernel, device)))

    def several() -> None:
        for _ in range(times):
            kernel()

    return _seconds(several, device) / times


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    table.command("roofline", main)
