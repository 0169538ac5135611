"""Copies what a run has trained into results/weights, to be tested, used and gone on with by others.

    python scripts/publish_run.py runs/reproduce/CELL [...]

Settings, curves, summary and weights; of a run that is not finished its last checkpoint too. No path of this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from fewshot_asam.training.checkpoint import STATES
from fewshot_asam.training.config import to_yaml
from fewshot_asam.training.run_folder import SETTINGS, stored_settings

SUMMARY = "summary.json"
FILES = ("metrics.jsonl", "curves.png", "best.safetensors", "last.safetensors")


def publish(run: Path, parent: Path) -> Path:
    """Copies one run into a folder of its name in `parent`, in place of what was there."""
    config = replace(stored_settings(run), data_root=None, output_dir=None)
    folder = parent / run.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text(to_yaml(config))
    for name in FILES:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    if (run / SUMMARY).exists():
        summary = {**json.loads((run / SUMMARY).read_text("utf-8")), "data_root": None, "output_dir": None}
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    else:
        newest = max((run / STATES).glob("*.ckpt"))
        (folder / STATES).mkdir()
        shutil.copyfile(newest, folder / STATES / newest.name)
    return folder


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=Path("results/weights"))
    given = parser.parse_args()
    for run in given.runs:
        print(publish(run, given.to))


if __name__ == "__main__":
    main()
