"""Symmetric linear operators: one method to write, algebra and conversions for free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..landscape.layout import Layout
from ..landscape.memory import refuse_unless_fits

if TYPE_CHECKING:
    import scipy.sparse.linalg

    from ..landscape.blocks import Block

# Columns handed to `matmat` at once by `dense`: bounds its working memory.
DENSE_COLUMNS = 64


class LinearOperator(ABC):
    """A symmetric matrix A [n, n] known by its products.

    Subclasses write `matmat(V [n, m]) -> [n, m]`; every algorithm in `sharpscope.hessian` accepts the result.

    Args:
        n: Number of rows.
        dtype, device: Of the vectors that `matmat` takes and returns.
        layout: Names and shapes behind the flat vectors, for `unflatten`.
        relative_error: Stated bound on ‖computed A v − A v‖ / (‖A‖ ‖v‖); rounding unless the product is approximate.
    """

    def __init__(
        self,
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
        relative_error: float | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"`n` is {n}; an operator needs at least one row")
        self._n = n
        self._dtype = dtype
        self._device = torch.device(device)
        self._layout = layout
        self._relative_error = relative_error

    @abstractmethod
    def matmat(self, V: Tensor) -> Tensor:
        """A V for V [n, m]."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._n, self._n))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def layout(self) -> Layout | None:
        return self._layout

    @property
    def relative_error(self) -> float:
        """Stated bound on the error of one product, relative to ‖A‖ ‖v‖."""
        return 16 * torch.finfo(self.dtype).eps if self._relative_error is None else self._relative_error

    def start_vector(self) -> Tensor | None:
        """A cheap vector [n] rich in the top eigenvectors (the gradient, for a Hessian), or None."""
        return None

    def coarse(self) -> LinearOperator | None:
        """A cheaper operator close to this one (the same matrix on a part of the examples), or None."""
        return None

    def expect(self, products: int) -> None:  # noqa: B027
        """Says that about so many products will be asked for; an operator may prepare itself for a long run."""

    def fixed(self) -> AbstractContextManager[None]:
        """A context for a run of products: inside it the matrix stays the same, so that an operator that depends on a
        model's weights need not look at every product whether they have changed."""
        return nullcontext()

    def matvec(self, v: Tensor) -> Tensor:
        """A v for v [n]."""
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def __matmul__(self, V: Tensor) -> Tensor:
        """A v or A V, with shape, dtype and device checked."""
        if not isinstance(V, Tensor):
            raise TypeError(f"`V` is a {type(V).__name__}; pass a torch tensor, or use to_scipy() for NumPy arrays")
        if V.ndim not in (1, 2) or V.shape[0] != self._n:
            raise ValueError(f"`V` has shape {list(V.shape)}; this operator takes [{self._n}] or [{self._n}, m]")
        if V.dtype != self.dtype or V.device != self.device:
            raise ValueError(
                f"`V` is {V.dtype} on {V.device}; this operator works in {self.dtype} on {self.device}: use V.to(...)"
            )
        return self.matvec(V) if V.ndim == 1 else self.matmat(V)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return SumOperator(self, other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return SumOperator(self, ScaledOperator(other, -1.0))

    def __mul__(self, factor: float) -> LinearOperator:
        if not isinstance(factor, int | float):
            return NotImplemented
        return ScaledOperator(self, float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        return self * (1.0 / divisor)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def shifted(self, sigma: float) -> LinearOperator:
        """A + σ I."""
        return self + sigma * IdentityOperator(self._n, dtype=self.dtype, device=self.device)

    def block(self, block: Block) -> LinearOperator:
        """The principal submatrix A[i, i] of the coordinates i of a block."""
        return RestrictedOperator(self, block)

    def dense(self) -> Tensor:
        """The matrix [n, n], from n products. Meant for small n: it holds n² numbers."""
        refuse_unless_fits(
            self._n * self._n * self.dtype.itemsize,
            self.device,
            what=f"the matrix [{self._n}, {self._n}]",
            cure="take `top_eigenvalues` or `spectral_density`, which need products only",
        )
        columns = []
        with self.fixed():
            for first in range(0, self._n, DENSE_COLUMNS):
                last = min(first + DENSE_COLUMNS, self._n)
                V = torch.zeros(self._n, last - first, dtype=self.dtype, device=self.device)
                V[torch.arange(first, last), torch.arange(last - first)] = 1.0
                columns.append(self.matmat(V))
        return torch.cat(columns, dim=1)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for SciPy: NumPy vectors on the CPU in and out."""
        import scipy.sparse.linalg

        def product(V):
            result = self @ torch.as_tensor(V).to(self.device, self.dtype)
            return result.detach().cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        products: dict = dict.fromkeys(("matvec", "matmat", "rmatvec", "rmatmat"), product)
        return scipy.sparse.linalg.LinearOperator(shape=(self._n, self._n), dtype=dtype, **products)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A flat v [n] as tensors by parameter name."""
        if self._layout is None:
            raise ValueError("this operator has no parameter names: it was not made from a whole Objective")
        return self._layout.unflatten(v)

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Tensors by parameter name as a flat vector [n]."""
        if self._layout is None:
            raise ValueError("this operator has no parameter names: it was not made from an Objective")
        return self._layout.flatten(tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self._n}, dtype={self.dtype}, device={self.device})"


class DenseOperator(LinearOperator):
    """A matrix [n, n] held in memory."""

    def __init__(self, matrix: Tensor, *, layout: Layout | None = None) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` has shape {list(matrix.shape)}; it must be square")
        if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5 * float(matrix.abs().max())):
            raise ValueError("`matrix` is not symmetric; pass (matrix + matrix.T) / 2")
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device, layout=layout)
        self._matrix = matrix

    def matmat(self, V: Tensor) -> Tensor:
        return self._matrix @ V


class DiagonalOperator(LinearOperator):
    """diag(d) for d [n]."""

    def __init__(self, diagonal: Tensor, *, layout: Layout | None = None) -> None:
        super().__init__(diagonal.shape[0], dtype=diagonal.dtype, device=diagonal.device, layout=layout)
        self._diagonal = diagonal

    def matmat(self, V: Tensor) -> Tensor:
        return self._diagonal.unsqueeze(1) * V


class IdentityOperator(LinearOperator):
    """The identity matrix I [n, n]."""

    def matmat(self, V: Tensor) -> Tensor:
        return V.clone()


class SumOperator(LinearOperator):
    """A + B."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        same = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
        if not same:
            raise ValueError(f"cannot add {first!r} and {second!r}: shape, dtype and device must agree")
        super().__init__(first.shape[0], dtype=first.dtype, device=first.device, layout=first.layout or second.layout)
        self._terms = (first, second)
        self._largest_term = self._largest_sum = 0.0

    @property
    def relative_error(self) -> float:
        """The terms' error; grown by their size over the sum's, as seen in the products so far, where they cancel."""
        error = max(term.relative_error for term in self._terms)
        return error * max(1.0, self._largest_term / self._largest_sum) if self._largest_sum > 0 else error

    def matmat(self, V: Tensor) -> Tensor:
        products = [term.matmat(V) for term in self._terms]
        total = products[0] + products[1]
        self._largest_term = max(self._largest_term, sum(_largest_gain(p, V) for p in products))
        self._largest_sum = max(self._largest_sum, _largest_gain(total, V))
        return total

    def start_vector(self) -> Tensor | None:
        return self._terms[0].start_vector()

    def expect(self, products: int) -> None:
        for term in self._terms:
            term.expect(products)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        with self._terms[0].fixed(), self._terms[1].fixed():
            yield


def _largest_gain(product: Tensor, V: Tensor) -> float:
    """The largest ‖A v‖ / ‖v‖ over the columns."""
    lengths = V.norm(dim=0)
    return float((product.norm(dim=0) / torch.where(lengths > 0, lengths, torch.inf)).max()) if V.shape[1] else 0.0


class ScaledOperator(LinearOperator):
    """c A."""

    def __init__(self, op: LinearOperator, factor: float) -> None:
        super().__init__(op.shape[0], dtype=op.dtype, device=op.device, layout=op.layout)
        self._op, self._factor = op, factor

    @property
    def relative_error(self) -> float:
        return self._op.relative_error

    def matmat(self, V: Tensor) -> Tensor:
        return self._factor * self._op.matmat(V)

    def start_vector(self) -> Tensor | None:
        return self._op.start_vector()

    def coarse(self) -> LinearOperator | None:
        coarse = self._op.coarse()
        return None if coarse is None else ScaledOperator(coarse, self._factor)

    def expect(self, products: int) -> None:
        self._op.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self._op.fixed()


class RestrictedOperator(LinearOperator):
    """Principal submatrix of any operator: embed, multiply, select. One full product of A for each product."""

    def __init__(self, op: LinearOperator, block: Block) -> None:
        if op.layout is None:
            raise ValueError(f"`block` {block.name!r} needs parameter names, which {op!r} does not have")
        self._indices = block.indices(op.layout).to(op.device)
        super().__init__(len(self._indices), dtype=op.dtype, device=op.device)
        self._op = op
        self._largest_whole = self._largest_block = 0.0

    @property
    def relative_error(self) -> float:
        """That of A, grown by the size of A's products over the block's, as seen so far: the error is one of A."""
        error = self._op.relative_error
        return error * max(1.0, self._largest_whole / self._largest_block) if self._largest_block > 0 else error

    def matmat(self, V: Tensor) -> Tensor:
        embedded = V.new_zeros(self._op.shape[0], V.shape[1])
        embedded[self._indices] = V
        whole = self._op.matmat(embedded)
        block = whole[self._indices]
        self._largest_whole = max(self._largest_whole, _largest_gain(whole, V))
        self._largest_block = max(self._largest_block, _largest_gain(block, V))
        return block

    def expect(self, products: int) -> None:
        self._op.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self._op.fixed()
