"""How an optimizer with momentum moves in one eigendirection of a quadratic: the roots of its recursion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.optim import Optimizer

from .optimizers.accelerated import AcceleratedSGD, NesterovForm


@dataclass(frozen=True)
class EigenResponse:
    r"""y_{t+1} = (1 + c) y_t − c y_{t−1} − q g_t + c δ g_{t−1} where g = λ y.

    Its modes are the roots of x² − (1 + c − q λ) x + c (1 − δ λ) = 0: SGD is c = 0, heavy ball δ = 0, Nesterov's method
    q = (1 + c) δ, and `AcceleratedSGD` any q >= δ.

    Args:
        form: c, δ, q.

    Source: derived here; Li et al. 2024, appendix, study the same 2 x 2 map of accelerated SGD.
    """

    form: NesterovForm

    def roots(self, eigenvalues: ArrayLike) -> NDArray[np.complex128]:
        """Both roots for each λ, [..., 2], the larger modulus first."""
        c, delta, q = self.form
        values = np.asarray(eigenvalues, dtype=np.float64)
        half = (1 + c - q * values) / 2
        product = c * (1 - delta * values)
        root = np.sqrt((half * half - product).astype(np.complex128))
        # The larger root without cancellation; the smaller one from the product of the two.
        large = half + np.where(half >= 0, root, -root)
        small = np.divide(product, large, out=np.zeros_like(large), where=large != 0)
        return np.stack([large, small], axis=-1).astype(np.complex128)

    def modulus(self, eigenvalues: ArrayLike) -> NDArray[np.float64]:
        """The factor per step by which the slower mode shrinks (or grows, above 1), [...]."""
        return np.abs(self.roots(eigenvalues)).max(-1)

    @property
    def complex_range(self) -> tuple[float, float] | None:
        """λ_− and λ_+ between which the roots are complex, (√(q − cδ) ∓ √(c (q − δ)))² / q²; None where none are."""
        c, delta, q = self.form
        if c == 0 or q <= delta:
            return None
        parts = math.sqrt(q - c * delta), math.sqrt(c * (q - delta))
        return ((parts[0] - parts[1]) / q) ** 2, ((parts[0] + parts[1]) / q) ** 2

    @property
    def slow_step(self) -> float:
        """(q − cδ)/(1 − c): the step of plain gradient descent that is as fast where λ tends to zero."""
        c, delta, q = self.form
        return (q - c * delta) / (1 - c)

    @property
    def even_eigenvalue(self) -> float:
        """(1 − c)/δ, infinite at δ = 0: with complex roots, faster than a gradient step δ below it, slower above.

        There |x|² = c (1 − δ λ), which is below (1 − δ λ)² as long as δ λ < 1 − c.
        """
        c, delta, _ = self.form
        return (1 - c) / delta if delta else math.inf


def eigen_responses(optimizer: Optimizer) -> list[EigenResponse]:
    """Of each parameter group of an `AcceleratedSGD` or a `torch.optim.SGD`.

    Weight decay is left out: it adds to λ.

    Raises:
        TypeError: another optimizer.
    """
    if isinstance(optimizer, AcceleratedSGD):
        return [EigenResponse(form) for form in optimizer.nesterov_form()]
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(
            f"`optimizer` is {type(optimizer).__name__}; the recursion is known for AcceleratedSGD and "
            "torch.optim.SGD: make an EigenResponse from the optimizer's c, δ and q"
        )
    return [EigenResponse(_torch_form(**group)) for group in optimizer.param_groups]


def _torch_form(lr: float, momentum: float, dampening: float, nesterov: bool, **_: object) -> NesterovForm:
    lr, c = float(lr), float(momentum)
    if c == 0:
        return NesterovForm(0.0, lr, lr)
    return NesterovForm(c, lr, lr * (1 + c)) if nesterov else NesterovForm(c, 0.0, lr * (1 - float(dampening)))
