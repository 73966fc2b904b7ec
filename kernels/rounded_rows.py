"""Basis vectors held in a short floating-point format, times a power of two, and how far that moves them.

A unit vector of n entries has entries of about 1/√n, for which float16 runs out of digits at n = 1e7. Times about √n
they are of size 1, and none is above √n. float16 then moves a vector by about 2e-4 of its length, bfloat16 by eight
times that, at equal memory.

Sizes: n entries in a vector, j basis vectors, m combinations of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .accurate import chunks

# A stored entry of at most 1 times this power of two is finite in float16.
LARGEST_UNIT_EXPONENT = 15


def unit_of(n: int) -> float:
    """The power of two with which unit vectors [n] are stored."""
    return 2.0 ** min(math.floor(math.log2(n) / 2), LARGEST_UNIT_EXPONENT)


def store(out: Tensor, x: Tensor, factor: float) -> float:
    """out [n] = factor · x, rounded to the dtype of `out`; returns ‖out − factor · x‖."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in chunks(x, rows=1):
        exact = x[part].double() * factor
        out[part] = exact
        total += (exact - out[part].double()).square().sum()
    return float(total.sqrt())


def rotate_stored_(Q: Tensor, S: Tensor) -> Tensor:
    """The first m rows of Q [j, n] become Sᵀ Q, in place, for S [j, m]; returns how far rounding moved each [m]."""
    coefficients = S.mT.to(Q.device, torch.float64)
    total = torch.zeros(len(coefficients), dtype=torch.float64, device=Q.device)
    with torch.autocast(Q.device.type, enabled=False):
        for part in chunks(Q, rows=Q.shape[0]):
            exact = coefficients @ Q[:, part].double()
            Q[: len(exact), part] = exact.to(Q.dtype)
            total += (exact - Q[: len(exact), part].double()).square().sum(dim=1)
    return total.sqrt().cpu()
