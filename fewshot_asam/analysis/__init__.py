"""What trained weights look like from the rules' point of view: curvature, surfaces, sharpness, agreement of gradients.

Each function takes a loss as a function of parameters by name, and such parameters. `losses` has them of a plain model
(`supervised_loss`), of a task before and after adaptation (`task_losses`) and of the meta-parameters (`meta_loss`).
"""

from fewshot_asam.analysis.congruence import ValidationDecrease, gradient_cosine, validation_decrease
from fewshot_asam.analysis.correlation import Correlation, rank_correlation
from fewshot_asam.analysis.curvature import hessian, hessian_trace, top_eigenvalues
from fewshot_asam.analysis.losses import TaskLosses, meta_loss, supervised_loss, task_losses
from fewshot_asam.analysis.pictures import Curve, contours, curves
from fewshot_asam.analysis.report import Analysis, analyse
from fewshot_asam.analysis.sharpness import RelativeRadius, relative_radius, sam_sharpness
from fewshot_asam.analysis.surface import filter_normalised_direction, loss_path, loss_plane

__all__ = [
    "Analysis",
    "Correlation",
    "Curve",
    "RelativeRadius",
    "TaskLosses",
    "ValidationDecrease",
    "analyse",
    "contours",
    "curves",
    "filter_normalised_direction",
    "gradient_cosine",
    "hessian",
    "hessian_trace",
    "loss_path",
    "loss_plane",
    "meta_loss",
    "rank_correlation",
    "relative_radius",
    "sam_sharpness",
    "supervised_loss",
    "task_losses",
    "top_eigenvalues",
    "validation_decrease",
]
