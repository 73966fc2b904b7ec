"""The ends of a spectrum from Lanczos runs that were made for its density, or for the deflation before it.

Sizes: p probes, k steps of one, T [k, k] its tridiagonal matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .deflation import Complement
from .exclusion import RandomRun
from .lockstep import Sampled
from .ritz_search import MARGIN, RUN_MARGIN

# A simple eigenvalue has n times its weight near 1. A run sees a multiple one, such as the 0 of a singular matrix, only
# once, with the weight of all its copies: so much on average over the values of an end means there are copies.
MOST_WEIGHT = 4.0
# Rounding of the coefficients of a run, in units of the machine epsilon and the largest |θ|.
ROUNDINGS = 16
# A sign vector can be orthogonal to an eigenvector that lives on few coordinates, with a probability of at most 1/2: so
# many have to agree that there is nothing. Each overlooks one that is spread out with 0.8 times DOUBT.
FEWEST_PROBES = 4
DOUBT = 0.1


@dataclass(frozen=True)
class Extremes:
    """The largest eigenvalues, descending, and the smallest, ascending, float64, with bounds on their distance to
    true ones."""

    top: Tensor
    top_residuals: Tensor
    bottom: Tensor
    bottom_residuals: Tensor

    def within(self, tol: float) -> bool:
        """Whether every bound is at most `tol` times the largest magnitude."""
        scale = float(torch.cat([self.top, self.bottom]).abs().max())
        return float(torch.cat([self.top_residuals, self.bottom_residuals]).max()) <= tol * scale


def extremes(sampled: Sampled, num: int) -> Extremes | None:
    r"""`num` Ritz values at each end, each end from the probe whose residuals there are the smallest.

    An eigenpair (θ, s) of T has ‖A u − θ u‖ = β_k |s_k| for u = Qᵀ s, with β_k the length of the last remainder, and an
    eigenvalue of A lies within that of θ. None where no run is 2 num steps long, or the weights of an end say that it
    holds a multiple eigenvalue, whose copies a run does not count.

    Source: Parlett, The Symmetric Eigenvalue Problem, 1998, section 13.2.
    """
    dtype = sampled.op.dtype if sampled.op.dtype in (torch.float32, torch.float64) else torch.float32
    ends: list[tuple[Tensor, Tensor]] = []
    weights: list[Tensor] = []
    columns = (torch.cat(x).double().cpu() for x in (sampled.alpha, sampled.beta, sampled.remainder))
    for alpha, beta, last, steps in zip(*columns, torch.cat(sampled.steps).tolist(), strict=True):
        if steps < 2 * num:
            continue
        beside = beta[: steps - 1]
        T = torch.diag(alpha[:steps]) + torch.diag(beside, 1) + torch.diag(beside, -1)
        values, S = torch.linalg.eigh(T)
        rounding = ROUNDINGS * torch.finfo(dtype).eps * float(values.abs().max())
        weights.append(S[0].square())
        ends.append((values, last * S[-1].abs() + rounding))
    for outer in (slice(None, num), slice(-num, None)):
        share = sum(float(w[outer].mean()) for w in weights) / max(1, len(weights))
        if not ends or sampled.op.shape[0] * share > MOST_WEIGHT:
            return None
    top, top_residuals = min(((v.flip(0)[:num], r.flip(0)[:num]) for v, r in ends), key=lambda end: float(end[1].max()))
    bottom, bottom_residuals = min(((v[:num], r[:num]) for v, r in ends), key=lambda end: float(end[1].max()))
    return Extremes(top, top_residuals, bottom, bottom_residuals)


def deflated_extremes(sampled: Sampled, num: int, tol: float) -> Extremes | None:
    r"""`num` eigenvalues at each end from the deflation's run, if that and the runs in the complement show them all.

    None where a residual is above `tol` · |λ|max, or one of these does not hold:

    - The deflation's run excludes every eigenvalue further out that is not within 5 % of |λ|max of one found.
    - A copy of one found, which the run cannot see, is an eigenvector of the complement: the runs there exclude every
      eigenvalue further out by more than `tol` · |λ|max.

    The first is wrong with a probability below 8 %, the second below 1 in 16, and far below for eigenvectors that do
    not live on a few coordinates.
    """
    op = sampled.op
    if not isinstance(op, Complement) or sampled.moments.count < FEWEST_PROBES or len(op.subspace) < 2 * num:
        return None
    subspace, floor = op.subspace, op.relative_error + ROUNDINGS * torch.finfo(op.dtype).eps
    scale = float(subspace.values.abs().max())
    order = subspace.values.argsort()
    values, residuals = subspace.values[order], subspace.residuals[order] + floor * scale
    found = Extremes(values.flip(0)[:num], residuals.flip(0)[:num], values[:num], residuals[:num])
    edges = [(1, float(found.top[-1])), (-1, -float(found.bottom[-1]))]
    outermost = torch.cat([found.top, found.bottom]).tolist()
    if not found.within(tol) or subspace.run is None:
        return None
    if not subspace.run.excludes_all_but(outermost, edges, max(tol, RUN_MARGIN) * scale):
        return None
    margin = (max(tol, MARGIN) + floor) * scale
    for run in _random_runs(sampled):
        for sign, edge in edges:
            side = run if sign > 0 else run.mirrored()
            if side.ritz_values()[0] > edge + margin or not side.excludes(edge + margin):
                return None
    return found


def _random_runs(sampled: Sampled) -> list[RandomRun]:
    """Of the probes; one that ended early has seen everything there is."""
    columns = (torch.cat(x).double().cpu() for x in (sampled.alpha, sampled.beta, sampled.remainder))
    runs = []
    for alpha, beta, last, steps in zip(*columns, torch.cat(sampled.steps).tolist(), strict=True):
        end = float(last) if steps == len(alpha) else 0.0
        needed = sampled.op.shape[0] / DOUBT**2
        runs.append(RandomRun(needed, alpha[:steps].tolist(), [*beta[: steps - 1].tolist(), end]))
    return runs
