"""Signal against noise over the entries of one tensor: the g-SNR of SGD-SaI and SlimAdam's SNR of second moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["paper", "code"]
Average = Literal["mean", "median"]


def gsnr_of(g: Tensor, eps: float, form: Form) -> Tensor:
    """G of one tensor, a float64 scalar; infinite where the denominator is zero and the gradient is not."""
    g = g.detach().double()
    if form == "paper":
        spread = (g.var(correction=0) + eps).sqrt()
    else:
        spread = (g.std() if g.numel() > 1 else g.new_zeros(())) + eps
    size = g.norm()
    return size / spread if float(spread) else (size * math.inf if float(size) else size)


def snr(v: Tensor, dims: Sequence[int], *, average: Average = "mean") -> float:
    """SNR_K(v) = the average, over all other dimensions, of mean_K(v)² / var_K(v).

    Args:
        v: Second moments, any shape.
        dims: K.
        average: "mean" as in the paper; "median", which a few nearly constant slices do not decide.

    Returns:
        Population variance; slices that are constant along K have no finite ratio and are left out. Infinite when all
        are such, NaN when all are zero.

    Source: Kalra et al., When Can You Get Away with Low Memory Adam?, 2025.
    """
    v = v.detach().double()
    dims = tuple(dims)
    if not dims:
        raise ValueError("`dims` is empty; name at least one dimension to compare entries along")
    variance, mean = torch.var_mean(v, dims, correction=0)
    ratio = mean.square() / variance
    finite = ratio[ratio.isfinite()]
    if finite.numel() == 0:
        return math.inf if bool(ratio.isinf().any()) else math.nan
    return float(finite.mean() if average == "mean" else finite.median())
