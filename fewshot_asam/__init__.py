"""Few-shot meta-learning with MAML, Sharp-MAML_low and Agnostic-SAM."""

from importlib.metadata import version

from fewshot_asam.errors import FewShotError
from fewshot_asam.meta import MAML, MetaAgnosticSAM, MetaLearner, SharpMAML

__version__ = version("fewshot_asam")
__all__ = ["MAML", "FewShotError", "MetaAgnosticSAM", "MetaLearner", "SharpMAML", "__version__"]
