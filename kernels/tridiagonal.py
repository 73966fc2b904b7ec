"""Eigenvalues and quadrature weights of many small symmetric tridiagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def tridiagonal_quadrature(alpha: Tensor, beta: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of the measure behind Lanczos coefficients: Σ_i w_i f(θ_i) = e₁ᵀ f(T) e₁.

    T has `alpha` [..., k] on the diagonal and `beta` [..., k−1] beside it. Runs that ended early are padded: only the
    leading `lengths` [...] rows of T count, whatever the padding holds.

    Returns:
        nodes [..., k], ascending, the eigenvalues θ_i of T; weights [..., k], squared first components of the
        eigenvectors, which sum to 1. Both float64, on the device of `alpha`. Padded entries have weight 0 and repeat
        the last real node.

    Source: Golub and Welsch, Calculation of Gauss quadrature rules, 1969.
    """
    k = alpha.shape[-1] if alpha.ndim else 0
    if k < 1 or beta.shape != (*alpha.shape[:-1], k - 1):
        raise ValueError(
            f"`alpha` has shape {list(alpha.shape)} and `beta` {list(beta.shape)}; must be [..., k] and [..., k - 1]"
        )
    # A CPU, always: the matrices are tiny, and torch's batched eigh on CUDA is slow beyond 32 rows.
    a = alpha.detach().to("cpu", torch.float64).reshape(-1, k)
    b = beta.detach().to("cpu", torch.float64).reshape(len(a), k - 1)
    sizes = _checked_lengths(lengths, alpha)
    nodes, weights = torch.empty_like(a), torch.zeros_like(a)
    for size in sizes.unique().tolist():
        rows = sizes == size
        off = b[rows, : size - 1]
        T = torch.diag_embed(a[rows, :size]) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        if not bool(torch.isfinite(T).all()):
            raise ValueError("`alpha` or `beta` has NaN or infinite entries; the Lanczos run that made them failed")
        theta, S = torch.linalg.eigh(T)  # [rows, size], [rows, size, size]
        nodes[rows, :size], nodes[rows, size:] = theta, theta[:, -1:]
        weights[rows, :size] = S[:, 0, :].square()
    shape, device = alpha.shape, alpha.device
    return nodes.reshape(shape).to(device), weights.reshape(shape).to(device)


def _checked_lengths(lengths: Tensor | None, alpha: Tensor) -> Tensor:
    k = alpha.shape[-1]
    if lengths is None:
        return torch.full((alpha[..., 0].numel(),), k)
    if lengths.shape != alpha.shape[:-1]:
        raise ValueError(f"`lengths` has shape {list(lengths.shape)}; it must be {list(alpha.shape[:-1])}, as `alpha`")
    flat = lengths.detach().cpu().reshape(-1)
    if flat.numel() and (int(flat.min()) < 1 or int(flat.max()) > k):
        raise ValueError(f"`lengths` runs from {int(flat.min())} to {int(flat.max())}; each must be 1 to k = {k}")
    return flat
