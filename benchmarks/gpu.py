"""Everything that a GPU can tell of this package, in one command of less than nine minutes.

Each part runs in a process of its own with a limit of seconds, so that none costs the others more than its time: a
part that fails, or is not done in time, is reported with what it had found. The output folder then holds `gpu.json`
and `gpu.md`; send us both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.presets import PRESETS, PROTOCOL

ROOT = Path(__file__).parents[1]
ITERATIONS = 60_000
"""Of the published protocol on Mini-ImageNet."""
SMOKE_PATIENCE = 4
"""Times the seconds of a part that a smoke run waits for it, as a busy CPU may run it."""
Save = Callable[[dict[str, Any]], None]


class Part(NamedTuple):
    """A part by its name, the function of `gpu_parts` that does it with its argument, and its seconds."""

    name: str
    function: str
    argument: str
    seconds: int


def parts(presets: Sequence[str]) -> list[Part]:
    """What matters most comes first."""
    ceilings, iterations = Part("ceilings", "ceilings", "", 40), Part("iterations", "iterations", "", 90)
    kernels, tests = Part("kernels", "kernels", "", 60), Part("tests", "tests", "", 120)
    first, *others = [Part(f"preset {name}", "preset", name, 90) for name in presets]
    return [ceilings, first, iterations, kernels, tests, *others]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    options = arguments().parse_args(argv)
    presets = ["smoke"] if options.smoke else options.presets
    if options.part:
        return run_part(options)
    options.output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"parts": {}}
    for part in parts(presets):
        found["parts"][part.name] = guarded(part, options, until)
        write(found, options.output)
    print((options.output / "gpu.md").read_text("utf-8"))
    return found


def arguments() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--output", type=Path, required=True, help="folder for gpu.json and gpu.md")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PROTOCOL), metavar="NAME")
    made.add_argument("--minutes", type=float, default=8.5, help="for all parts together (%(default)s)")
    made.add_argument("--smoke", action="store_true", help="tiny problems, to see that everything runs")
    made.add_argument("--part", help=argparse.SUPPRESS)
    made.add_argument("--argument", default="", help=argparse.SUPPRESS)
    return made


def guarded(part: Part, options: argparse.Namespace, until: float) -> dict[str, Any]:
    """What a part found, in its own process, and how it ended."""
    left = until - time.monotonic()
    if left < 5:
        return {"status": "skipped", "reason": f"the {options.minutes:g} minutes were over"}
    limit = min(part.seconds * (SMOKE_PATIENCE if options.smoke else 1), left)
    path = options.output / "part.json"
    path.unlink(missing_ok=True)
    words = ["--part", part.function, "--argument", part.argument, "--device", options.device]
    words += ["--output", str(path), *["--smoke"] * options.smoke]
    started, reason = time.monotonic(), ""
    print(f"{part.name} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", *words],
            cwd=ROOT,
            env={
                **os.environ,
                **({"OMP_NUM_THREADS": "1"} if options.smoke else {}),
                **({"TRITON_INTERPRET": "1"} if options.device == "cpu" and part.function == "kernels" else {}),
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            },
            capture_output=True,
            text=True,
            timeout=limit,
        )
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = "" if done.returncode == 0 else (lines or [f"status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"not done in {limit:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.unlink(missing_ok=True)
    status = "stopped" if reason else "skipped" if "reason" in found else "done"
    return {"status": status, "seconds": seconds, **({"reason": reason} if reason else {}), **found}


def run_part(options: argparse.Namespace) -> dict[str, Any]:
    """A part, in the process that `guarded` started; what it finds is saved as it is found."""
    from benchmarks import gpu_parts

    def save(found: dict[str, Any]) -> None:
        fresh = options.output.with_suffix(".new")
        fresh.write_text(json.dumps(found), "utf-8")
        fresh.replace(options.output)

    found: dict[str, Any] = getattr(gpu_parts, options.part)(options.argument, options.device, options.smoke, save)
    save(found)
    return found


def write(found: dict[str, Any], folder: Path) -> None:
    """The JSON and the page, of as many parts as there are."""
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (folder / "gpu.md").write_text(page(found), "utf-8")


def page(found: dict[str, Any]) -> str:
    """The tables of all parts, after how each part ended."""
    ended = [
        {"part": name, "ended": part["status"], "s": part.get("seconds"), "why": part.get("reason")}
        for name, part in found["parts"].items()
    ]
    lines = ["# What a GPU said of fewshot_asam", ""]
    environment = found["parts"].get("ceilings", {}).get("environment", {})
    names = ("device", "date", "fewshot_asam", "python", "packages")
    lines += [f"- {name}: {environment[name]}" for name in names if name in environment]
    lines += ["", table(ended)]
    for name, part in found["parts"].items():
        for title, rows in part.get("tables", {}).items():
            lines += ["", f"## {name}: {title}", "", table(rows)] if rows else []
        lines += ["", *part["notes"]] if part.get("notes") else []
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, with a column for whatever any of the rows has."""
    from benchmarks.table import markdown

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown([{key: row.get(key) for key in columns} for row in rows])


if __name__ == "__main__":
    main()
