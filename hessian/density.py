"""A density of eigenvalues as nodes and weights, with what is known about its error.

Sizes: n rows, p probe vectors, K deflated pairs, k nodes of one probe, g points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .estimate import Estimate

# Default smoothing: this share of the range of the nodes.
SIGMA_SHARE = 0.01


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class SpectralDensity:
    r"""φ(t) = (1/n) Σ_i δ(t − λ_i) as the mean over probes of Σ_j w_j δ(t − θ_j).

    Attributes:
        nodes: θ [p, k], float64, on the CPU, ascending for each probe. Where a probe's Krylov space ended early the
            last node is repeated. Deflated values are among the nodes of every probe.
        weights: w [p, k], summing to 1 for each probe; 0 for the repeated nodes, 1/n for the deflated ones.
        mean_stderr: Standard error of the mean eigenvalue.
        exact: The nodes are all n eigenvalues [1, n] with weights 1/n.
        products: Operator products spent, those of the deflation included.
        seconds: Wall-clock time.
        deflated: Ritz values [K] that were taken out before the probes, largest magnitude first; empty without.
        deflated_residuals: Their residuals [K].
        coupling: What neglecting the residuals may change: 2 ‖P A Uᵀ‖_* / n, a bound on the Wasserstein-1 distance,
            in units of λ. The mean does not depend on it.
        resolution: Wasserstein-1 distance to the density from half the steps of the same probes, in units of λ: about
            what the number of steps leaves unresolved, or more. NaN where unknown.
        half_nodes, half_weights: Nodes and weights [p, k'] from half the steps; empty where unknown.
        orthogonality: Largest inner product of two vectors of a Lanczos basis, seen at the last step of each probe.
        converged: The tolerance was met, if there was one.
    """

    nodes: Tensor
    weights: Tensor
    mean_stderr: float
    exact: bool
    products: int
    seconds: float
    deflated: Tensor = field(default_factory=_none)
    deflated_residuals: Tensor = field(default_factory=_none)
    coupling: float = 0.0
    resolution: float = math.nan
    half_nodes: Tensor = field(default_factory=_none, repr=False)
    half_weights: Tensor = field(default_factory=_none, repr=False)
    orthogonality: float = math.nan
    converged: bool = True

    def mean(self) -> Estimate:
        """The mean eigenvalue, tr A / n. Its error comes from whole vectors, as that of `trace`, not from p samples."""
        samples = (self.weights * self.nodes).sum(1)
        return Estimate(float(samples.mean()), self.mean_stderr, samples, self.products)

    def moment(self, power: int) -> Estimate:
        """tr(A^power) / n, unbiased for a power of at most 2 k − 1: up to there the quadrature is exact.

        With deflation, for a power of at most 1; higher ones neglect the residuals of the deflated pairs.
        """
        if power < 0:
            raise ValueError(f"`power` is {power}; moments are those of 0 and the positive powers")
        return self._mean_of(lambda nodes: nodes**power)

    def weight_below(self, x: float) -> Estimate:
        """Share of the eigenvalues that are at most x; nodes within rounding of x fall on either side."""
        return self._mean_of(lambda nodes: (nodes <= x).double())

    def radius(self) -> float:
        """The largest |node|: a lower bound of the spectral radius that is tight once the ends have converged."""
        return float(self.nodes.abs().max())

    def w1_stderr(self) -> float:
        r"""Standard error of the density in Wasserstein-1 distance, in units of λ.

        W1 is ∫ |F̂ − F| dt for cumulative densities, and E |F̂ − F| at t is at most the standard error over probes there:
        this is its integral. 0 if the density is exact, infinite from one probe.
        """
        if self.exact or len(self.nodes) == 1:
            return 0.0 if self.exact else math.inf
        t, F = _cumulative(self.nodes, self.weights)
        return float((F[:, :-1].std(0) * t.diff()).sum()) / math.sqrt(len(F))

    def w1_error(self) -> float:
        """Estimate of the Wasserstein-1 distance to the true density, in units of λ: probes, steps and coupling."""
        return 0.0 if self.exact else self.w1_stderr() + self.resolution + self.coupling

    def default_sigma(self) -> float:
        """1 % of the range of the nodes: outliers stay apart. A single eigenvalue gets a millionth of its size."""
        spread = float(self.nodes.max() - self.nodes.min())
        return max(SIGMA_SHARE * spread, 1e-6 * float(self.nodes.abs().max())) or 1.0

    def grid(self, num: int = 1000, sigma: float | None = None) -> Tensor:
        """`num` points [num] evenly over the nodes and six σ beyond, so that the smoothed density integrates to 1."""
        margin = 6 * self._checked_sigma(sigma)
        return torch.linspace(
            float(self.nodes.min()) - margin, float(self.nodes.max()) + margin, num, dtype=torch.float64
        )

    def on_grid(self, x: Tensor | np.ndarray | Sequence[float], sigma: float | None = None) -> tuple[Tensor, Tensor]:
        r"""The density smoothed by a Gaussian, (1/p) Σ w N(x; θ, σ²), and its band.

        Its integral over the line is 1, so it has the unit 1/λ. Peaks are missed if the points lie wider apart than σ.

        Args:
            x: Points [g].
            sigma: Width σ of the Gaussian in units of λ; `default_sigma()` if None. It biases the density at any number
                of probes, which the band does not show.

        Returns:
            density [g] and band [g], float64: the band is the standard error over probes at that point; 0 if the
            density is exact, infinite from one probe.
        """
        sigma = self._checked_sigma(sigma)
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        if points.ndim != 1 or not bool(torch.isfinite(points).all()):
            raise ValueError(f"`x` has shape {list(points.shape)}; it must be [g] finite points on the axis of λ")
        height = 1 / (sigma * math.sqrt(2 * math.pi))
        densities = torch.stack(
            [
                height * (weights @ torch.exp(-(((points - nodes.unsqueeze(1)) / sigma) ** 2) / 2))
                for nodes, weights in zip(self.nodes, self.weights, strict=True)
            ]
        )  # [p, g]
        if self.exact:
            return densities[0], torch.zeros_like(points)
        if len(densities) == 1:
            return densities[0], torch.full_like(points, math.inf)
        return densities.mean(0), densities.std(0) / math.sqrt(len(densities))

    def _mean_of(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        samples = (self.weights * f(self.nodes)).sum(1)
        if self.exact:
            return Estimate.exact(float(samples), products=self.products)
        return Estimate.from_samples(samples, products=self.products)

    def _checked_sigma(self, sigma: float | None) -> float:
        if sigma is None:
            return self.default_sigma()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"`sigma` is {sigma}; a width must be positive and finite, or None for 1 % of the range")
        return float(sigma)


def w1_distance(nodes: Tensor, weights: Tensor, other_nodes: Tensor, other_weights: Tensor) -> float:
    """Wasserstein-1 distance ∫ |F − G| dt of two weighted sets of points, each of weight 1."""
    both = [(nodes, weights), (other_nodes, other_weights)]
    width = max(x.numel() for x in (nodes, other_nodes))
    points, shares = (
        torch.stack([torch.nn.functional.pad(x.reshape(-1), (0, width - x.numel())) for x in pair])
        for pair in zip(*both, strict=True)
    )
    t, F = _cumulative(points, shares)
    return float(((F[0] - F[1]).abs()[:-1] * t.diff()).sum())


def _cumulative(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """All points t [p k] of p weighted sets [p, k], ascending, and the share [p, p k] of each set at most there."""
    p, k = nodes.shape
    t, order = nodes.reshape(-1).sort()
    shares = torch.zeros(p, p * k, dtype=weights.dtype)
    owner = order.div(k, rounding_mode="floor")
    shares[owner, torch.arange(p * k)] = weights.reshape(-1)[order]
    return t, shares.cumsum(1)
