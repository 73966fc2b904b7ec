"""Tridiagonal quadrature in C, in as many threads as torch has."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import _native, tridiagonal_torch

# Rotations, about the square of the size for each matrix, that are worth a thread of their own.
GRAIN_ROTATIONS = 1 << 14
# As in tridiagonal.c.
AT_ONCE = 4


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return _native.why_unavailable("tridiagonal")


def quadrature(alpha: Tensor, beta: Tensor, lengths: Tensor, nodes: Tensor, weights: Tensor) -> None:
    """See `tridiagonal_torch.quadrature`; a matrix on which the iteration fails goes there."""
    function = _native.library("tridiagonal").tridiagonal_quadrature
    count, k = alpha.shape
    failed = torch.zeros(count, dtype=torch.int32, device="cpu")
    inputs, outputs = _pointers(alpha, beta, lengths), _pointers(nodes, weights, failed)

    def work(first: int, last: int) -> None:
        scratch = torch.empty(AT_ONCE, k, dtype=torch.float64, device="cpu")
        function(*inputs, *map(ctypes.c_int64, (k, first, last)), *outputs, *_pointers(scratch))

    _native.in_parallel(work, count, grain=max(1, GRAIN_ROTATIONS // (k * k)))
    tridiagonal_torch.repair(failed, alpha, beta, lengths, nodes, weights)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]
