"""Objects by name, `package.module:object`, as command lines and YAML files say them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from fewshot_asam.errors import FewShotError


def imported(name: str, what: str) -> Any:
    """The object that `package.module:object` names; modules of the current folder are found too.

    Raises `FewShotError`, saying `what` it was wanted for, where there is none.
    """
    module, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise FewShotError(f"{what} is {name!r}; expected a name such as my_package.my_module:MyObject")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # of the module's own code, whatever it is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FewShotError(f"{what} {name} cannot be imported ({reason}); expected package.module:object") from error
    return found
