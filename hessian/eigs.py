"""Extreme eigenvalues of a symmetric operator, with residuals and a proof that none is missed."""

from __future__ import annotations

import difflib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.accurate import norm
from .estimate import NotConvergedWarning
from .lanczos import KrylovBasis, checked_vector, plain_tensors
from .operator import LinearOperator
from .ritz_search import PROOF_ROWS, Ends, RitzPairs, RitzSearch

WHICH = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest absolute value",
    "BE": "both ends",
}
# Random part of the start beside the unit vector of the operator or the user: nothing can hide behind a symmetric
# start then, the proof for a single pair rests on it, and it costs less than a product.
NOISE = 0.3
# A long basis saves restarts, and products where the wanted end of the spectrum is crowded.
LONG_BASIS = 200
LONG_BASIS_BYTES = 256 << 20
# The basis takes no more memory than this, unless the wanted vectors alone do.
BASIS_BYTES = 4 << 30


@dataclass(frozen=True)
class EigenPairs:
    """Eigenvalues with vectors and errors. Numbers are float64 on the CPU.

    Attributes:
        values: [num], in units of loss per squared parameter for a Hessian; order as `which` says.
        vectors: Unit vectors [n, num] in the operator's dtype and device.
        residuals: Upper bounds on ‖A v − λ v‖ [num], the stated error of the products and rounding included. An
            eigenvalue of A lies within this distance of each value.
        value_bounds: The sharper estimate residual² / gap of that distance [num], where the Ritz values show a gap.
        converged: Every residual is at most tol · |λ|max.
        verified: Shown that no eigenvalue is missed that would belong here, beyond `tol`: wrong with a probability
            below 1 %. For num = 1 beyond 5 % of |λ|max, and below 8 %.
        products: Operator products spent. seconds: Time taken. tol: As asked.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    value_bounds: Tensor
    converged: bool
    verified: bool
    products: int
    seconds: float
    tol: float

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        state = "converged" if self.converged else "NOT converged"
        return f"{', '.join(f'{v:.6g} ± {r:.1g}' for v, r in pairs)} ({state}, {self.products} products)"


def top_eigenvalues(
    op: LinearOperator,
    num: int = 1,
    *,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    tol: float = 1e-3,
    max_products: int | None = None,
    max_seconds: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    verify: bool = True,
    basis_size: int | None = None,
    progress: bool = False,
) -> EigenPairs:
    r"""Extreme eigenvalues of a symmetric operator, by thick-restart Lanczos with full reorthogonalisation.

    Multiple eigenvalues come as often as they are: after convergence a Lanczos run from a random start in the
    complement of the basis either finds what is missing, or shows that nothing is. A single eigenvalue is verified
    from its own run, to 5 % of |λ|max.

    Args:
        op: Symmetric, shape [n, n].
        num: How many, at most n.
        which: "LA" the largest, descending; "SA" the smallest, ascending; "LM" the largest by absolute value,
            descending in it; "BE" num // 2 from the low end and the rest from the high end, ascending.
        tol: Stop when every residual ‖A v − λ v‖ is below tol · |λ|max. Errors of separated eigenvalues are then of
            the order of tol² · |λ|max.
        max_products, max_seconds: Budget; by default 300 + 30 num products. At least num products are made.
        start: Vector [n], or several [n, k], rich in the wanted directions: eigenvectors of a similar operator, say.
            A little noise is added. By default the operator's `start_vector()` and some noise.
        seed: Of all random vectors. Equal seeds give equal results, and global generators are left alone.
        verify: Spend products on `verified`: one or two for num = 1, else 3 to 8 on most networks, and at most 24 or as
            many as the search. Without it a converged value can be the wrong eigenvalue, at loose `tol` above all.
        basis_size: Most vectors [n] to hold. By default max(40, 2 num + 20) and 24 for the verification in at most
            4 GiB, and up to 200 in at most 256 MiB.
        progress: Show a progress bar.

    Warns:
        NotConvergedWarning: the budget ended, or `tol` is below the rounding errors. The best pairs are returned.

    Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000; residual bound:
    Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1.
    """
    began = time.perf_counter()
    _check(op, num, which, tol, max_products, max_seconds, basis_size)
    budget = 300 + 30 * num if max_products is None else max_products
    with plain_tensors(), tqdm(desc="eigenvalues", unit="product", disable=not progress, leave=False) as bar:
        draw = _generator(op, seed)
        first, random_share = _start(op, start, draw)
        ends = Ends(which, num)
        krylov = KrylovBasis(op, _capacity(op, ends, budget, verify, basis_size))
        krylov.add(first)

        def exhausted() -> bool:
            bar.update(krylov.products - bar.n)
            late = max_seconds is not None and time.perf_counter() - began > max_seconds
            return krylov.products >= budget or (late and krylov.size >= num)

        search = RitzSearch(
            krylov,
            ends,
            tol,
            relative_error=lambda: op.relative_error,
            random_share=random_share,
            verify=verify,
            draw=draw,
            exhausted=exhausted,
        )
        verified = search.run()
        found = search.pairs()
        order = found.theta[:num].argsort() if which == "BE" else torch.arange(num)
        vectors = krylov.vectors(found.S[:, order])  # [num, n]
        for v in vectors:
            v /= norm(v)
        residuals = (found.residuals + found.floor)[order]
        pairs = EigenPairs(
            values=found.theta[order],
            vectors=vectors.mT,
            residuals=residuals,
            value_bounds=_value_bounds(found)[order],
            converged=bool((residuals <= tol * found.scale).all()),
            verified=verified,
            products=krylov.products,
            seconds=time.perf_counter() - began,
            tol=tol,
        )
    if not pairs.converged:
        _warn(pairs, found.scale, found.floor)
    return pairs


def _check(
    op: LinearOperator,
    num: int,
    which: str,
    tol: float,
    max_products: int | None,
    max_seconds: float | None,
    basis_size: int | None,
) -> None:
    if not isinstance(op, LinearOperator):
        raise TypeError(
            f"`op` is a {type(op).__name__}; pass a LinearOperator: Hessian(objective), or DenseOperator(matrix)"
        )
    n = op.shape[0]
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise ValueError(f"`num` is {num!r}; ask for at least 1 eigenvalue")
    if num > n:
        raise ValueError(
            f"`num` is {num} but the operator has only n = {n} eigenvalues; ask for at most {n}, or use `dense()`"
        )
    if which not in WHICH:
        near = difflib.get_close_matches(str(which).upper(), WHICH, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(f"{name!r} ({meaning})" for name, meaning in WHICH.items())
        raise ValueError(f"`which` is {which!r}; {hint}it must be one of {names}")
    if not (math.isfinite(tol) and tol >= 0):
        raise ValueError(f"`tol` is {tol}; it is relative to the largest eigenvalue and must be at least 0, like 1e-3")
    if max_products is not None and max_products < num:
        raise ValueError(
            f"`max_products` is {max_products} but {num} eigenvalues take at least {num} products; allow more, "
            "or leave it out"
        )
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"`max_seconds` is {max_seconds}; it must be positive, or None for no limit")
    if basis_size is not None and basis_size < min(n, num + 6):
        raise ValueError(
            f"`basis_size` is {basis_size}; {num} eigenvalues need at least num + 6 = {num + 6} vectors, or n = {n}"
        )


def _capacity(op: LinearOperator, ends: Ends, budget: int, verify: bool, basis_size: int | None) -> int:
    """Rows of the basis: no more than are useful, can be filled, or fit into memory."""
    if basis_size is not None:
        return basis_size
    n, num, row_bytes = op.shape[0], ends.num, op.shape[0] * op.dtype.itemsize
    enough = max(2 * num + 20, 40) + (PROOF_ROWS if verify and num > 1 else 0)
    if ends.want_all(n):
        enough = n
    useful = max(enough, min(LONG_BASIS, LONG_BASIS_BYTES // row_bytes))
    return max(min(useful, BASIS_BYTES // row_bytes, budget + 2), num + 6)


def _generator(op: LinearOperator, seed: int) -> Callable[[], Tensor]:
    """Random directions that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(op.dtype, torch.float32)
    return lambda: torch.randn(op.shape[0], generator=generator, dtype=dtype).to(op.device, op.dtype)


def _start(op: LinearOperator, start: Tensor | None, draw: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The start vector [n] and the length of its random part, relative to it."""
    noise = draw()
    if start is None:
        known = op.start_vector()
        known = None if known is None else checked_vector(op, known.reshape(-1), "op.start_vector()")
    else:
        known = _sum_of_columns(op, start)
    length = 0.0 if known is None else float(norm(known))
    if known is None or length == 0.0:
        return noise, 1.0
    first = known / length + NOISE * noise / float(norm(noise))
    return first, NOISE / float(norm(first))


def _sum_of_columns(op: LinearOperator, start: Tensor) -> Tensor:
    """All start vectors in one: a Krylov space of their sum finds each, with fewer products than a block of them."""
    columns = start.unsqueeze(1) if isinstance(start, Tensor) and start.ndim == 1 else start
    if not isinstance(columns, Tensor) or columns.ndim != 2 or columns.shape[0] != op.shape[0] or not columns.shape[1]:
        shown = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"`start` is {shown}; it must be a tensor [{op.shape[0]}] or [{op.shape[0]}, k]")
    total = torch.zeros_like(columns[:, 0])
    for column in columns.mT:
        length = float(norm(checked_vector(op, column, "start")))
        if length == 0.0:
            raise ValueError("`start` is zero, or has a zero column; leave it out to start from the gradient and noise")
        total += column / length
    return total


def _value_bounds(found: RitzPairs) -> Tensor:
    """residual² / gap [num], where the other Ritz intervals leave a gap wider than the residual; else the residual.

    Source: Parlett, The Symmetric Eigenvalue Problem, theorem 11.7.1 (Kato and Temple).
    """
    wanted, residuals = torch.arange(found.num), found.residuals + found.floor
    gaps = (found.theta[wanted, None] - found.theta).abs() - residuals  # [num, j]
    gaps[wanted, wanted] = math.inf
    gap, residual = gaps.amin(dim=1), residuals[wanted]
    return torch.where(gap > residual, residual.square() / gap, residual)


def _warn(pairs: EigenPairs, scale: float, floor: float) -> None:
    goal = pairs.tol * scale
    missed = int((pairs.residuals > goal).sum())
    cure = (
        f"no smaller than the error of the products, {floor:.2g}: loosen `tol` or work in float64"
        if goal <= floor
        else "not met within the budget: raise it (`max_products`, `max_seconds`, `basis_size`), or loosen `tol`"
    )
    warnings.warn(
        f"{missed} of {len(pairs)} eigenpairs not converged after {pairs.products} products: largest residual "
        f"{float(pairs.residuals.max()):.3g}, asked for tol · |λ|max = {goal:.3g}, which is {cure}",
        NotConvergedWarning,
        stacklevel=3,
    )
