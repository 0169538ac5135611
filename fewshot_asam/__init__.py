"""Few-shot meta-learning with MAML, Sharp-MAML_low and Agnostic-SAM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewshot_asam.errors import FewShotError
from fewshot_asam.version import __version__

if TYPE_CHECKING:
    from fewshot_asam.classifier import Classifier, load_run
    from fewshot_asam.data import load_dataset
    from fewshot_asam.data.images import Dataset, ImageSet
    from fewshot_asam.episodes import Episodes, EpisodeSampler
    from fewshot_asam.learners import MAML, MetaAgnosticSAM, MetaLearner, SharpMAML
    from fewshot_asam.models import Conv4, ResNet12
    from fewshot_asam.rates import LearnedRates
    from fewshot_asam.training.config import TrainConfig
    from fewshot_asam.training.evaluation import evaluate
    from fewshot_asam.training.loop import train

__all__ = [
    "MAML",
    "Classifier",
    "Conv4",
    "Dataset",
    "EpisodeSampler",
    "Episodes",
    "FewShotError",
    "ImageSet",
    "LearnedRates",
    "MetaAgnosticSAM",
    "MetaLearner",
    "ResNet12",
    "SharpMAML",
    "TrainConfig",
    "__version__",
    "evaluate",
    "load_dataset",
    "load_run",
    "train",
]
_ROOMS = {
    "classifier": ("Classifier", "load_run"),
    "data": ("load_dataset",),
    "data.images": ("Dataset", "ImageSet"),
    "episodes": ("EpisodeSampler", "Episodes"),
    "learners": ("MAML", "MetaAgnosticSAM", "MetaLearner", "SharpMAML"),
    "models": ("Conv4", "ResNet12"),
    "rates": ("LearnedRates",),
    "training.config": ("TrainConfig",),
    "training.evaluation": ("evaluate",),
    "training.loop": ("train",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """The toolbox on first use, so that a command can answer before PyTorch is imported."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fewshot_asam.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
