"""What `analyze_maml` writes and prints of its analyses: plain data, figures and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fewshot_asam.analysis.correlation import Correlation, rank_correlation
from fewshot_asam.analysis.pictures import Curve, contours, curves
from fewshot_asam.analysis.report import WAY, Analysis
from fewshot_asam.training.config import TrainConfig
from fewshot_asam.training.evaluation import interval

Tasks = dict[str, Tensor]
SETS = ("support", "query")
PLACES = [(name, when) for name in SETS for when in ("before", "after")]
FLATNESS = {
    "largest eigenvalue": "eigenvalues_support_after",
    "trace": "trace_support_after",
    "sharpness": "sharpness_support",
}
"""What is correlated with the query loss: of the support loss at the adapted parameters."""


def plain(found: dict[str, Analysis], configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """What `analysis.json` holds beside the settings: each quantity's mean, interval and values task by task."""
    return {
        "positions_on_the_path": list(WAY),
        "runs": {
            folder: {
                **{name: getattr(configs[folder], name) for name in ("title", "inner", "rho", "inner_steps")},
                "meta_loss": {name: values.tolist() for name, values in analysis.meta.items()},
                "tasks": {
                    name: {**_summary(values), "values": values.tolist()} for name, values in analysis.tasks.items()
                },
                "rank_correlation_with_query_loss": {
                    name: correlation._asdict() for name, correlation in _correlations(analysis.tasks).items()
                },
                "planes": {name: values.tolist() for name, values in analysis.planes.items()},
            }
            for folder, analysis in found.items()
        },
        "paired_differences": {
            name: {quantity: _summary(values) for quantity, values in differences.items()}
            for name, differences in _differences(found).items()
        },
    }


def figures(found: dict[str, Analysis]) -> dict[str, Figure]:
    """The pictures by file name."""
    any_run = next(iter(found.values()))
    numbers = range(1, 1 + len(any_run.meta["eigenvalues"]))

    def panels(names: dict[str, str]) -> dict[str, dict[str, Curve]]:
        return {
            title: {folder: curve(own.tasks[name]) for folder, own in found.items()} for title, name in names.items()
        }

    return {
        "path.png": curves(
            panels({f"{name} loss": f"path_{name}" for name in SETS}),
            WAY,
            xlabel="from the meta-parameters (0) to the adapted ones (1)",
            ylabel="mean over tasks, 95 % interval",
        ),
        "eigenvalues.png": curves(
            panels({f"{name} loss, adapted": f"eigenvalues_{name}_after" for name in SETS}),
            numbers,
            xlabel="eigenvalue, the largest first",
            ylabel="mean over tasks, 95 % interval",
            joined=False,
        ),
        "sharpness.png": curves(
            panels({f"adapted {name} loss": f"sharpness_{name}" for name in SETS}),
            any_run.radii,
            xlabel="radius",
            ylabel="rise of the loss by one ascent step",
            log=("x", "y"),
        ),
        "validation_decrease.png": curves(
            panels({f"fall of the validation loss, {kind}": f"decrease_{kind}" for kind in ("predicted", "measured")}),
            any_run.radii,
            xlabel="rho, with rho1 = 2 rho and rho2 = rho",
            ylabel="mean over tasks, 95 % interval",
            log=("x",),
            sharey=True,
        ),
        "surface.png": contours({folder: own.planes for folder, own in found.items()}, any_run.side),
    }


def table(found: dict[str, Analysis]) -> str:
    """The runs side by side, then what each has more than the first; means and 95 % intervals over tasks."""
    analyses = list(found.values())
    differences = _differences(found)
    tasks, radii = [own.tasks for own in analyses], analyses[0].radii
    heads = [f"mean ± 95 % over {len(tasks[0]['accuracy'])} tasks", *found, *differences]
    rows = [
        [said, *(_cell(own, name, index) for own in (*tasks, *differences.values()))]
        for said, name, index in chain(_curvature_rows(), _radius_rows(radii), OTHER_ROWS)
    ]
    rows.append(["meta-loss: largest eigenvalue", *(f"{own.meta['eigenvalues'][0]:.4g}" for own in analyses)])
    rows.append(["meta-loss: trace", *(f"{own.meta['trace'].mean():.4g}" for own in analyses)])
    for name in FLATNESS:
        found_here = [_correlations(own)[name] for own in tasks]
        said = [f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in found_here]
        rows.append([f"rank correlation of {name} and query loss", *said])
    return "\n".join(_aligned([heads, *rows]))


OTHER_ROWS: tuple[tuple[str, str, int], ...] = (
    ("cosine of training and validation gradient, before", "cosine_before", 0),
    ("cosine of training and validation gradient, after", "cosine_after", 0),
    ("||theta|| before", "parameter_norm", 0),
    ("||g|| before", "gradient_norm", 0),
    ("rho / ||theta||", "rho_over_norm", 0),
    ("rho * ||g||", "rho_times_gradient", 0),
)


def _curvature_rows() -> Iterator[tuple[str, str, int]]:
    """What a row is called, the quantity, and which of its numbers."""
    yield "query accuracy", "accuracy", 0
    for kind, said in (("loss", "loss"), ("eigenvalues", "largest eigenvalue"), ("trace", "trace")):
        for name, when in PLACES:
            yield f"{said} of the {name} set, {when}", f"{kind}_{name}_{when}", 0


def _radius_rows(radii: Sequence[float]) -> Iterator[tuple[str, str, int]]:
    for index, radius in enumerate(radii):
        yield f"sharpness of the support loss at {radius:g}, after", "sharpness_support", index
    for index, radius in enumerate(radii):
        yield f"fall of the validation loss at {radius:g}, predicted", "decrease_predicted", index
        yield f"fall of the validation loss at {radius:g}, measured", "decrease_measured", index


def _cell(tasks: Tasks, name: str, index: int) -> str:
    if name not in tasks:
        return "-"
    mean, half = (numbers[index].item() for numbers in curve(tasks[name]))
    return f"{mean:.3g} ± {half if half > 1e-9 * abs(mean) else 0:.2g}"  # the same in all tasks, but for rounding


def _aligned(rows: list[list[str]]) -> list[str]:
    columns = zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _differences(found: dict[str, Analysis]) -> dict[str, Tasks]:
    """Each run minus the first one, task by task, in what both have."""
    (first, reference), *others = found.items()
    return {
        f"{other} minus {first}": {
            name: values - reference.tasks[name] for name, values in own.tasks.items() if name in reference.tasks
        }
        for other, own in others
    }


def _correlations(tasks: Tasks) -> dict[str, Correlation]:
    """Over tasks, of each measure of flatness with the query loss; sharpness at the largest radius."""
    measures = {name: tasks[quantity].reshape(len(tasks["accuracy"]), -1) for name, quantity in FLATNESS.items()}
    return {
        name: rank_correlation(values[:, -1 if name == "sharpness" else 0], tasks["loss_query_after"])
        for name, values in measures.items()
    }


def curve(values: Tensor) -> Curve:
    """The mean and its interval over tasks of each number of `[T]` or `[T, n]`."""
    intervals = [interval(column) for column in values.reshape(len(values), -1).T]
    return Curve(*(torch.tensor(numbers, dtype=torch.float64) for numbers in zip(*intervals, strict=True)))


def _summary(values: Tensor) -> dict[str, Any]:
    mean, half = (numbers.tolist() if values.ndim > 1 else numbers.item() for numbers in curve(values))
    return {"mean": mean, "ci95": half}
