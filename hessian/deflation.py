r"""Leading eigenvectors taken out of an operator, so that random vectors only have to estimate what is left.

For orthonormal rows U and P = I − Uᵀ U the operator splits into three parts,

    A = Uᵀ (U A Uᵀ) U + P A P + (P A Uᵀ U + its transpose).

tr A = tr U A Uᵀ + tr P A P holds whatever U is. The eigenvalues of A and of the first two parts differ by at most
2 ‖P A Uᵀ‖_* in the sum of |differences| of the sorted values, so that the densities are 2 ‖P A Uᵀ‖_* / n apart in the
Wasserstein-1 distance. For the Ritz vectors of Lanczos the columns of P A Uᵀ are the residuals.

Sizes: n rows, K rows of U, j directions of the Lanczos run behind them.

Source: Bhatia, Matrix Analysis, 1997, theorem IV.3.4 (Lidskii, Mirsky, Wielandt), for the distance.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.accurate import SHORTEST_CHUNK, norm
from ..landscape.memory import available_bytes
from .exclusion import RandomRun
from .lanczos import KrylovBasis, plain_tensors
from .operator import LinearOperator

# Ritz pairs count as found with a residual below this share of |λ|max: what they leave behind is its square.
RESIDUAL_SHARE = 0.02
# Products of a run: at most so many for each pair, and so many more.
PRODUCTS_PER_PAIR = 4
PRODUCTS_BESIDE = 20
# Random part of the start beside the operator's own start vector.
NOISE = 0.3
# Share of the free memory that the run may take.
MEMORY_SHARE = 8
# Residuals at the ends are brought below this share of what is asked: rounding has to fit in.
END_SHARE = 0.9
# The run overlooks an eigenvector that it could have shown with a probability of at most 0.8 times this.
DOUBT = 0.1


@dataclass(frozen=True)
class EndPairs:
    """`num` eigenvalues at each end of the spectrum, wanted with residuals of at most `tol` · |λ|max."""

    num: int
    tol: float


@dataclass(frozen=True)
class Subspace:
    """Ritz pairs (θ, u) of an operator A, largest |θ| first. Numbers are float64 on the CPU.

    Attributes:
        vectors: U [K, n], orthonormal rows.
        values: θ [K], the Rayleigh quotients u A uᵀ.
        residuals: ‖A u − θ u‖ [K].
        coupling: ‖P A Uᵀ‖_*, the sum of the singular values.
        products: Spent.
        run: The Lanczos coefficients, for what they exclude beside the values; None after a restart.
    """

    vectors: Tensor
    values: Tensor
    residuals: Tensor
    coupling: float
    products: int
    run: RandomRun | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def square(self) -> float:
        """‖A Uᵀ‖_F²."""
        return float(self.values.square().sum() + self.residuals.square().sum())

    def project(self, V: Tensor) -> Tensor:
        """P v [g, n] for the rows v of V [g, n]; coefficients are summed in float64."""
        c = torch.zeros(len(V), len(self), dtype=torch.float64, device=V.device)
        pieces = [slice(first, first + SHORTEST_CHUNK * 8) for first in range(0, V.shape[1], SHORTEST_CHUNK * 8)]
        for part in pieces:
            c += V[:, part].double() @ self.vectors[:, part].double().mT
        c, out = c.to(V.dtype), torch.empty_like(V)
        for part in pieces:
            out[:, part] = V[:, part] - c @ self.vectors[:, part]
        return out


class Complement(LinearOperator):
    """P A P on the vectors orthogonal to a subspace, for which it is P A: a product costs one of A."""

    def __init__(self, op: LinearOperator, subspace: Subspace) -> None:
        super().__init__(op.shape[0], dtype=op.dtype, device=op.device)
        self.op, self.subspace = op, subspace

    @property
    def relative_error(self) -> float:
        return self.op.relative_error

    def expect(self, products: int) -> None:
        self.op.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self.op.fixed()

    def matmat(self, V: Tensor) -> Tensor:
        return self.project(self.op.matmat(V))

    def project(self, W: Tensor) -> Tensor:
        """P W for columns W [n, m]."""
        return self.subspace.project(W.mT).mT

    def __repr__(self) -> str:
        return repr(self.op)


def products_for(num: int, n: int, ends: EndPairs | None = None) -> int:
    """The most products that `leading_subspace` spends on `num` pairs and those of the ends."""
    return min(n, PRODUCTS_PER_PAIR * (num + (2 * ends.num if ends else 0)) + PRODUCTS_BESIDE)


def leading_subspace(
    op: LinearOperator, num: int, *, seed: int, max_products: int | None = None, ends: EndPairs | None = None
) -> Subspace:
    """At least `num` Ritz pairs of largest |θ| by Lanczos, and others of the run, as an eighth of the memory holds.

    The run starts from the operator's `start_vector()` and noise, and ends when the `num` leading residuals are below
    2 % of |λ|max: the density and the trace need no more.

    Args:
        op: Symmetric, in float32 or float64.
        num: Leading pairs wanted, below n.
        seed: Of the noise, which no other stream of that seed shares.
        max_products: By default `products_for(num, n, ends)`.
        ends: Pairs that the run goes on for until they, too, are there.
    """
    n = op.shape[0]
    check_deflation(op, num)
    most = products_for(num, n, ends) if max_products is None else min(max_products, n)
    with plain_tensors(), op.fixed():
        affordable = available_bytes(op.device) // (MEMORY_SHARE * n * op.dtype.itemsize)
        krylov = KrylovBasis(op, min(most + 1, max(affordable, 2 * num + 10)))
        start, random_share = _start(op, seed)
        krylov.add(start)
        while krylov.num_pending and krylov.products < most:
            if krylov.is_full:
                theta, S, _ = krylov.ritz()
                kept = theta.abs().argsort(descending=True)[: num + (krylov.capacity - num) // 3]
                krylov.restart(theta[kept], S[:, kept])
            krylov.expand()
            if krylov.size >= num and _are_found(krylov, num, ends, op.relative_error):
                break
        return _subspace(krylov, n / (DOUBT * random_share) ** 2)


def check_deflation(op: LinearOperator, num: int) -> None:
    if not isinstance(num, int) or isinstance(num, bool) or num < 0:
        raise ValueError(f"`deflate` is {num!r}; it must be a number of eigenpairs, or 0 for none")
    if num >= op.shape[0]:
        raise ValueError(
            f"`deflate` is {num}, but the operator has only n = {op.shape[0]} eigenvalues; deflate fewer, or take "
            "`dense()`"
        )
    if op.dtype.itemsize < 4:
        raise ValueError(f"`deflate` is {num}, but {op!r} works in {op.dtype}, too coarse for it: use float32, or 0")


def _start(op: LinearOperator, seed: int) -> tuple[Tensor, float]:
    """The start vector [n] and the length of its random part, relative to it."""
    # Hashed, because a probe of the same seed must be independent of this.
    generator = torch.Generator().manual_seed(seed)
    generator.manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))
    noise = torch.randn(op.shape[0], generator=generator, dtype=op.dtype).to(op.device)
    known = op.start_vector()
    length = 0.0 if known is None else float(norm(known.reshape(-1)))
    if known is None or not math.isfinite(length) or length == 0.0:
        return noise, 1.0
    start = known.reshape(-1).detach() / length + NOISE * noise / float(norm(noise))
    return start, NOISE / float(norm(start))


def _residuals(krylov: KrylovBasis, S: Tensor) -> Tensor:
    """‖A v − θ v‖ [k] of Ritz vectors with coordinates S [j, k]: what lies in the pending directions."""
    return torch.linalg.vector_norm(krylov.coefficients[krylov.size :] @ S, dim=0)


def _are_found(krylov: KrylovBasis, num: int, ends: EndPairs | None, relative_error: float) -> bool:
    theta, S, _ = krylov.ritz()
    residuals = _residuals(krylov, S) / theta.abs().max()
    if bool((residuals[theta.abs().argsort(descending=True)[:num]] > RESIDUAL_SHARE).any()):
        return False
    if ends is None or ends.tol <= relative_error:
        return True
    outer = torch.cat([residuals[: ends.num], residuals[-ends.num :]])
    return len(theta) >= 2 * ends.num and bool((outer <= END_SHARE * (ends.tol - relative_error)).all())


def _subspace(krylov: KrylovBasis, needed: float) -> Subspace:
    theta, S, asymmetry = krylov.ritz()
    order = theta.abs().argsort(descending=True)
    theta, S = theta[order], S[:, order]
    coupling = krylov.coefficients[krylov.size :] @ S  # [p, K]
    return Subspace(
        vectors=krylov.vectors(S),
        values=theta,
        residuals=torch.hypot(_residuals(krylov, S), asymmetry[order]),
        coupling=float(torch.linalg.matrix_norm(coupling, "nuc")) if len(coupling) else 0.0,
        products=krylov.products,
        run=_random_run(krylov, needed) if krylov.restarts == 0 else None,
    )


def _random_run(krylov: KrylovBasis, needed: float) -> RandomRun:
    remainders = krylov.coefficients.diagonal(-1).tolist()
    remainders += [0.0] * (krylov.size - len(remainders))
    return RandomRun(needed, krylov.coefficients.diagonal().tolist(), remainders)
