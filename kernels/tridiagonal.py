"""Eigenvalues and quadrature weights of many small symmetric tridiagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import choose


def tridiagonal_quadrature(alpha: Tensor, beta: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of the measure behind Lanczos coefficients: Σ_i w_i f(θ_i) = e₁ᵀ f(T) e₁.

    T has `alpha` [..., k] on the diagonal and `beta` [..., k−1] beside it. Runs that ended early are padded: only the
    leading `lengths` [...] rows of T count, whatever the padding holds.

    Returns:
        nodes [..., k], ascending, the eigenvalues θ_i of T; weights [..., k], squared first components of the
        eigenvectors, which sum to 1. Both float64, on the device of `alpha`. Padded entries have weight 0 and repeat
        the last real node.

    Raises:
        ValueError: shapes; on a CPU also entries that are not finite and lengths outside 1 to k. On a GPU nothing waits
            for the device: such a matrix has NaN nodes and weights instead, as has one on which 60 iterations for an
            eigenvalue are not enough.

    Source: Golub and Welsch, Calculation of Gauss quadrature rules, 1969.
    """
    for name, x in (("alpha", alpha), ("beta", beta)):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            found = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TypeError(f"`{name}` is {found}; pass a tensor of floats")
    k = alpha.shape[-1] if alpha.ndim else 0
    if k < 1 or beta.shape != (*alpha.shape[:-1], k - 1):
        raise ValueError(
            f"`alpha` has shape {list(alpha.shape)} and `beta` {list(beta.shape)}; must be [..., k] and [..., k - 1]"
        )
    if beta.device != alpha.device:
        raise ValueError(f"`beta` is on {beta.device} and `alpha` on {alpha.device}; use beta.to(alpha.device)")
    count = alpha[..., 0].numel()
    with torch.inference_mode(False), torch.no_grad():
        a = alpha.detach().to(torch.float64).reshape(count, k).contiguous()
        b = beta.detach().to(torch.float64).reshape(count, k - 1).contiguous()
        sizes = _checked_lengths(lengths, alpha, count)
        nodes, weights = torch.empty_like(a), torch.empty_like(a)
        if count:
            if a.device.type == "cpu":
                _check_finite(a, b, sizes)
            choose("tridiagonal", a.device).quadrature(a, b, sizes, nodes, weights)
    return nodes.reshape(alpha.shape), weights.reshape(alpha.shape)


def _check_finite(a: Tensor, b: Tensor, sizes: Tensor) -> None:
    column = torch.arange(a.shape[1], device=a.device)
    fine = torch.isfinite(a) | (column >= sizes.unsqueeze(1))
    fine[:, : a.shape[1] - 1] &= torch.isfinite(b) | (column[:-1] >= sizes.unsqueeze(1) - 1)
    if not bool(fine.all()):
        raise ValueError("`alpha` or `beta` has NaN or infinite entries; the Lanczos run that made them failed")


def _checked_lengths(lengths: Tensor | None, alpha: Tensor, count: int) -> Tensor:
    k = alpha.shape[-1]
    if lengths is None:
        return torch.full((count,), k, device=alpha.device)
    if lengths.shape != alpha.shape[:-1]:
        raise ValueError(f"`lengths` has shape {list(lengths.shape)}; it must be {list(alpha.shape[:-1])}, as `alpha`")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ValueError(f"`lengths` is {lengths.dtype}; it must be integers, the rows of each matrix that count")
    flat = lengths.detach().reshape(count).to(torch.int64)
    if flat.device.type == "cpu" and count and (int(flat.min()) < 1 or int(flat.max()) > k):
        raise ValueError(f"`lengths` runs from {int(flat.min())} to {int(flat.max())}; each must be 1 to k = {k}")
    return flat.to(alpha.device).contiguous()
