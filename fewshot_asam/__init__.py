"""Few-shot meta-learning with MAML, Sharp-MAML_low and Agnostic-SAM."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fewshot_asam.errors import FewShotError

if TYPE_CHECKING:
    from fewshot_asam.meta import MAML, MetaAgnosticSAM, MetaLearner, SharpMAML

__version__ = version("fewshot_asam")
__all__ = ["MAML", "FewShotError", "MetaAgnosticSAM", "MetaLearner", "SharpMAML", "__version__"]


def __getattr__(name: str) -> Any:
    """The learners on first use, so that a command can answer before PyTorch is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fewshot_asam.meta"), name)
