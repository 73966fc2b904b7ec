"""The UV model: two layers, one example, and a training that two numbers describe without approximation.

Source: Kalra, He and Barkeshli, Universal Sharpness Dynamics in Neural Network Training, ICLR 2025, for the model and
its fixed points. The formulas here are derived from it; they hold exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class UVModel(nn.Module):
    r"""f(x) = vᵀ U x / √N, with the loss (f − y)² / 2 on a single example.

    With z = ‖x‖² and h = U x, gradient descent of step η closes in f and the tangent kernel
    λ = (‖h‖² + z ‖v‖²) / N, which is also the trace of the Hessian. In the scaled variables

        F = η √(z/N) f,    L = η λ,    Y = η √(z/N) y

    it is `uv_map`, whose only parameter is Y = η / η_c.

    Args:
        width: n, the length of v.
        inputs: d, the length of x.
        N: The square of the prefactor's inverse; by default n.
        scale: Standard deviation of the normal initial weights.
        seed: Of these.
        dtype: Of the weights. The cascade of period doublings needs float64.
    """

    def __init__(
        self,
        width: int,
        inputs: int,
        *,
        N: float | None = None,
        scale: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if width < 1 or inputs < 1:
            raise ValueError(f"`width` is {width} and `inputs` is {inputs}; give at least 1 of each")
        self.N = float(width if N is None else N)
        if not self.N > 0:
            raise ValueError(f"`N` is {N}; it must be above 0")
        random = torch.Generator().manual_seed(seed)
        self.U = nn.Parameter(scale * torch.randn(width, inputs, generator=random, dtype=dtype))
        self.v = nn.Parameter(scale * torch.randn(width, generator=random, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [...]."""
        return (x @ self.U.mT) @ self.v / math.sqrt(self.N)

    def loss(self, x: Tensor, y: float) -> Tensor:
        """(f − y)² / 2."""
        return 0.5 * (self(x) - y).square()

    @torch.no_grad()
    def ntk_exact(self, x: Tensor) -> float:
        """λ = (‖U x‖² + ‖x‖² ‖v‖²) / N: the tangent kernel, and the trace of the Hessian at any residual."""
        return float(((self.U @ x).square().sum() + x.square().sum() * self.v.square().sum()) / self.N)

    @torch.no_grad()
    def sharpness_exact(self, x: Tensor, y: float) -> float:
        """Largest eigenvalue of the Hessian, see `uv_sharpness`."""
        return float(uv_sharpness(*self.scaled(x, y, lr=1.0)))

    @torch.no_grad()
    def scaled(self, x: Tensor, y: float, lr: float) -> tuple[float, float, float]:
        """F, L and Y."""
        root = math.sqrt(float(x.square().sum()) / self.N)
        return lr * root * float(self(x)), lr * self.ntk_exact(x), lr * root * y

    def eta_c(self, x: Tensor, y: float) -> float:
        """η_c = √N / (‖x‖ |y|): above it no minimum is stable; infinite where y = 0."""
        size = float(x.norm()) * abs(y)
        return math.inf if size == 0 else math.sqrt(self.N) / size


def uv_map(F: Any, L: Any, Y: Any) -> tuple[Any, Any]:
    r"""One step of gradient descent, with D = F − Y:

        F' = F (1 + D²) − L D
        L' = L (1 + D²) − 4 F D

    Then A = L + 2F and B = L − 2F, both >= 0, obey A' = A (1 − D)² and B' = B (1 + D)². Numbers, arrays or tensors.

    Source: derived from the model.
    """
    D = F - Y
    grown = 1 + D * D
    return F * grown - L * D, L * grown - 4 * F * D


def uv_jacobian(F: float, L: float, Y: float) -> np.ndarray:
    """Derivatives of (F', L') in (F, L), [2, 2]."""
    D = F - Y
    return np.array([[1 + D * D + 2 * F * D - L, -D], [2 * L * D - 4 * D - 4 * F, 1 + D * D]])


def uv_sharpness(F: Any, L: Any, Y: Any) -> Any:
    r"""η λ_max = (L + √(L² + 4 D (D + 2F))) / 2, with D = F − Y; numbers or arrays.

    Off the minimum the Hessian has D ∇²f beside the Gauss-Newton part: 2 (n − 1) eigenvalues ±|D|, and the two of a
    block with trace L and determinant −D (D + 2F), whose larger one is never below |D|, as L >= 2|F|. With η = 1 in F,
    L and Y it is the sharpness itself.

    Source: derived from the model.
    """
    D = F - Y
    inside = np.maximum(L * L + 4 * D * (D + 2 * F), 0.0)  # a sum of squares; rounding may make it negative
    return (L + np.sqrt(inside)) / 2


def balanced_map(F: Any, Y: Any) -> Any:
    """F' = F (1 + Y − F)²: the map on the edge of stability manifold L = 2F of balanced weights, ‖h‖² = z ‖v‖²."""
    return F * (1 + Y - F) ** 2


def balanced_slope(F: Any, Y: Any) -> Any:
    """Derivative of `balanced_map` in F."""
    return (1 + Y - F) * (1 + Y - 3 * F)


@dataclass(frozen=True)
class PeriodTwo:
    """The orbit of period two on the manifold, for 1 < Y.

    Attributes:
        F: Both points, the smaller first: F₁ + F₂ = 1 + Y and F₁ F₂ = 1.
        multiplier: 9 − 2 (1 + Y)², stable between −1 and 1: for Y below √5 − 1.
        transverse: Mean of log|1 + D|, the rate at which B goes to zero: log|3 − 2Y| / 2.
        mean_ntk: Mean of η λ: 1 + Y.
        mean_sharpness: Mean of η λ_max: (3 + Y) / 2 up to Y = √5 − 1; above, where the orbit is unstable, the mean of
            F + |2F − Y| is (1 + Y) / 2 + √((Y − 1)(Y + 3)).
    """

    F: tuple[float, float]
    multiplier: float
    transverse: float
    mean_ntk: float
    mean_sharpness: float


def period_two(Y: float) -> PeriodTwo:
    """The orbit of period two.

    Raises:
        ValueError: Y <= 1, where there is none.

    Source: derived from `balanced_map`. On the manifold η λ_max = F + |2F − Y|.
    """
    if not Y > 1:
        raise ValueError(f"`Y` is {Y}; the orbit of period two exists above 1")
    half = math.sqrt((Y - 1) * (Y + 3)) / 2
    middle = (1 + Y) / 2
    inside = abs(3 - 2 * Y)
    return PeriodTwo(
        F=(middle - half, middle + half),
        multiplier=9 - 2 * (1 + Y) ** 2,
        transverse=0.5 * math.log(inside) if inside else -math.inf,
        mean_ntk=1 + Y,
        mean_sharpness=max((3 + Y) / 2, (1 + Y) / 2 + 2 * half),
    )
