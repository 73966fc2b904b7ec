"""Tridiagonal quadrature on a GPU, one thread for each matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _cupy
from ._launch import Launcher, Source

SOURCE = Source(("tridiagonal.cu",))
SOURCES = (SOURCE,)

# One warp in a block: the matrices of a batch are few and each is slow, so they should be spread over the GPU.
THREADS = 32


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return _cupy.why_unavailable()


def quadrature(
    alpha: Tensor, beta: Tensor, lengths: Tensor, nodes: Tensor, weights: Tensor, *, launcher: Launcher | None = None
) -> None:
    """See `tridiagonal_torch.quadrature`; NaN also where 60 iterations for an eigenvalue are not enough."""
    count, k = alpha.shape
    d = alpha.T.clone(memory_format=torch.contiguous_format)  # [k, B], interleaved, to be written to
    e = torch.cat([beta.T, beta.new_zeros(1, count)])
    z = torch.empty_like(d)
    (_cupy.launcher() if launcher is None else launcher).launch(
        SOURCE,
        "tridiagonal_quadrature",
        -(-count // THREADS),
        THREADS,
        (d, e, z, lengths, np.int32(count), np.int32(k)),
    )
    nodes.copy_(d.T)
    weights.copy_(z.T)
