"""From Omniglot's files on disk to finished meta-updates: ours against learn2learn with its own data pipeline.

Each contestant is a process of its own, as its users run it; a round starts one after the other, times each from the
start of its process to its first finished update, and then takes the later updates in turn, one of each. There is no
form in one process: what a start costs could not be told apart there.

- `ours, first run`: decodes the official archives, compiles its functions for CPUs and writes both to an empty cache
  folder; `ours, later run` finds them there.
- `learn2learn, first run`: `get_tasksets("omniglot")`, which visits every image once to note its class in a file;
  `learn2learn, later run` finds that file. Both decode an image again each time that it is drawn.
- `learn2learn, in memory`: the same pieces over its `OnDeviceDataset`, which decodes all images at every start.

What is not equal, and in whose favour:

- learn2learn reads unpacked trees; unpacking the archives is timed apart and charged to nobody. Its archives' hashes
  are not checked. It scales its images and turns them with the resampling of its own benchmark.
- All files are in the operating system's cache: both sides' have been read or written just before.
- Its training tasks are drawn from all 1,623 characters, because its benchmark hands the unfiltered dataset to
  `FusedNWaysKShots`, and all classes of a task are turned by one angle, because `RandomClassRotation`'s closures share
  a variable; ours are Vinyals' 1,028 training characters in four rotations. Neither changes the work.
- `get_tasksets(device=...)` would decode everything and then not use it (learn2learn 0.2.0), so it is not passed.
"""

from __future__ import annotations

import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import table
from benchmarks.interleave import Process, Times
from benchmarks.peer_packages import require
from benchmarks.presets import PRESETS, Preset
from fewshot_asam.data.archives import locate
from fewshot_asam.data.omniglot import HASHES, SUBFOLDERS

TOTALS = (1, 10, 100)
"""Numbers of updates whose total time is reported, as far as so many are run."""
SUITABLE = ("omniglot_5w1s", "omniglot_5w1s_small", "omniglot_20w1s", "smoke")
PAIRS = (
    ("learn2learn, first run", "ours, first run"),
    ("learn2learn, later run", "ours, later run"),
    ("learn2learn, in memory", "ours, later run"),
)
CONTESTANTS = ("ours, first run", "learn2learn, first run", "ours, later run", *(of for of, _ in PAIRS[1:]))
"""In the order in which a round starts them; a first run leaves what the later one finds."""


@dataclass
class Course:
    """One contestant's updates over all rounds.

    **Arguments:**

    - `to_first_update_s`: since the start of the process, one a round.
    - `totals_s`: since the start of the process, for each of `TOTALS`, one a round.
    - `later`: each update but a round's first; its `first_call_s` is the last round's.
    - `sample_s`: seconds that the tasks of each later update took.
    """

    to_first_update_s: list[float] = field(default_factory=list)
    totals_s: dict[int, list[float]] = field(default_factory=dict)
    later: Times = field(default_factory=lambda: Times(0.0))
    sample_s: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what the JSON holds."""
    parser = table.parser("end_to_end", __doc__, SUITABLE[:3], rounds=3)
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds Omniglot's archives or trees")
    parser.add_argument("--updates", type=table.count, default=TOTALS[-1], help="meta-updates a round (%(default)s)")
    options = parser.parse_args(argv)
    if unsuitable := set(options.presets).difference(SUITABLE):
        parser.error(f"{', '.join(unsuitable)} is not on Omniglot; choose from {', '.join(SUITABLE)}")
    if options.updates < 2:
        parser.error("--updates is 1; expected at least 2, one of them a later one")
    require("learn2learn")
    report = table.Report(options.device)
    with TemporaryDirectory() as temporary:
        report.data["unpacking_s"] = _unpack(options.data_root, Path(temporary))
        for name in options.presets:
            print(f"{name}: {PRESETS[name].text}", file=sys.stderr)
            courses: dict[str, Course] = {contestant: Course() for contestant in CONTESTANTS}
            for number in range(options.rounds):
                _round(courses, PRESETS[name], Path(temporary), number, options)
            _report(report, name, courses)
    print(f"unpacking the archives: {report.data['unpacking_s']:.1f} s, charged to nobody", file=sys.stderr)
    return report.finish(options.output)


def _unpack(root: Path, folder: Path) -> float:
    """Lay Omniglot out as torchvision wants it; returns the seconds of unpacking, 0 where there are trees."""
    (folder / "omniglot-py").mkdir()
    seconds = 0.0
    for part in HASHES:
        tree, archive = (locate(root, (name,), SUBFOLDERS) for name in (part, f"{part}.zip"))
        if tree is None and archive is None:
            raise FileNotFoundError(f"neither {part}.zip nor {part}/ is in {root} or its subfolder omniglot")
        started = time.perf_counter()
        if tree is not None:
            (folder / "omniglot-py" / part).symlink_to(tree.resolve())
        else:
            with zipfile.ZipFile(archive or "") as opened:
                opened.extractall(folder / "omniglot-py")
            seconds += time.perf_counter() - started
        (folder / "omniglot-py" / f"{part}.zip").touch()
    return seconds


def _round(courses: dict[str, Course], preset: Preset, folder: Path, number: int, options: Any) -> None:
    """A fresh process of each contestant, to its last update."""
    cache = folder / f"cache-{preset.ways}-{number}"
    (folder / "omniglot-bookkeeping.pkl").unlink(missing_ok=True)
    with ExitStack() as stack:
        processes, totals = {}, {}
        for name, course in courses.items():
            process = stack.enter_context(Process({"FEWSHOT_ASAM_CACHE": str(cache)}))
            process(do="build", **_order(name, preset, folder, options))
            first = process(do="run", index=0)
            totals[name] = time.perf_counter() - process.started
            course.to_first_update_s.append(totals[name])
            course.totals_s.setdefault(1, []).append(totals[name])
            course.later.first_call_s = first["seconds"]
            processes[name] = process
        for update in range(2, options.updates + 1):
            for name, process in processes.items():
                course, answer = courses[name], process.timed(0)
                totals[name] += answer["seconds"]
                course.later.seconds.append(answer["seconds"])
                course.sample_s.append(answer["sample_s"])
                if update in TOTALS:
                    course.totals_s.setdefault(update, []).append(totals[name])


def _order(name: str, preset: Preset, folder: Path, options: Any) -> dict[str, Any]:
    arguments = {"preset": asdict(preset), "device": options.device}
    if name.startswith("ours"):
        arguments |= {"root": str(options.data_root), "engine": options.engine}
        factory = "ours"
    else:
        arguments |= {"root": str(folder), "in_memory": name.endswith("in memory")}
        factory = "learn2learn"
    return {
        "factory": f"benchmarks.pipelines:{factory}",
        "arguments": arguments,
        "device": options.device,
        "keep_freed_memory": factory == "ours",
    }


def _report(report: table.Report, preset: str, courses: dict[str, Course]) -> None:
    pairs = [(of, to) for of, to in PAIRS if of in courses and to in courses]
    times = {name: course.later for name, course in courses.items()}
    result = report.add(preset, "later updates", times, pairs)
    for name, course in courses.items():
        share = sum(course.sample_s) / sum(times[name].seconds)
        medians = {str(count): median(seconds) for count, seconds in course.totals_s.items()}
        result["contestants"][name] |= {
            "to_first_update_s": course.to_first_update_s,
            "totals_s": course.totals_s,
            "sampling_share": share,
        }
        report.tables.setdefault("totals", []).append(
            {
                "preset": preset,
                "contestant": name,
                **{f"s to update {count}": seconds for count, seconds in medians.items()},
                "sampling, share of a later update": share,
            }
        )
    for of, to in pairs:
        ratios = {n: median(seconds) / median(courses[to].totals_s[n]) for n, seconds in courses[of].totals_s.items()}
        result.setdefault("ratios_of_totals", []).append({"of": of, "to": to, **{str(n): r for n, r in ratios.items()}})
        report.tables.setdefault("ratios of totals", []).append(
            {"preset": preset, "time of": of, "over that of": to, **{f"to update {n}": r for n, r in ratios.items()}}
        )


if __name__ == "__main__":
    table.command("end_to_end", main)
