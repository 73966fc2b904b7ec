"""The Kronecker group of PSGD: for every tensor, Q = Q₁ ⊗ Q₂ ⊗ …, one triangular or diagonal factor per axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from .psgd_group import Coins, Factor, State


class Kron(Factor):
    """Q = Q₁ ⊗ Q₂ ⊗ …, acting on the axes of one tensor X: (Q x) = X ×₁ Q₁ ×₂ Q₂ ….

    Args:
        factors: One for each axis: upper triangular [d, d], or the diagonal [d]. A scalar is a tensor of shape [1].

    Source: Li, 2018, section 4.B (affine group); the code of psgd_torch 0.6, Kron: the update dQ = 𝓔 Q with the upper
    triangle as projection. The repository's later rule, dQ = Q^½ 𝓔 Q^{3/2}, is another algorithm and not offered.
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self.factors = tuple(factors)
        self.axes = tuple(len(q) for q in self.factors)

    @classmethod
    def initial(cls, p: Tensor, scale: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> dict[str, Tensor]:
        shape = tuple(p.shape) or (1,)
        each = scale ** (1 / len(shape))
        state = {}
        for axis, size in enumerate(shape):
            ones = torch.ones(size, dtype=scale.dtype, device=p.device)
            dense = triangular(size, p.numel(), options["max_size"], options["max_skew"])
            state[f"Q{axis}"] = each * (torch.diag(ones) if dense else ones)
        return state

    @classmethod
    def gathered(cls, states: Sequence[State]) -> Kron:
        (state,) = states
        return cls([state[key] for key in takewhile(lambda key: key in state, (f"Q{axis}" for axis in count()))])

    def slices(self, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [{f"Q{axis}": q for axis, q in enumerate(self.factors)}]

    @property
    def shape(self) -> torch.Size:
        n = math.prod(self.axes)
        return torch.Size((n, n))

    def apply(self, V: Tensor) -> Tensor:
        X = V.reshape(*self.axes, -1)
        for axis, q in enumerate(self.factors):
            X = _product(q, X, axis)
        return X.reshape(V.shape)

    def transposed(self, V: Tensor) -> Tensor:
        X = V.reshape(*self.axes, -1)
        for axis, q in enumerate(self.factors):
            X = _product(q if q.ndim == 1 else q.T, X, axis)
        return X.reshape(V.shape)

    def inverse_transposed(self, v: Tensor) -> Tensor:
        X = v.reshape(self.axes)
        for axis, q in enumerate(self.factors):
            if q.ndim == 1:
                X = _product(1 / q, X, axis)
            else:
                X = _shaped(torch.linalg.solve_triangular(q.T, _rows(X, axis), upper=False), X, axis)
        return X.reshape(v.shape)

    def moved(self, v: Tensor, h: Tensor, A: Tensor, B: Tensor, rate: float, normalizer: str, coins: Coins) -> Kron:
        start = self._balanced() if coins.balance and len(self.axes) > 1 else self
        A = start.apply(h.unsqueeze(1)).reshape(self.axes)
        B = start.inverse_transposed(v).reshape(self.axes)
        return Kron(
            [_moved(q, _rows(A, axis), _rows(B, axis), rate, normalizer) for axis, q in enumerate(start.factors)]
        )

    @property
    def log_det(self) -> Tensor:
        n = math.prod(self.axes)
        diagonals = [q if q.ndim == 1 else q.diagonal() for q in self.factors]
        return torch.stack([n // len(q) * q.abs().log().sum() for q in diagonals]).sum()

    def _balanced(self) -> Kron:
        """The same Q with factors whose largest entries are alike."""
        sizes = torch.stack([q.abs().max() for q in self.factors])
        mean = sizes.log().mean().exp()
        return Kron([q * (mean / size) for q, size in zip(self.factors, sizes, strict=True)])


def triangular(size: int, numel: int, max_size: float, max_skew: float) -> bool:
    """Whether an axis has a triangular factor: at most `max_size` long, and size² <= max_skew · numel."""
    return 1 < size <= max_size and size * size <= max_skew * numel


def _moved(q: Tensor, A: Tensor, B: Tensor, rate: float, normalizer: str) -> Tensor:
    """A factor after its step; A, B [d, n / d] are Q h and Q⁻ᵀ v with this axis first."""
    tiny = torch.finfo(q.dtype).tiny
    gains, losses = (M.square().sum(1) if q.ndim == 1 else M @ M.T for M in (A, B))
    slope = gains - losses
    measured = gains + losses if normalizer == "2nd" else slope
    if q.ndim == 1:
        return q - rate / (measured.abs().max() + tiny) * slope * q
    return q - rate / (norm_bound(measured) + tiny) * slope.triu() @ q


def norm_bound(S: Tensor) -> Tensor:
    """A lower bound on the spectral norm of a symmetric S [d, d]: two power iterations from its longest column."""
    tiny = torch.finfo(S.dtype).tiny
    size = S.abs().max()
    unit = S / size.clamp_min(tiny)
    x = unit @ unit[:, unit.square().sum(0).argmax()]
    return size * (unit @ (x / x.norm().clamp_min(tiny))).norm()


def _product(q: Tensor, X: Tensor, axis: int) -> Tensor:
    """X ×_axis q for a matrix q [d, d] or a diagonal q [d]."""
    if q.ndim == 1:
        return q.reshape(-1, *[1] * (X.ndim - 1 - axis)) * X
    return _shaped(q @ _rows(X, axis), X, axis)


def _rows(X: Tensor, axis: int) -> Tensor:
    """X with an axis first and the others flattened."""
    return X.movedim(axis, 0).reshape(X.shape[axis], -1)


def _shaped(rows: Tensor, X: Tensor, axis: int) -> Tensor:
    """The inverse of `_rows`, for rows of an X."""
    return rows.reshape(X.movedim(axis, 0).shape).movedim(0, axis)
