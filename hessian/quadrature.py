"""Densities from the coefficients of Lanczos runs, or from a whole matrix.

Sizes: n rows, p probe vectors, K deflated pairs, k Lanczos steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.tridiagonal import tridiagonal_quadrature
from .deflation import Complement, Subspace
from .density import SpectralDensity, w1_distance
from .lockstep import Sampled
from .operator import LinearOperator
from .probes import exact_rounding, rounding


def densities(samples: Sequence[Sampled]) -> list[SpectralDensity]:
    """The quadratures of all probes of all operators [operators, p, k] at once, and their errors.

    The values that a `Complement` leaves out join the nodes of every probe with the weight 1/n.
    """
    began = time.perf_counter()
    alpha, beta, steps = (
        torch.stack([torch.cat(getattr(s, name)) for s in samples]) for name in ("alpha", "beta", "steps")
    )
    half = max(1, alpha.shape[-1] // 2)
    fine = [x.cpu() for x in tridiagonal_quadrature(alpha, beta, steps)]
    coarse = [x.cpu() for x in tridiagonal_quadrature(alpha[..., :half], beta[..., : half - 1], steps.clamp(max=half))]
    found = [_density(s, *(x[i] for x in (*fine, *coarse))) for i, s in enumerate(samples)]
    shared = (time.perf_counter() - began) / len(samples)
    return [replace(density, seconds=s.seconds + shared) for s, density in zip(samples, found, strict=True)]


def _density(
    s: Sampled, nodes: Tensor, weights: Tensor, coarse_nodes: Tensor, coarse_weights: Tensor
) -> SpectralDensity:
    n, p = s.op.shape[0], len(nodes)
    subspace = s.op.subspace if isinstance(s.op, Complement) else None
    resolution, square = w1_distance(nodes, weights / p, coarse_nodes, coarse_weights / p), s.moments.mean_square
    plain = SpectralDensity(
        nodes,
        weights,
        mean_stderr=math.nan,
        exact=False,
        products=s.products,
        seconds=s.seconds,
        resolution=resolution,
        half_nodes=coarse_nodes,
        half_weights=coarse_weights,
        orthogonality=s.orthogonality,
    )
    density = plain if subspace is None else _joined(plain, subspace, n)
    square += 0.0 if subspace is None else subspace.square
    error = math.hypot(s.moments.stderr(), rounding(s.op, math.sqrt(square)))
    return replace(density, mean_stderr=error / n)


def _joined(density: SpectralDensity, subspace: Subspace, n: int) -> SpectralDensity:
    """The density of P A P, of weight (n − K)/n, and the K Ritz values."""
    nodes, weights = _with_values(density.nodes, density.weights, subspace, n)
    half_nodes, half_weights = _with_values(density.half_nodes, density.half_weights, subspace, n)
    return replace(
        density,
        nodes=nodes,
        weights=weights,
        products=density.products + subspace.products,
        deflated=subspace.values,
        deflated_residuals=subspace.residuals,
        coupling=2 * subspace.coupling / n,
        resolution=(n - len(subspace)) / n * density.resolution,
        half_nodes=half_nodes,
        half_weights=half_weights,
    )


def _with_values(nodes: Tensor, weights: Tensor, subspace: Subspace, n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [p, k + K] of every probe and the Ritz values together."""
    p, K = len(nodes), len(subspace)
    joined, order = torch.cat([nodes, subspace.values.expand(p, K)], dim=1).sort(dim=1)
    shares = torch.full((p, K), 1 / n, dtype=torch.float64, device="cpu")
    return joined, torch.cat([(n - K) / n * weights, shares], dim=1).gather(1, order)


def exact_density(op: LinearOperator) -> SpectralDensity:
    """All eigenvalues, from n products."""
    n, began = op.shape[0], time.perf_counter()
    matrix = op.dense().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the matrix of {op!r} has NaN or infinite entries; check that the loss is finite")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    error = exact_rounding(op, float(torch.linalg.vector_norm(values))) / n
    weights = torch.full((1, n), 1 / n, dtype=torch.float64, device="cpu")
    return SpectralDensity(values.unsqueeze(0), weights, error, True, n, time.perf_counter() - began)


class Watched(LinearOperator):
    """An operator whose products are shown."""

    def __init__(self, op: LinearOperator, on_products: Callable[[int], object]) -> None:
        super().__init__(op.shape[0], dtype=op.dtype, device=op.device)
        self._op, self._on_products = op, on_products

    @property
    def relative_error(self) -> float:
        return self._op.relative_error

    def expect(self, products: int) -> None:
        self._op.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self._op.fixed()

    def start_vector(self) -> Tensor | None:
        return self._op.start_vector()

    def matmat(self, V: Tensor) -> Tensor:
        image = self._op.matmat(V)
        self._on_products(V.shape[1])
        return image

    def __repr__(self) -> str:
        return repr(self._op)
