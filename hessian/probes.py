"""Random probe vectors, and what one product with each of them tells about a matrix.

Sizes: n rows, m probes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..kernels.accurate import dot
from .operator import DENSE_COLUMNS, LinearOperator

# Probes multiplied at once: at most so many, and at most so many numbers in them.
PROBES_AT_ONCE = 8
PROBE_NUMBERS_AT_ONCE = 1 << 26

# An operator whose stated error is below this many roundings is as exact as its dtype.
ROUNDING_EPS = 16


def random_generator(op: LinearOperator, seed: int) -> torch.Generator:
    """A stream of its own on the operator's device: the global one is not touched."""
    return torch.Generator(device=op.device).manual_seed(seed)


def rademacher(op: LinearOperator, num: int, generator: torch.Generator) -> Tensor:
    """Independent signs ±1 [num, n]. One probe is drawn after the other, so `num` does not change the stream."""
    Z = torch.empty(num, op.shape[0], dtype=op.dtype, device=op.device)
    for row in Z:
        row.copy_(torch.empty(row.shape, dtype=torch.int8, device=op.device).random_(0, 2, generator=generator))
    return Z.mul_(2).sub_(1)


def gaussian(op: LinearOperator, num: int, generator: torch.Generator) -> Tensor:
    """Independent standard normal entries [num, n], drawn row by row."""
    Z = torch.empty(num, op.shape[0], dtype=op.dtype, device=op.device)
    for row in Z:
        row.normal_(generator=generator)
    return Z


def products(op: LinearOperator, Z: Tensor) -> Tensor:
    """The rows A z [m, n] for the rows z of Z [m, n]."""
    return op.matmat(Z.T.contiguous()).T.contiguous()


def probe_groups(op: LinearOperator, num: int) -> Iterator[int]:
    """Sizes of the groups in which `num` probes are multiplied: small enough not to matter beside the operator."""
    most = max(1, min(PROBES_AT_ONCE, PROBE_NUMBERS_AT_ONCE // op.shape[0]))
    return (min(most, num - first) for first in range(0, num, most))


def checked_finite(value: Tensor, op: LinearOperator, product: int) -> float:
    """A scalar made from product number `product`, refused when it is NaN or infinite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"product {product} of {op!r} has NaN or infinite entries; "
            "check that the loss and its gradient are finite at these weights, or compute in float64"
        )
    return number


def rounding(op: LinearOperator, frobenius: float) -> float:
    """Size of the error that inexact products leave in a sum like zᵀ A z, in units of A: the stated error × ‖A‖_F.

    Independent errors of the entries of A z add up to this much; below it a standard error means nothing.
    """
    return op.relative_error * frobenius


def exact_rounding(op: LinearOperator, frobenius: float) -> float:
    """`rounding` for a sum over all n columns: 0 where the products are as exact as the dtype allows."""
    exact = op.relative_error <= ROUNDING_EPS * torch.finfo(op.dtype).eps
    return 0.0 if exact else rounding(op, frobenius)


def exact_columns(op: LinearOperator) -> tuple[Tensor, Tensor]:
    """The diagonal of A and the squared norms of its columns, both [n] in float64, from n products."""
    n = op.shape[0]
    diagonal = torch.empty(n, dtype=torch.float64, device=op.device)
    squares = torch.empty_like(diagonal)
    for first in range(0, n, DENSE_COLUMNS):
        last = min(first + DENSE_COLUMNS, n)
        position = torch.arange(last - first, device=op.device)
        E = torch.zeros(last - first, n, dtype=op.dtype, device=op.device)
        E[position, position + first] = 1.0
        A = products(op, E)  # [columns, n]
        diagonal[first:last] = A[position, position + first].double()
        for i, column in enumerate(A):
            squares[first + i] = checked_finite(dot(column, column), op, first + i + 1)
    return diagonal, squares


def check_num_probes(num_probes: int, fewest: int, method: str = "an estimate") -> None:
    """An error if `num_probes` is not a count of at least `fewest`."""
    if not isinstance(num_probes, int) or isinstance(num_probes, bool):
        raise TypeError(f"`num_probes` is {num_probes!r}; it must be an int, the number of products to spend")
    if num_probes < fewest:
        raise ValueError(
            f"`num_probes` is {num_probes}; {method} needs at least {fewest} to know its error "
            "(as many as the operator has rows give the exact answer)"
        )


def check_method(method: str, known: Collection[str]) -> None:
    """An error if `method` is not among `known`, with the nearest that is."""
    if method not in known:
        near = difflib.get_close_matches(str(method).lower(), known, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"`method` is {method!r}{hint} the methods are {', '.join(map(repr, known))}")


class ProbeMoments:
    """Samples zᵀ A z of Rademacher probes z, and their variance read off the vectors z∘(A z) rather than the samples.

    The entries of y = z∘(A z) have the means a_ii and the variances Σ_{j≠i} a_ij², so the spread of the vectors y,
    E ‖y − E y‖² = ‖A − diag A‖_F², gives Var zᵀ A z = 2 ‖A − diag A‖_F² from n entries a probe in place of one. A
    variance from the samples alone is far too often far too small with a few probes.

    Args:
        op: The operator behind the products, for messages and dtype.
        entrywise: Also keep the variance of each entry of y.

    Source: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990, for the variance; Welford,
    Note on a Method for Calculating Corrected Sums of Squares and Products, 1962, for the running moments.
    """

    def __init__(self, op: LinearOperator, *, entrywise: bool = False) -> None:
        self._op = op
        wide = op.dtype if op.dtype.itemsize >= 4 else torch.float32
        self.mean = torch.zeros(op.shape[0], dtype=wide, device=op.device)  # of y, so of the diagonal of A
        self._entry_spread = torch.zeros_like(self.mean) if entrywise else None
        self._spread = 0.0  # Σ ‖y − mean‖²
        self._samples: list[float] = []
        self._squares: list[float] = []  # ‖A z‖²

    @property
    def count(self) -> int:
        return len(self._samples)

    @property
    def samples(self) -> Tensor:
        return torch.tensor(self._samples, dtype=torch.float64)

    @property
    def mean_square(self) -> float:
        """Mean of ‖A z‖², an estimate of ‖A‖_F²."""
        return sum(self._squares) / self.count

    def add(self, z: Tensor, Az: Tensor, *, product: int) -> None:
        """Take in a probe [n] and its product [n]."""
        self._samples.append(checked_finite(dot(z, Az), self._op, product))
        self._squares.append(float(dot(Az, Az)))
        y = z.to(self.mean.dtype) * Az
        before = y - self.mean
        self.mean += before / self.count
        after = y - self.mean
        self._spread += float(dot(before, after))
        if self._entry_spread is not None:
            self._entry_spread += before * after

    def stderr(self) -> float:
        """Standard error of the mean of the samples; infinite for one sample."""
        m = self.count
        return math.sqrt(2 * max(self._spread, 0.0) / (m * (m - 1))) if m > 1 else math.inf

    def entry_mean_square(self) -> Tensor:
        """Means [n] of (A z)_i², estimates of the squared norms of the rows of A."""
        return self.mean.square() + self._kept_entries().clamp(min=0) / self.count

    def entry_stderr(self) -> Tensor:
        """Standard errors [n] of the entries of `mean`."""
        m = self.count
        if m == 1:
            return torch.full_like(self.mean, math.inf)
        return (self._kept_entries().clamp(min=0) / (m * (m - 1))).sqrt()

    def _kept_entries(self) -> Tensor:
        if self._entry_spread is None:
            raise ValueError("`entrywise` is False, so the variances of the entries were not kept; make it True")
        return self._entry_spread
