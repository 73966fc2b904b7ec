"""The spectrum of one principal block of a curvature matrix: diagonalised, sampled, or indistinguishable from zero."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .eigs import NotConvergedWarning, top_eigenvalues
from .estimate import Estimate
from .extremes import Extremes
from .operator import LinearOperator
from .slq import SpectralDensity


@dataclass(frozen=True)
class BlockSpectrum:
    """What is known about the eigenvalues of one principal block A_bb [size, size].

    Attributes:
        name, size: Of the block.
        exact: The block was formed and diagonalised; else it was sampled.
        zero: Its curvature is below the noise of the largest block: it is reported as 0, and the residuals say how
            large the noise is.
        eigenvalues: All [size], ascending, float64, of an exact block; else None.
        density: Spectral density of a sampled block that is not zero; else None.
        top, top_residuals: The largest eigenvalues, descending, each with a bound on its distance to a true one.
        bottom, bottom_residuals: The smallest, ascending. An eigenvalue of a block with few may be in both.
        trace: Exact (`stderr` 0) for an exact block.
        noise: Magnitude at or below which an eigenvalue cannot be told from 0.
        converged: `top` and `bottom` reached the tolerance within the budget.
        products: With the block operator.
    """

    name: str
    size: int
    exact: bool
    zero: bool
    eigenvalues: Tensor | None
    density: SpectralDensity | None
    top: Tensor
    top_residuals: Tensor
    bottom: Tensor
    bottom_residuals: Tensor
    trace: Estimate
    noise: float
    converged: bool
    products: int
    seconds: float

    @property
    def scale(self) -> float:
        """Largest |λ|."""
        return float(torch.cat([self.top, self.bottom]).abs().max())

    @property
    def scale_error(self) -> float:
        """Bound on the distance of the eigenvalue of largest |λ| found to a true one."""
        ends = torch.cat([self.top, self.bottom]).abs()
        return float(torch.cat([self.top_residuals, self.bottom_residuals])[ends.argmax()])

    def atoms(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [k] and their shares [k], summing to 1; for a sampled block the mean of the quadratures."""
        if self.eigenvalues is not None:
            return self.eigenvalues, torch.full_like(self.eigenvalues, 1 / self.size)
        if self.density is None:
            return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        nodes, weights = self.density.nodes.double().cpu(), self.density.weights.double().cpu()
        return nodes.reshape(-1), weights.reshape(-1) / weights.sum()

    def half_atoms(self) -> tuple[Tensor, Tensor] | None:
        """What half the Lanczos steps of a sampled block give; `atoms` of any other; None where it is unknown."""
        if self.density is None or self.density.exact:
            return self.atoms()
        nodes, weights = self.density.half_nodes.double().cpu(), self.density.half_weights.double().cpu()
        return (nodes.reshape(-1), weights.reshape(-1) / weights.sum()) if nodes.numel() else None

    @property
    def negative_mass(self) -> float:
        """Σ_{λ<0} |λ| / Σ |λ|; 0 for a zero block."""
        nodes, weights = self.atoms()
        total = float((weights * nodes.abs()).sum())
        return float((weights * nodes.clamp(max=0.0).abs()).sum()) / total if total > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """(Σ |λ|)² / Σ λ², between 1 and the size: the number of eigenvalues that carry the curvature; 0 if zero."""
        nodes, weights = self.atoms()
        squares = float((weights * nodes.square()).sum())
        return self.size * float((weights * nodes.abs()).sum()) ** 2 / squares if squares > 0 else 0.0


def exact_spectrum(name: str, op: LinearOperator, *, num_top: int, floor: float) -> BlockSpectrum:
    """All eigenvalues of the matrix formed from n products, made symmetric, in float64."""
    began = time.perf_counter()
    matrix = op.dense().detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"block {name!r} of the operator has NaN or infinite entries; check that the loss is finite")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    scale = float(values.abs().max())
    # What the products got wrong: an asymmetric part shows, a symmetric one is in their stated error.
    error = float(torch.linalg.matrix_norm(matrix - matrix.T)) / 2
    error += (op.relative_error + len(values) * torch.finfo(torch.float64).eps) * scale
    num = min(num_top, len(values))
    return BlockSpectrum(
        name=name,
        size=len(values),
        exact=True,
        zero=False,
        eigenvalues=values,
        density=None,
        top=values.flip(0)[:num],
        top_residuals=torch.full((num,), error, dtype=torch.float64),
        bottom=values[:num],
        bottom_residuals=torch.full((num,), error, dtype=torch.float64),
        trace=Estimate.exact(float(values.sum()), products=len(values)),
        noise=floor * scale,
        converged=True,
        products=len(values),
        seconds=time.perf_counter() - began,
    )


def sampled_spectrum(
    name: str,
    op: LinearOperator,
    density: SpectralDensity,
    ends: Extremes | None,
    *,
    num_top: int,
    floor: float,
    tol: float,
    max_products: int | None,
    seed: int,
) -> BlockSpectrum:
    """The extreme eigenvalues beside a density already there: those of its own runs where they meet `tol`."""
    if ends is not None and ends.within(tol):
        converged, products, seconds = True, 0, 0.0
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # in `converged`; the caller warns once for all blocks
            options = {"tol": tol, "accuracy": "vectors", "max_products": max_products, "seed": seed}
            # Of a multiple eigenvalue the run of the search sees one copy only.
            pairs = top_eigenvalues(op, 2 * num_top, which="BE", verify=True, **options)
        order = pairs.values.argsort()
        values, residuals = pairs.values[order].double().cpu(), pairs.residuals[order].double().cpu()
        ends = Extremes(values.flip(0)[:num_top], residuals.flip(0)[:num_top], values[:num_top], residuals[:num_top])
        converged, products, seconds = pairs.converged, pairs.products, pairs.seconds
    scale = float(torch.cat([ends.top, ends.bottom]).abs().max())
    return BlockSpectrum(
        name=name,
        size=op.shape[0],
        exact=False,
        zero=False,
        eigenvalues=None,
        density=density,
        top=ends.top,
        top_residuals=ends.top_residuals,
        bottom=ends.bottom,
        bottom_residuals=ends.bottom_residuals,
        trace=scaled(density.mean(), op.shape[0]),
        noise=floor * scale,
        converged=converged and density.converged,
        products=density.products + products,
        seconds=density.seconds + seconds,
    )


def zero_spectrum(
    name: str, size: int, *, exact: bool, scale: float, num_top: int, products: int, seconds: float
) -> BlockSpectrum:
    """Of a block whose measured eigenvalues, at most `scale` in size, are noise."""
    num = min(num_top, size)
    zeros, error = torch.zeros(num, dtype=torch.float64), torch.full((num,), scale, dtype=torch.float64)
    return BlockSpectrum(
        name=name,
        size=size,
        exact=exact,
        zero=True,
        eigenvalues=torch.zeros(size, dtype=torch.float64) if exact else None,
        density=None,
        top=zeros,
        top_residuals=error,
        bottom=zeros,
        bottom_residuals=error,
        trace=Estimate.exact(0.0, products=products),
        noise=scale,
        converged=True,
        products=products,
        seconds=seconds,
    )


def scaled(mean: Estimate, n: int) -> Estimate:
    """n times an estimate: the trace from the mean eigenvalue."""
    return Estimate(n * mean.estimate, n * mean.stderr, n * mean.samples, mean.products, mean.converged)
