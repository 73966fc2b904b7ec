"""Curvature in the geometry of an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .operator import LinearOperator


class Root(ABC):
    """A matrix R [k, n] with P⁻¹ = Rᵀ R, known by its products: half of a preconditioner that is no diagonal."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[k, n]."""

    @abstractmethod
    def apply(self, V: Tensor) -> Tensor:
        """R V [k, m] for V [n, m]."""

    @abstractmethod
    def transposed(self, V: Tensor) -> Tensor:
        """Rᵀ V [n, m] for V [k, m]."""


class DiagonalRoot(Root):
    """diag(r) for r [n]."""

    def __init__(self, diagonal: Tensor) -> None:
        self._column = diagonal.unsqueeze(1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._column), len(self._column)))

    def apply(self, V: Tensor) -> Tensor:
        return self._column * V

    def transposed(self, V: Tensor) -> Tensor:
        return self._column * V


class PreconditionedOperator(LinearOperator):
    """R A Rᵀ with P⁻¹ = Rᵀ R: curvature in the geometry of an optimizer that steps along P⁻¹ g.

    It is symmetric and has the eigenvalues of P⁻¹ A (and zeros, where R has more rows than columns). For a diagonal P
    it is P^-1/2 A P^-1/2.

    Args:
        op: A, shape [n, n].
        preconditioner: The diagonal of P [n], every entry positive and finite; or a `Root` [k, n], whose zero columns
            take coordinates out that do not move.

    Source: Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022, section 2.
    """

    def __init__(self, op: LinearOperator, preconditioner: Tensor | Root) -> None:
        n = op.shape[0]
        root = preconditioner if isinstance(preconditioner, Root) else _diagonal_root(preconditioner, op)
        if root.shape[1] != n:
            raise ValueError(f"`preconditioner` has shape {list(root.shape)}; it must be [k, {n}]")
        rows = root.shape[0]
        super().__init__(rows, dtype=op.dtype, device=op.device, layout=op.layout if rows == n else None)
        self._op, self._root = op, root

    @property
    def relative_error(self) -> float:
        return self._op.relative_error

    def matmat(self, V: Tensor) -> Tensor:
        return self._root.apply(self._op.matmat(self._root.transposed(V)))

    def start_vector(self) -> Tensor | None:
        start = self._op.start_vector()
        return None if start is None else self._root.apply(start.unsqueeze(1)).squeeze(1)

    def expect(self, products: int) -> None:
        self._op.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self._op.fixed()


def _diagonal_root(preconditioner: Tensor, op: LinearOperator) -> Root:
    if preconditioner.shape != (op.shape[0],):
        raise ValueError(f"`preconditioner` has shape {list(preconditioner.shape)}; it must be [{op.shape[0]}]")
    bad = ~(torch.isfinite(preconditioner) & (preconditioner > 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"`preconditioner[{i}]` is {float(preconditioner[i])} ({int(bad.sum())} such entries); every entry must be "
            "positive and finite: add the optimizer's eps"
        )
    return DiagonalRoot(preconditioner.to(op.device, op.dtype).rsqrt())
