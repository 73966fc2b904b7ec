"""Jensen-Shannon divergence between spectra: densities of eigenvalues on a common axis, compared pair by pair.

Sizes: B spectra, G grid points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Width of the smoothing kernel on the logarithmic axis, in decades: two bins of 0.05.
LOG_SIGMA = 0.1
# Width on the linear axis, as a share of the range of all eigenvalues.
LINEAR_SIGMA = 0.01
# Grid points in one width. Eight instead of four change the divergence by less than 1e-6 nats.
POINTS_PER_SIGMA = 4
# A kernel is cut off after so many widths, where it has fallen below rounding.
REACH = 8
MOST_POINTS = 1_000_000
# Of the published densities: absolute, whatever the scale of the eigenvalues.
PUBLISHED_SIGMA = 1e-5**0.5
PUBLISHED_POINTS = 50_000


def js_divergence(masses: Tensor) -> Tensor:
    r"""JS(p, q) = KL(p ‖ m) / 2 + KL(q ‖ m) / 2 with m = (p + q) / 2, in nats, for every pair of rows.

    Between 0 (equal) and ln 2 = 0.693 (disjoint). Its square root is a metric; `scipy.spatial.distance.jensenshannon`
    returns that root. Probabilities of bins go in, so the width of the bins cancels.

    Args:
        masses: Probabilities [B, G], non-negative; every row is normalised to sum 1.

    Returns:
        Symmetric [B, B], float64, zeros on the diagonal.

    Source: Lin, Divergence Measures Based on the Shannon Entropy, 1991, equation 3.
    """
    if masses.ndim != 2 or not bool((torch.isfinite(masses) & (masses >= 0)).all()):
        raise ValueError(f"`masses` has shape {list(masses.shape)}; it must be [B, G], non-negative and finite")
    totals = masses.double().sum(dim=1, keepdim=True)
    if not bool((totals > 0).all()):
        raise ValueError(f"`masses[{int((totals[:, 0] <= 0).nonzero()[0])}]` sums to 0; every row needs some mass")
    P = masses.double() / totals
    divergence = P.new_zeros(len(P), len(P))
    for i in range(len(P) - 1):
        divergence[i, i + 1 :] = js_to(P[i], P[i + 1 :])
    return divergence + divergence.T


def js_to(p: Tensor, Q: Tensor) -> Tensor:
    """JS(p, q) in nats of one row of probabilities [G] and each of several [B, G]; every row sums to 1."""
    M = (p + Q) / 2
    row = (_entropy(p) + _entropy(Q)) / -2 + _entropy(M)
    return row.clamp(0.0, math.log(2))


def _entropy(P: Tensor) -> Tensor:
    return -torch.xlogy(P, P).sum(dim=-1)


@dataclass(frozen=True)
class SpectralAxis:
    """The axis on which spectra are compared, cut into cells, and the smoothing on it.

    Attributes:
        kind: "log", log10 |λ| in decades; "linear", λ.
        sigma: Width of the Gaussian, in units of the axis.
        start, spacing, num_cells: Of the cells: their centres are start + i spacing.
    """

    kind: str
    sigma: float
    start: float
    spacing: float
    num_cells: int

    @classmethod
    def around(
        cls,
        spectra: Sequence[tuple[Tensor, Tensor]],
        *,
        kind: str = "log",
        sigma: float | None = None,
        zeros: Sequence[float] | None = None,
    ) -> SpectralAxis:
        """The axis that holds all of the spectra; arguments as for `spectral_masses`."""
        if kind not in ("log", "linear"):
            raise ValueError(f"`axis` is {kind!r}; it must be 'log' or 'linear'")
        if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"`sigma` is {sigma}; the width of the smoothing kernel must be positive and finite")
        everything = torch.cat(
            [
                _positions(nodes, weights, kind, zero)[0]
                for (nodes, weights), zero in zip(spectra, zeros or [0.0] * len(spectra), strict=True)
            ]
        )
        if not len(everything):
            return cls(kind, sigma or LOG_SIGMA, 0.0, 1.0, 0)
        low, high = float(everything.min()), float(everything.max())
        if sigma is None:
            sigma = LOG_SIGMA if kind == "log" else LINEAR_SIGMA * (high - low) or 1.0
        spacing, reach = sigma / POINTS_PER_SIGMA, REACH * POINTS_PER_SIGMA
        num_cells = math.ceil((high - low) / spacing) + 1 + 2 * reach
        if num_cells > MOST_POINTS:
            raise ValueError(
                f"`sigma` is {sigma:.3g} on an axis from {low:.3g} to {high:.3g}: that takes {num_cells} grid points; "
                f"use a sigma of at least {(high - low) * POINTS_PER_SIGMA / MOST_POINTS:.2g}, or axis='log'"
            )
        # Anchored at the smallest eigenvalue, so that a common factor or shift of all spectra changes nothing.
        return cls(kind, sigma, low - reach * spacing, spacing, num_cells)

    def centres(self) -> Tensor:
        """Of the cells, float64."""
        return self.start + self.spacing * torch.arange(self.num_cells, dtype=torch.float64)

    def masses(self, nodes: Tensor, weights: Tensor, zero: float = 0.0) -> Tensor:
        """Probabilities [num_cells + 1] of the cells, and of zero, for one spectrum that the axis holds."""
        x, shares, zero_mass = _positions(nodes, weights, self.kind, zero)
        reach = REACH * POINTS_PER_SIGMA
        cells = ((x - self.start) / self.spacing).round().long().unsqueeze(1) + torch.arange(-reach, reach + 1)
        inside = (cells >= 0) & (cells < self.num_cells)
        offsets = self.start + self.spacing * cells.double() - x.unsqueeze(1)
        kernel = torch.exp(-0.5 * (offsets / self.sigma).square()) * inside
        kernel = shares.unsqueeze(1) * kernel / kernel.sum(dim=1, keepdim=True)
        found = torch.zeros(self.num_cells + 1, dtype=torch.float64)
        found.index_add_(0, cells.clamp(0, max(self.num_cells - 1, 0)).reshape(-1), kernel.reshape(-1))
        found[-1] = zero_mass
        return found


def spectral_masses(
    spectra: Sequence[tuple[Tensor, Tensor]],
    *,
    axis: str = "log",
    sigma: float | None = None,
    zeros: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Smoothed eigenvalue densities on one axis: p(x) ∝ Σ_i w_i N(x; x_i, σ²), as probabilities of grid cells.

    On the logarithmic axis x = log10 |λ|: signs are dropped, and what counts as zero there is an outcome of its own
    beside the density, with no place on the axis. The grid is so fine (σ / 4) that its spacing does not matter.

    Args:
        spectra: Pairs nodes [k], weights [k], the weights non-negative.
        axis: "log" or "linear".
        sigma: Width σ of the kernel: in decades (default 0.1) or in units of the eigenvalues (default 1 % of their
            range over all spectra).
        zeros: For "log", one magnitude for each spectrum, at or below which an eigenvalue counts as zero; default 0.

    Returns:
        grid [G]; masses [B, G + 1], float64, rows summing to 1, the last column holding the zeros (0 for "linear").
    """
    cells = SpectralAxis.around(spectra, kind=axis, sigma=sigma, zeros=zeros)
    rows = [
        cells.masses(nodes, weights, zero)
        for (nodes, weights), zero in zip(spectra, zeros or [0.0] * len(spectra), strict=True)
    ]
    return cells.centres(), torch.stack(rows)


def js_grid_sum(
    spectra: Sequence[tuple[Tensor, Tensor]],
    *,
    sigma: float = PUBLISHED_SIGMA,
    num_points: int = PUBLISHED_POINTS,
) -> Tensor:
    r"""Σ_i JS integrand(t_i) over a linear grid, without its spacing Δ: for every pair [B, B], JS(p, q) / Δ.

    Not a divergence: it grows in proportion to the number of grid points and is bounded by nothing. Published values
    above ln 2 are such sums; it is here to be compared with them, on the same grid, width and scale of the loss only.
    The densities are Σ_j w_j N(t; θ_j, σ²), normalised to integral 1 over the grid, which runs from one below the
    smallest node to one above the largest, in units of λ.

    Args:
        spectra: Pairs nodes [k], weights [k], the weights non-negative.
        sigma: Width σ of the Gaussian in units of λ, default √1e-5.
        num_points: Of the grid, default 50 000.

    Raises:
        ValueError: the grid is coarser than σ, so that eigenvalues would fall between its points.

    Source: the definition follows the published plots of Zhang et al., Why Transformers Need Adam: A Hessian
    Perspective, 2024, section 2 (settings of their code); that their values are sums without Δ is derived here from
    their exceeding ln 2.
    """
    if num_points < 2:
        raise ValueError(f"`num_points` is {num_points}; a grid has at least 2 points")
    nodes = torch.cat([theta.double().cpu().reshape(-1) for theta, _ in spectra])
    grid = torch.linspace(float(nodes.min()) - 1, float(nodes.max()) + 1, num_points, dtype=torch.float64)
    spacing = float(grid[1] - grid[0])
    if not 0 < spacing <= sigma:
        raise ValueError(
            f"`sigma` is {sigma:.3g} but the grid of {num_points} points has a spacing of {spacing:.3g}; "
            "eigenvalues would fall between its points: raise `num_points` or `sigma`"
        )
    rows = []
    for theta, weights in spectra:
        density = torch.zeros(num_points, dtype=torch.float64)
        for node, weight in zip(
            theta.double().reshape(-1).tolist(), weights.double().reshape(-1).tolist(), strict=True
        ):
            first, last = (int(torch.searchsorted(grid, node + side * REACH * sigma)) for side in (-1, 1))
            density[first:last] += weight * torch.exp(-0.5 * ((grid[first:last] - node) / sigma).square())
        rows.append(density)
    return js_divergence(torch.stack(rows)) / spacing


def _positions(nodes: Tensor, weights: Tensor, kind: str, zero: float) -> tuple[Tensor, Tensor, Tensor]:
    """Places on the axis [k] and shares [k] of what is not zero, and the share of what is."""
    nodes, weights = nodes.double().cpu().reshape(-1), weights.double().cpu().reshape(-1)
    weights = weights / weights.sum()
    if kind == "linear":
        return nodes, weights, weights.new_zeros(())
    kept = nodes.abs() > zero
    return nodes[kept].abs().log10(), weights[kept], weights[~kept].sum()
