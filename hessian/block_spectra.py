"""The spectrum of every diagonal block of a curvature matrix, and how much the blocks differ."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..landscape.blocks import Blocks, Partition, partition
from ..landscape.objective import Objective
from .curvature import Hessian
from .divergence import js_divergence, spectral_masses
from .eigs import EigenPairs, NotConvergedWarning, top_eigenvalues
from .estimate import Estimate
from .operator import LinearOperator
from .slq import SpectralDensity, spectral_density

# Curvature below this share of the largest block's is rounding: the key bias of an attention, for example, has an
# exactly zero Hessian, in whose noise Lanczos would find eigenvalues.
ZERO = {torch.float64: 1e-13, torch.float32: 1e-6}
# An operator whose stated error is below this many roundings is as exact as its dtype.
ROUNDINGS = 100


@dataclass(frozen=True)
class BlockSpectrum:
    """What is known about the eigenvalues of one principal block A_bb [size, size].

    Attributes:
        name, size: Of the block.
        exact: The block was formed and diagonalised; else it was sampled.
        zero: Its curvature is below the noise of the largest block; it is reported as 0, and `residuals` say how
            large the noise is.
        eigenvalues: All [size], ascending, float64, of an exact block; else None.
        density: Spectral density of a sampled block; else None.
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

    def atoms(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [k] and their shares [k], summing to 1; for a sampled block the mean of the quadratures."""
        if self.eigenvalues is not None:
            return self.eigenvalues, torch.full_like(self.eigenvalues, 1 / self.size)
        assert self.density is not None
        nodes, weights = self.density.nodes.double().cpu(), self.density.weights.double().cpu()
        return nodes.reshape(-1), weights.reshape(-1) / weights.sum()

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


@dataclass(frozen=True)
class Heterogeneity:
    """How much the blocks differ. Means and maxima over pairs are 0, and ratios 1, where there are fewer than two.

    Attributes:
        js_mean, js_max: Jensen-Shannon divergence over all pairs of blocks, in nats, at most ln 2.
        js_max_pair: The two blocks that differ most.
        scale_ratio: Largest over smallest max |λ|, over the blocks that are not zero.
        largest, smallest: The blocks with these.
        negative_mass: Σ_{λ<0} |λ| / Σ |λ| over all blocks together.
        zero_blocks: Names of the blocks without curvature.
        axis: Of the divergence.
    """

    js_mean: float
    js_max: float
    js_max_pair: tuple[str, str] | None
    scale_ratio: float
    largest: str | None
    smallest: str | None
    negative_mass: float
    zero_blocks: tuple[str, ...]
    axis: str


class BlockSpectra(Mapping[str, BlockSpectrum]):
    """Spectra by block name, in the order of the partition.

    Attributes:
        partition: The blocks.
        products, seconds, converged: Of all blocks together.
    """

    def __init__(self, spectra: Mapping[str, BlockSpectrum], partition: Partition) -> None:
        self._spectra = dict(spectra)
        self.partition = partition
        self.products = sum(s.products for s in self._spectra.values())
        self.seconds = sum(s.seconds for s in self._spectra.values())
        self.converged = all(s.converged for s in self._spectra.values())

    def __getitem__(self, name: str) -> BlockSpectrum:
        self.partition[name]  # its error names the near ones
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def js_divergence(self, *, axis: str = "log", sigma: float | None = None) -> Tensor:
        r"""Jensen-Shannon divergence [B, B] between the blocks' eigenvalue densities, in nats, at most ln 2.

        The densities are normalised to integral 1, so the result depends on the smoothing but not on a grid. Published
        values above ln 2 are sums over a grid without its spacing, and comparable on that grid only.

        Args:
            axis: "log" compares log10 |λ|; what is rounding noise within its block counts as zero, an outcome of its
                own. "linear" compares λ: at any one width it cannot tell blocks much smaller than that apart.
            sigma: Width of the Gaussian smoothing: in decades, default 0.1; or in units of λ, default 1 % of the range
                over all blocks.

        A sampled density does not resolve eigenvalues far below the block's largest: for a comparison of those, raise
        `dense_limit`.

        Source: Zhang et al., Why Transformers Need Adam: A Hessian Perspective, 2024, section 2.
        """
        spectra = list(self.values())
        _, masses = spectral_masses(
            [s.atoms() for s in spectra], axis=axis, sigma=sigma, zeros=[s.noise for s in spectra]
        )
        return js_divergence(masses)

    def js_distance(self, *, axis: str = "log", sigma: float | None = None) -> Tensor:
        """Jensen-Shannon distance [B, B], the square root of `js_divergence`: a metric, at most √ln 2 = 0.833."""
        return self.js_divergence(axis=axis, sigma=sigma).sqrt()

    def heterogeneity(self, *, axis: str = "log", sigma: float | None = None) -> Heterogeneity:
        """How much the blocks differ, in one record."""
        names = list(self)
        js = self.js_divergence(axis=axis, sigma=sigma)
        rows, columns = torch.triu_indices(len(names), len(names), offset=1)
        pairs = js[rows, columns]
        worst = int(pairs.argmax()) if len(pairs) else None
        alive = sorted((name for name in names if not self[name].zero), key=lambda name: self[name].scale)
        magnitude, negative = 0.0, 0.0
        for spectrum in self.values():
            nodes, weights = spectrum.atoms()
            magnitude += spectrum.size * float((weights * nodes.abs()).sum())
            negative += spectrum.size * float((weights * nodes.clamp(max=0.0).abs()).sum())
        return Heterogeneity(
            js_mean=float(pairs.mean()) if len(pairs) else 0.0,
            js_max=float(pairs.max()) if len(pairs) else 0.0,
            js_max_pair=None if worst is None else (names[int(rows[worst])], names[int(columns[worst])]),
            scale_ratio=self[alive[-1]].scale / self[alive[0]].scale if alive else 1.0,
            largest=alive[-1] if alive else None,
            smallest=alive[0] if alive else None,
            negative_mass=negative / magnitude if magnitude > 0 else 0.0,
            zero_blocks=tuple(name for name in names if self[name].zero),
            axis=axis,
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat record per block, for a table."""
        return [
            {
                "block": s.name,
                "size": s.size,
                "exact": s.exact,
                "zero": s.zero,
                "largest": float(s.top[0]),
                "largest_residual": float(s.top_residuals[0]),
                "smallest": float(s.bottom[0]),
                "smallest_residual": float(s.bottom_residuals[0]),
                "trace": s.trace.estimate,
                "trace_stderr": s.trace.stderr,
                "negative_mass": s.negative_mass,
                "effective_rank": s.effective_rank,
                "converged": s.converged,
                "products": s.products,
                "seconds": s.seconds,
            }
            for s in self.values()
        ]

    def __repr__(self) -> str:
        exact, zero = (sum(getattr(s, kind) for s in self.values()) for kind in ("exact", "zero"))
        return f"BlockSpectra({len(self)} blocks, {exact} exact, {zero} zero, products={self.products})"
