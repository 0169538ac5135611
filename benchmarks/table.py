"""The common command line, the table on the screen and the JSON beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch

from benchmarks.interleave import Times, WorkerError, ratio
from benchmarks.presets import PRESETS, PROTOCOL
from fewshot_asam import __version__
from fewshot_asam.engine import EngineName
from fewshot_asam.errors import FewShotError
from fewshot_asam.training.build import resolve_device

PACKAGES = ("torch", "torchvision", "learn2learn", "numpy")
Row = Mapping[str, Any]


def parser(module: str, description: str | None, presets: Sequence[str] = PROTOCOL, rounds: int = 10) -> Any:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=(description or "").partition("\n")[0]
    )
    made.add_argument("--presets", nargs="+", choices=PRESETS, default=list(presets), metavar="NAME")
    made.add_argument("--rounds", type=count, default=rounds, help="timed runs of each contestant (%(default)s)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--engine", choices=get_args(EngineName), default="auto", help="ours (%(default)s)")
    made.add_argument("--output", type=Path, help="JSON file to write")
    return made


def command(name: str, main: Callable[[], object]) -> None:
    """Run a benchmark; what it cannot do is one line and exit status 1."""
    try:
        main()
    except (ImportError, FileNotFoundError, WorkerError, FewShotError) as error:
        sys.exit(f"{name}: {error}")


def count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on beside the code that is measured; `load` is the machine's, of the last minute."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "fewshot_asam": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "MKL_"))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def markdown(rows: Sequence[Row]) -> str:
    """A table with the first row's keys as its head."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def times_rows(preset: str, form: str, times: Mapping[str, Times]) -> list[Row]:
    """A row a contestant."""
    return [
        {
            "preset": preset,
            "form": form,
            "contestant": name,
            "median s": median(one.seconds),
            "min s": min(one.seconds),
            "max s": max(one.seconds),
            "first call s": one.first_call_s,
            "peak MB": None if one.peak_bytes is None else one.peak_bytes / 1e6,
        }
        for name, one in times.items()
    ]


def ratio_row(preset: str, form: str, found: Mapping[str, Any]) -> Row:
    """A row for what `interleave.ratio` found."""
    lower, upper = found["quartiles"]
    return {
        "preset": preset,
        "form": form,
        "time of": found["of"],
        "over that of": found["to"],
        "ratio of medians": found["of_medians"],
        "median of ratios": found["median"],
        "quartiles": f"{_text(lower)} to {_text(upper)}",
    }


class Report:
    """Collects measurements for the screen and for the JSON; raises `FewShotError` where there is no such device."""

    def __init__(self, device: str) -> None:
        resolve_device(device)
        self.data: dict[str, Any] = {"environment": environment(device), "results": []}
        self.tables: dict[str, list[Row]] = {"times": [], "ratios": []}

    def add(
        self, preset: str, form: str, times: Mapping[str, Times], pairs: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """A measurement and the ratio of each pair `(of, to)`; returns its part of the JSON."""
        result: dict[str, Any] = {
            "preset": preset,
            "form": form,
            "contestants": {name: one.summary() for name, one in times.items()},
            "ratios": [ratio(times, of, to) for of, to in pairs],
        }
        self.tables["times"] += times_rows(preset, form, times)
        self.tables["ratios"] += [ratio_row(preset, form, found) for found in result["ratios"]]
        self.data["results"].append(result)
        return result

    def finish(self, output: Path | None) -> dict[str, Any]:
        """Print the tables and write the JSON where it is wanted; returns what it holds."""
        print("\n\n".join(markdown(rows) for rows in self.tables.values() if rows))
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
            print(f"\nwritten to {output}")
        return self.data
