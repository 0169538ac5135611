"""Look at the curvature, the loss surfaces and the gradients of trained runs.

examples:
  analyze_maml RUN                           # writes analysis/analysis.json and pictures, prints a table
  analyze_maml RUN1 RUN2 --tasks 40          # side by side on the same tasks, and the paired differences
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fewshot_asam.cli.surroundings import importing

with importing():
    import torch
    from tqdm import tqdm

    from fewshot_asam.analysis.report import RADII, Analysis, analyse
    from fewshot_asam.analysis.scipy_import import scipy_module
    from fewshot_asam.cli.analysis_output import figures, plain, table
    from fewshot_asam.cli.eval_maml import require_different, require_same_tasks
    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run
    from fewshot_asam.engine.precision import precision
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.runtime.allocator import keep_freed_memory
    from fewshot_asam.training.build import load_data, resolve_device
    from fewshot_asam.training.checkpoint import write_atomically, write_text
    from fewshot_asam.training.checks import require_count, require_seed
    from fewshot_asam.training.config import TrainConfig
    from fewshot_asam.training.given import require_given
    from fewshot_asam.training.identity import identify
    from fewshot_asam.training.run_folder import stored_settings
    from fewshot_asam.training.trained import WeightsName, evaluation_sampler, trained_learner


@dataclass(frozen=True)
class AnalysisConfig:
    """Settings of an analysis; the docstrings are the command line's help."""

    tasks: int = 20
    """test tasks that are adapted to and measured"""
    seed: int = 0
    """of the tasks, directions and random vectors"""
    weights: WeightsName = "best"
    """those that were best on the validation tasks, or the last ones"""
    radii: tuple[float, ...] = RADII
    """of the sharpness and of the step whose effect on the validation loss is measured"""
    eigenvalues: int = 5
    """how many of each Hessian, the largest"""
    meta_tasks: int = 4
    """tasks of the meta-loss whose Hessian is taken"""
    grid: int = 21
    """points along each side of the loss surfaces"""
    output_dir: Path = Path("analysis")
    """folder to write analysis.json and the pictures to"""
    data_root: Path | None = None
    """folder that holds the dataset's files, if not where the runs found them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""


FILE = "analysis.json"
EXTENT = 1.0
"""Half a side of the surfaces, in lengths of the filters."""
PLACES = ("output_dir", "data_root", "device")
"""Settings that change no number."""


def command(argv: Sequence[str]) -> None:
    """Parses the arguments, analyses the runs on the same tasks, writes and prints."""
    parser = Parser(prog="analyze_maml", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    add_settings(parser, AnalysisConfig)
    given: Any = parse(parser, argv)
    settings = AnalysisConfig(**{field.name: given[field.name] for field in fields(AnalysisConfig)})
    _check(settings)
    require_different(given.runs)
    scipy_module("sparse.linalg")  # minutes before it is needed
    configs = {folder: _config(Path(folder), settings) for folder in given.runs}
    require_same_tasks(configs)
    _make_folder(settings.output_dir)
    keep_freed_memory()
    found = _analysed(configs, settings)
    _write(found, configs, settings)
    print(table(found))
    print(f"written: {settings.output_dir / FILE} and pictures beside it")


def _write(found: dict[str, Analysis], configs: dict[str, TrainConfig], settings: AnalysisConfig) -> None:
    chosen = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in PLACES}
    text = json.dumps({"settings": chosen, **plain(found, configs)}, indent=1)
    write_text(settings.output_dir / FILE, text + "\n")
    for name, figure in figures(found).items():
        write_atomically(settings.output_dir / name, partial(figure.savefig, format="png", dpi=120))


def _check(settings: AnalysisConfig) -> None:
    require_count("tasks", settings.tasks, 4)
    require_seed("seed", settings.seed)
    for name in ("eigenvalues", "meta_tasks"):
        require_count(name, getattr(settings, name))
    require_count("grid", settings.grid, 2)
    radii = settings.radii
    if not radii or not all(0 < radius < math.inf for radius in radii) or len(set(radii)) != len(radii):
        raise FewShotError(f"radii are {list(radii)}; expected different numbers above 0, one at least")


def _config(folder: Path, settings: AnalysisConfig) -> TrainConfig:
    config = stored_settings(folder)
    require_given(config)
    return config if settings.data_root is None else replace(config, data_root=settings.data_root)


def _make_folder(folder: Path) -> None:
    if (folder / FILE).exists():
        raise FewShotError(f"{folder} has an {FILE} already; choose another --output-dir, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FewShotError(f"{folder} cannot be made ({error.strerror}); choose another --output-dir") from error


def _analysed(configs: dict[str, TrainConfig], settings: AnalysisConfig) -> dict[str, Analysis]:
    first = next(iter(configs.values()))
    device = resolve_device(settings.device)
    dataset = load_data(first, device)
    identity = identify(first, dataset)
    learners = {
        folder: trained_learner(Path(folder), config, dataset, identity.of(config), settings.weights).eval()
        for folder, config in configs.items()
    }
    episodes = evaluation_sampler(first, dataset.test, settings.seed).sample(settings.tasks)
    side = torch.linspace(-EXTENT, EXTENT, settings.grid).tolist()
    found = {}
    total = len(configs) * settings.tasks
    with precision("float32", device), tqdm(total=total, unit="task", desc="analysis", disable=None) as progress:
        for folder, learner in learners.items():
            found[folder] = analyse(
                learner,
                episodes,
                configs[folder].inner_steps,
                radii=settings.radii,
                eigenvalues=settings.eigenvalues,
                meta_tasks=settings.meta_tasks,
                side=side,
                seed=settings.seed,
                between=progress.update,
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv, several=False)


if __name__ == "__main__":
    raise SystemExit(main())
