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
from ..landscape.memory import available_bytes
from .estimate import NotConvergedWarning
from .lanczos import KrylovBasis, checked_vector, plain_tensors
from .lockstep import SMALL_BASIS, UNROUNDED_SHARE
from .operator import LinearOperator
from .plan import planned
from .planners import plan_eigenvalues
from .ritz_search import PROOF_ROWS, Accuracy, Ends, Proof, RitzPairs, RitzSearch

WHICH = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest absolute value",
    "BE": "both ends",
}
# Random part of the start beside the unit vector of the operator or the user: nothing can hide behind a symmetric
# start then, and the proof from the search's own run rests on it. The first product all but removes noise from a vector
# that a network's Hessian mostly maps to zero, so for a single pair even four times as much costs nothing.
NOISE = 0.3
SINGLE_NOISE = 4.0
# The coarse start is an eigenvector to this accuracy, or what so many products give.
COARSE_TOL = 0.01
COARSE_PRODUCTS = 16
# From so many parameters on a product is dear beside its fixed cost.
COARSE_FROM = 500_000
# Products that a search takes on most networks, for `LinearOperator.expect`.
EXPECTED = 8
EXPECTED_PER_PAIR = 3
# A long basis saves restarts, and products where the wanted end of the spectrum is crowded.
LONG_BASIS = 200
LONG_BASIS_BYTES = 256 << 20
# The basis takes no more memory than this, nor than half of what is free, unless the wanted vectors alone do.
BASIS_BYTES = 8 << 30


@dataclass(frozen=True)
class EigenPairs:
    """Eigenvalues with vectors and errors. Numbers are float64 on the CPU.

    Attributes:
        values: [num], in units of loss per squared parameter for a Hessian; order as `which` says.
        vectors: Unit vectors [n, num] in the operator's dtype and device.
        residuals: Upper bounds on ‖A v − λ v‖ [num], the stated error of the products and rounding included. An
            eigenvalue of A lies within this distance of each value.
        value_bounds: Cautious estimates of that distance [num]: three times residual² / gap (Kato, Temple) for the gap
            of the Ritz values, between a tenth of the residual and the residual, the stated errors included. Where two
            eigenvalues still pass as one Ritz value between them, the true distance can be up to the residual.
        converged: Every residual, or with accuracy="values" every one of `value_bounds`, is at most tol · |λ|max.
        verified: Shown, as far as asked for by `verify`, that no eigenvalue is missed that would belong here.
        margin: What `verified` leaves open: such an eigenvalue could be hidden only within margin · |λ|max of one that
            was found. Infinite if not verified.
        orthogonality: Largest entry of |Q Qᵀ − I| of the basis Q: of the last row alone, or of all where `basis_dtype`
            rounds them.
        products: Operator products spent. coarse_products: Those of the coarse operator, far cheaper ones.
        seconds: Time taken. tol, accuracy: As asked.
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
    accuracy: Accuracy = "values"
    margin: float = math.inf
    coarse_products: int = 0
    orthogonality: float = math.nan

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        state = "converged" if self.converged else "NOT converged"
        return f"{', '.join(f'{v:.6g} ± {r:.1g}' for v, r in pairs)} ({state}, {self.products} products)"


@planned(plan_eigenvalues)
def top_eigenvalues(
    op: LinearOperator,
    num: int = 1,
    *,
    which: Literal["LA", "SA", "LM", "BE"] = "LA",
    tol: float = 1e-3,
    accuracy: Accuracy = "values",
    max_products: int | None = None,
    max_seconds: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    verify: bool | Literal["run"] = "run",
    coarse: bool = True,
    basis_size: int | None = None,
    basis_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> EigenPairs:
    r"""Extreme eigenvalues of a symmetric operator, by thick-restart Lanczos with full reorthogonalisation.

    What is certain is that an eigenvalue lies within `residuals` of each value; `value_bounds` are estimates. That no
    other eigenvalue belongs in its place is shown with the stated probability, as far as `verify` asks for it.

    Args:
        op: Symmetric, shape [n, n].
        num: How many, at most n.
        which: "LA" the largest, descending; "SA" the smallest, ascending; "LM" the largest by absolute value,
            descending in it; "BE" num // 2 from the low end and the rest from the high end, ascending.
        tol: Accuracy, relative to |λ|max.
        accuracy: "values": stop when for every pair three times residual² / gap, and a tenth of the residual, are at
            most tol · |λ|max. The factor allows for neighbours that no Ritz value shows yet; it is an estimate.
            Eigenvalues closer together than 20 tol · |λ|max can still pass as one, a mean of theirs, so the distance to
            an eigenvalue is certain to 10 tol · |λ|max only; asking for one more shows such a pair. "vectors": stop
            when every residual is below tol · |λ|max, which takes a few products more and bounds the values, too;
            errors of separated eigenvalues are then of the order of tol² · |λ|max.
        max_products, max_seconds: Budget; by default 300 + 30 num products. At least num products are made.
        start: Vector [n], or several [n, k], rich in the wanted directions: eigenvectors of a similar operator, say.
            A little noise is added. By default the operator's `start_vector()` and some noise.
        seed: Of all random vectors. Equal seeds give equal results, and global generators are left alone.
        verify: What has to be shown, by the random part of a start vector, beside convergence.
            "run": from the search itself, at no or a few products, that every eigenvalue that would belong here lies
            within `margin` · |λ|max of one that was found, margin ≤ 50 % for num = 1 (so none exceeds 1.5 times the
            value), ≤ 5 % for more. Wrong with a probability below 8 %. Copies of those found are not excluded.
            True: for num = 1 the same with 5 %, for one to three products more. For more, by a Lanczos run from a
            random start in the complement of the basis, that nothing is missed beyond `tol`, multiple eigenvalues
            coming as often as they are; wrong with a probability below 1 %. It takes a quarter to all of the products
            of the search once more.
            False: nothing. A converged value can then be the wrong eigenvalue, at loose `tol` above all.
        coarse: For num = 1 and no `start`, from 500 000 rows on, find the eigenvector of `op.coarse()` first and start
            from it. That changes the products needed, and neither bounds nor proofs.
        basis_size: Most vectors [n] to hold. By default max(40, 2 num + 20) and 24 for the verification in at most
            8 GiB and half of the free memory, and up to 200 in at most 256 MiB.
        basis_dtype: In which they are held. torch.float16 takes half the memory of float32. Its rounding is measured
            and in `residuals`, which get no smaller than about 2e-4 |λ|max, and as much again or twice that for every
            restart, so that `tol` = 1e-3 with restarts can be out of reach. torch.bfloat16 takes the same memory and
            rounds eight times as much. By default as the operator works; float16 where num + 6 vectors in float32
            would take more than half of the free memory.
        progress: Show a progress bar.

    Warns:
        NotConvergedWarning: the budget ended, or `tol` is below the rounding errors. The best pairs are returned.

    Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000; residual bound:
    Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1.
    """
    began = time.perf_counter()
    _check(op, num, which, tol, max_products, max_seconds, basis_size)
    _check_choice("accuracy", accuracy, ("values", "vectors"))
    _check_choice("verify", verify, ("run", True, False))
    _check_choice("basis_dtype", basis_dtype, _shorter_dtypes(op))
    budget = default_budget(num) if max_products is None else max_products
    with (
        plain_tensors(),
        op.fixed(),
        tqdm(desc="eigenvalues", unit="product", disable=not progress, leave=False) as bar,
    ):
        draw = _generator(op, seed)
        proof: Proof = "complement" if verify is True else "run" if verify else "none"
        ends = Ends(which, num)
        op.expect(EXPECTED if num == 1 else EXPECTED_PER_PAIR * num)
        known, coarse_products = _known(op, start, ends, draw if coarse else None)
        first, random_share = _start(known, draw, SINGLE_NOISE if num == 1 and verify and start is None else NOISE)
        rows_dtype = _rows_dtype(op, num, basis_size) if basis_dtype is None else basis_dtype
        krylov = KrylovBasis(op, _capacity(op, ends, budget, proof, basis_size, rows_dtype), rows_dtype)
        krylov.add(first)
        del first, known

        def exhausted() -> bool:
            bar.update(krylov.products - bar.n)
            late = max_seconds is not None and time.perf_counter() - began > max_seconds
            return krylov.products >= budget or (late and krylov.size >= num)

        search = RitzSearch(
            krylov,
            ends,
            tol,
            accuracy=accuracy,
            relative_error=lambda: op.relative_error,
            random_share=random_share,
            proof=proof,
            draw=draw,
            exhausted=exhausted,
        )
        margin = search.run()
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
            value_bounds=(found.value_errors + found.floor)[order],
            converged=bool((found.errors(accuracy) + found.floor <= tol * found.scale).all()),
            verified=margin is not None,
            products=krylov.products,
            seconds=time.perf_counter() - began,
            tol=tol,
            accuracy=accuracy,
            margin=math.inf if margin is None else margin,
            coarse_products=coarse_products,
            orthogonality=krylov.watch_last_row(),
        )
    if not pairs.converged:
        _warn(found, pairs, is_rounded=krylov.is_rounded)
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


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _shorter_dtypes(op: LinearOperator) -> tuple[torch.dtype | None, ...]:
    shorter = (d for d in (torch.float32, torch.float16, torch.bfloat16) if d.itemsize < op.dtype.itemsize)
    return None, op.dtype, *shorter


def _rows_dtype(op: LinearOperator, num: int, basis_size: int | None) -> torch.dtype:
    """float16 where even the fewest rows in float32 take too much; a float64 run is there for its digits."""
    fewest = (num + 6 if basis_size is None else basis_size) * op.shape[0] * op.dtype.itemsize
    if op.dtype != torch.float32 or fewest <= SMALL_BASIS or fewest <= available_bytes(op.device) // UNROUNDED_SHARE:
        return op.dtype
    return torch.float16


def default_budget(num: int) -> int:
    """Most products for `num` pairs."""
    return 300 + 30 * num


def basis_bytes(
    op: LinearOperator,
    num: int,
    *,
    which: str,
    max_products: int | None,
    verify: bool | Literal["run"],
    basis_size: int | None,
    basis_dtype: torch.dtype | None,
) -> int:
    """Memory of the basis of a search with these arguments."""
    proof: Proof = "complement" if verify is True else "run" if verify else "none"
    dtype = _rows_dtype(op, num, basis_size) if basis_dtype is None else basis_dtype
    budget = default_budget(num) if max_products is None else max_products
    rows = _capacity(op, Ends(which, num), budget, proof, basis_size, dtype)
    return min(rows, op.shape[0]) * op.shape[0] * dtype.itemsize


def _capacity(
    op: LinearOperator, ends: Ends, budget: int, proof: Proof, basis_size: int | None, dtype: torch.dtype
) -> int:
    """Rows of the basis: no more than are useful, can be filled, or fit into memory."""
    if basis_size is not None:
        return basis_size
    n, num, row_bytes = op.shape[0], ends.num, op.shape[0] * dtype.itemsize
    enough = max(2 * num + 20, 40) + (PROOF_ROWS if proof == "complement" and num > 1 else 0)
    if ends.want_all(n):
        enough = n
    useful = max(enough, min(LONG_BASIS, LONG_BASIS_BYTES // row_bytes))
    # Every restart of rounded rows costs accuracy.
    free = available_bytes(op.device) // UNROUNDED_SHARE
    most = min(BASIS_BYTES, free) if dtype == op.dtype else max(BASIS_BYTES, free)
    return max(min(useful, most // row_bytes, budget + 2), num + 6)


def _generator(op: LinearOperator, seed: int) -> Callable[[], Tensor]:
    """Random directions that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(op.dtype, torch.float32)
    return lambda: torch.randn(op.shape[0], generator=generator, dtype=dtype).to(op.device, op.dtype)


def _known(
    op: LinearOperator, start: Tensor | None, ends: Ends, draw: Callable[[], Tensor] | None
) -> tuple[Tensor | None, int]:
    """A vector [n] rich in the wanted directions, or None; and the coarse products spent on it."""
    if start is not None:
        return _sum_of_columns(op, start), 0
    similar = op.coarse() if draw is not None and ends.num == 1 and op.shape[0] >= COARSE_FROM else None
    if similar is not None and draw is not None:
        return _coarse_start(similar, ends, draw)
    known = op.start_vector()
    return (None if known is None else checked_vector(op, known.reshape(-1), "op.start_vector()")), 0


def _coarse_start(op: LinearOperator, ends: Ends, draw: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The wanted eigenvector [n] of a similar operator, to a low accuracy, and its products."""
    op.expect(COARSE_PRODUCTS)
    known = op.start_vector()
    first, _ = _start(None if known is None else checked_vector(op, known.reshape(-1), "start_vector()"), draw, NOISE)
    krylov = KrylovBasis(op, COARSE_PRODUCTS + 2)
    krylov.add(first)
    search = RitzSearch(
        krylov,
        ends,
        COARSE_TOL,
        accuracy="values",
        relative_error=lambda: op.relative_error,
        random_share=1.0,
        proof="none",
        draw=draw,
        exhausted=lambda: krylov.products >= COARSE_PRODUCTS,
    )
    search.run()
    return krylov.vectors(search.pairs().S[:, :1])[0], krylov.products


def _start(known: Tensor | None, draw: Callable[[], Tensor], share: float) -> tuple[Tensor, float]:
    """The start vector [n] and the length of its random part, relative to it."""
    noise = draw()
    length = 0.0 if known is None else float(norm(known))
    if known is None or length == 0.0:
        return noise, 1.0
    first = known / length + (share / float(norm(noise))) * noise
    return first, share / float(norm(first))


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


def _warn(found: RitzPairs, pairs: EigenPairs, *, is_rounded: bool) -> None:
    goal, floor = pairs.tol * found.scale, found.floor
    errors = found.errors(pairs.accuracy) + floor
    source = "the rounded basis and the products" if is_rounded else "the products"
    more_digits = "give the basis more digits (`basis_dtype`, `basis_size`)" if is_rounded else "work in float64"
    kind = "residual" if pairs.accuracy == "vectors" else "bound on a value's error"
    cure = (
        f"no smaller than the error of {source}, {floor:.2g}: loosen `tol` or {more_digits}"
        if goal <= floor
        else "not met within the budget: raise it (`max_products`, `max_seconds`, `basis_size`), or loosen `tol`"
    )
    warnings.warn(
        f"{int((errors > goal).sum())} of {len(pairs)} eigenpairs not converged after {pairs.products} products: "
        f"largest {kind} {float(errors.max()):.3g}, asked for tol · |λ|max = {goal:.3g}, which is {cure}",
        NotConvergedWarning,
        stacklevel=3,
    )
