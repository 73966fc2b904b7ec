"""Jensen-Shannon divergence between spectra: densities of eigenvalues on a common axis, compared pair by pair.

Sizes: B spectra, G grid points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    entropy = -torch.xlogy(P, P).sum(dim=1)  # [B]
    divergence = P.new_zeros(len(P), len(P))
    for i in range(len(P) - 1):
        M = (P[i] + P[i + 1 :]) / 2
        row = -torch.xlogy(M, M).sum(dim=1) - (entropy[i] + entropy[i + 1 :]) / 2
        divergence[i, i + 1 :] = row.clamp(0.0, math.log(2))
    return divergence + divergence.T


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
    if axis not in ("log", "linear"):
        raise ValueError(f"`axis` is {axis!r}; it must be 'log' or 'linear'")
    if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"`sigma` is {sigma}; the width of the smoothing kernel must be positive and finite")
    positions, shares, zero_mass = [], [], []
    for (nodes, weights), zero in zip(spectra, zeros or [0.0] * len(spectra), strict=True):
        nodes, weights = nodes.double().cpu().reshape(-1), weights.double().cpu().reshape(-1)
        weights = weights / weights.sum()
        kept = nodes.abs() > zero if axis == "log" else torch.ones_like(nodes, dtype=torch.bool)
        positions.append(nodes[kept].abs().log10() if axis == "log" else nodes[kept])
        shares.append(weights[kept])
        zero_mass.append(weights[~kept].sum())
    zero_mass = torch.stack(zero_mass)
    everything = torch.cat(positions)
    if not len(everything):
        return everything, zero_mass.unsqueeze(1)
    low, high = float(everything.min()), float(everything.max())
    if sigma is None:
        sigma = LOG_SIGMA if axis == "log" else LINEAR_SIGMA * (high - low) or 1.0
    spacing = sigma / POINTS_PER_SIGMA
    reach = REACH * POINTS_PER_SIGMA
    num_points = math.ceil((high - low) / spacing) + 1 + 2 * reach
    if num_points > MOST_POINTS:
        raise ValueError(
            f"`sigma` is {sigma:.3g} on an axis from {low:.3g} to {high:.3g}: that takes {num_points} grid points; "
            f"use a sigma of at least {(high - low) * POINTS_PER_SIGMA / MOST_POINTS:.2g}, or axis='log'"
        )
    # Anchored at the smallest eigenvalue, so that a common factor or shift of all spectra changes nothing.
    start = low - reach * spacing
    grid = start + spacing * torch.arange(num_points, dtype=torch.float64)
    window = torch.arange(-reach, reach + 1)
    masses = torch.zeros(len(positions), num_points + 1, dtype=torch.float64)
    for row, x, w, zero in zip(masses, positions, shares, zero_mass, strict=True):
        cells = ((x - start) / spacing).round().long().unsqueeze(1) + window  # [k, window]
        inside = (cells >= 0) & (cells < num_points)
        cells = cells.clamp(0, num_points - 1)
        kernel = torch.exp(-0.5 * ((grid[cells] - x.unsqueeze(1)) / sigma).square()) * inside
        kernel = w.unsqueeze(1) * kernel / kernel.sum(dim=1, keepdim=True)
        row.index_add_(0, cells.reshape(-1), kernel.reshape(-1))
        row[-1] = zero
    return grid, masses
