"""Tridiagonal quadrature by the dense eigendecomposition of torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def why_unavailable() -> str | None:
    """None: torch is always there."""
    return None


def quadrature(alpha: Tensor, beta: Tensor, lengths: Tensor, nodes: Tensor, weights: Tensor) -> None:
    """Nodes and weights [B, k] of B matrices with alpha [B, k] on the diagonal and beta [B, k − 1] beside it.

    Float64, and lengths [B] int64, all contiguous on one device, B ≥ 1. The leading lengths[b] rows of a matrix count:
    padding repeats the last node at weight 0. Every path gives NaN for a matrix that is not finite or has no valid
    length; on a CPU the caller has refused them.
    """
    # On a CPU, always: the matrices are tiny, and torch's batched eigh on CUDA is slow beyond 32 rows.
    a, b, sizes = alpha.cpu(), beta.cpu(), lengths.cpu()
    theta, mass = torch.full_like(a, torch.nan), torch.full_like(a, torch.nan)
    k = a.shape[1]
    for size in sizes.unique().tolist():
        if not 1 <= size <= k:
            continue
        finite = torch.isfinite(a[:, :size]).all(1) & torch.isfinite(b[:, : size - 1]).all(1)
        rows = ((sizes == size) & finite).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        d, off = a[rows, :size], b[rows, : size - 1]
        # An exact scaling, by a power of 2: the squares inside the decomposition must neither overflow nor vanish.
        exponent = np.frexp(torch.cat([d, off], dim=1).abs().amax(1, keepdim=True).numpy())[1]
        d, off = _scaled(d, -exponent), _scaled(off, -exponent)
        T = torch.diag_embed(d) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        values, S = torch.linalg.eigh(T)  # [rows, size], [rows, size, size]
        values = _scaled(values, exponent)
        theta[rows, :size], theta[rows, size:] = values, values[:, -1:]
        mass[rows, :size], mass[rows, size:] = S[:, 0, :].square(), 0.0
    nodes.copy_(theta)
    weights.copy_(mass)


def repair(failed: Tensor, alpha: Tensor, beta: Tensor, lengths: Tensor, nodes: Tensor, weights: Tensor) -> None:
    """Nodes and weights of the matrices where `failed` [B] is not 0, which another path could not finish."""
    rows = failed.nonzero().squeeze(1)
    if len(rows):
        theta, mass = (torch.empty_like(alpha[rows]) for _ in range(2))
        quadrature(alpha[rows], beta[rows], lengths[rows], theta, mass)
        nodes[rows], weights[rows] = theta, mass


def _scaled(x: Tensor, exponent: np.ndarray) -> Tensor:
    """x 2^exponent; torch.ldexp makes the power a number of its own, which may not be representable."""
    return torch.from_numpy(np.ldexp(x.numpy(), exponent))
