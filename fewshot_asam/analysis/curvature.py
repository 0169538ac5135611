"""The Hessian of a loss: products with vectors, the largest eigenvalues (the paper's Table 10) and the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewshot_asam.analysis.scipy_import import scipy_module
from fewshot_asam.engine.gradients import Loss, scalar
from fewshot_asam.errors import FewShotError
from fewshot_asam.rules.perturbations import Params

Product = Callable[[Tensor], Tensor]
TOLERANCE = 1e-2
"""`|H v - lambda v| / lambda` at which an eigenvalue counts as found; its own error is usually far smaller."""


def hessian(loss: Loss, params: Params) -> Product:
    """The Hessian at `params` as a function of a vector `[P]`: `v -> H v`, `[P]`, on the parameters' device.

    A vector holds the parameters one after another, in the order of `params`. The gradient's graph is built once and
    differentiated again for every product (Pearlmutter, 1994), so its memory is held as long as the function.
    """
    at = [value.detach().requires_grad_() for value in params.values()]
    with torch.enable_grad():
        value = scalar(loss(dict(zip(params, at, strict=True))))
        gradient = _flat(torch.autograd.grad(value, at, create_graph=True, allow_unused=True, materialize_grads=True))

    def product(vector: Tensor) -> Tensor:
        if not gradient.requires_grad:  # a linear loss
            return torch.zeros_like(gradient)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return _flat(torch.autograd.grad(gradient, at, vector.to(gradient), **options)).detach()

    return product


def top_eigenvalues(loss: Loss, params: Params, number: int = 5, *, generator: torch.Generator | None = None) -> Tensor:
    """The largest eigenvalues of the Hessian, the largest first: float64 `[number]`, on the CPU.

    **Arguments:**

    - `number`: how many, fewer than there are parameters.
    - `generator`: on the CPU, of the vector that the iteration starts from; 0 seeds it if none is given.

    By ARPACK's Lanczos iteration (`scipy.sparse.linalg.eigsh`), each to a relative error of 1e-2 at most.

    Raises `FewShotError` where scipy is missing, `number` is out of range, the iteration does not converge or the
    Hessian is not finite.
    """
    sparse = scipy_module("sparse.linalg")
    size = sum(value.numel() for value in params.values())
    if not 1 <= number < size:
        raise FewShotError(f"{number} eigenvalues of {size} parameters were asked for; expected 1 to {size - 1}")
    product, first = hessian(loss, params), _probe(size, generator or torch.Generator().manual_seed(0))
    operator = sparse.LinearOperator(
        (size, size), matvec=lambda vector: _checked(product(torch.from_numpy(vector.ravel()))).numpy(), dtype=float
    )
    try:
        found = sparse.eigsh(operator, number, which="LA", v0=first.numpy(), tol=TOLERANCE, return_eigenvectors=False)
    except sparse.ArpackError as error:
        raise FewShotError(f"the eigenvalues did not converge ({error}); ask for fewer, or use float64") from error
    return torch.from_numpy(found.copy()).sort(descending=True).values


def hessian_trace(loss: Loss, params: Params, samples: int = 10, *, generator: torch.Generator | None = None) -> Tensor:
    """Unbiased estimates `v . H v` of the Hessian's trace, float64 `[samples]`, on the CPU (Hutchinson, 1989).

    Their mean estimates the trace; their standard deviation over the square root of `samples` is its error.

    **Arguments:**

    - `samples`: random vectors `v` of signs, at least 1.
    - `generator`: on the CPU; 0 seeds it if none is given.
    """
    if samples < 1:
        raise FewShotError(f"samples is {samples}; expected at least 1")
    product, drawn = hessian(loss, params), generator or torch.Generator().manual_seed(0)
    size = sum(value.numel() for value in params.values())
    signs = [_probe(size, drawn) for _ in range(samples)]
    return torch.stack([sign @ _checked(product(sign)) for sign in signs])


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([value.flatten() for value in tensors])


def _probe(size: int, generator: torch.Generator) -> Tensor:
    """A vector of random signs, float64 `[size]`."""
    return torch.randint(2, (size,), generator=generator).double() * 2 - 1


def _checked(product: Tensor) -> Tensor:
    if not bool(product.isfinite().all()):
        raise FewShotError("the Hessian is not finite; expected parameters at which the loss and its derivatives are")
    return product.double().cpu()
