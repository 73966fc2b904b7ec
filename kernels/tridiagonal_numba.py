"""Tridiagonal quadrature compiled by numba: the arithmetic of tridiagonal.c, operation for operation."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import _native, tridiagonal_torch
from .tridiagonal_c import GRAIN_ROTATIONS

MOST_ITERATIONS = 60
EPSILON = 2.0**-52
NOTHING = 2.0**-500


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return None if importlib.util.find_spec("numba") else "numba is not installed; pip install numba"


def quadrature(alpha: Tensor, beta: Tensor, lengths: Tensor, nodes: Tensor, weights: Tensor) -> None:
    """See `tridiagonal_torch.quadrature`; a matrix on which the iteration fails goes there."""
    failed = torch.zeros(len(alpha), dtype=torch.int32, device="cpu")
    arrays = [x.numpy() for x in (alpha, beta, lengths, nodes, weights, failed)]
    function, k = _compiled(), alpha.shape[1]
    _native.in_parallel(
        lambda first, last: function(*arrays, first, last), len(alpha), grain=max(1, GRAIN_ROTATIONS // (k * k))
    )
    tridiagonal_torch.repair(failed, alpha, beta, lengths, nodes, weights)


@functools.cache
def _compiled() -> Callable[..., None]:
    import numba

    implicit_ql = numba.njit(nogil=True)(_implicit_ql)

    def batch(alpha, beta, lengths, nodes, weights, failed, first, last):
        scratch = np.empty(alpha.shape[1])
        for b in range(first, last):
            n = lengths[b]
            d, z = nodes[b], weights[b]
            largest = 0.0
            for i in range(n):
                largest = max(largest, abs(alpha[b, i]))
            for i in range(n - 1):
                largest = max(largest, abs(beta[b, i]))
            exponent = math.frexp(largest)[1]
            for i in range(n):
                d[i] = math.ldexp(alpha[b, i], -exponent)
            for i in range(n - 1):
                scratch[i] = math.ldexp(beta[b, i], -exponent)
            failed[b] = implicit_ql(n, d, scratch, z)
            for i in range(1, n):
                node, weight = d[i], z[i]
                at = i
                while at > 0 and d[at - 1] > node:
                    d[at], z[at] = d[at - 1], z[at - 1]
                    at -= 1
                d[at], z[at] = node, weight
            for i in range(n):
                d[i] = math.ldexp(d[i], exponent)
                z[i] *= z[i]
            d[n:], z[n:] = d[n - 1], 0.0

    return numba.njit(nogil=True)(batch)


def _implicit_ql(n, d, e, z):
    for i in range(n):
        z[i] = 1.0 if i == 0 else 0.0
    e[n - 1] = 0.0
    for l in range(n):
        iteration = 0
        while True:
            m = l
            while m < n - 1:
                off = abs(e[m])
                if off <= EPSILON * (abs(d[m]) + abs(d[m + 1])) or off < NOTHING:
                    break
                m += 1
            if m == l:
                break
            if iteration >= MOST_ITERATIONS:
                return 1
            iteration += 1
            g = (d[l + 1] - d[l]) / (2.0 * e[l])
            r = math.sqrt(g * g + 1.0)
            g = d[m] - d[l] + e[l] / (g + (r if g >= 0.0 else -r))
            s, c, p = 1.0, 1.0, 0.0
            i = m - 1
            while i >= l:
                f, b = s * e[i], c * e[i]
                r = math.sqrt(f * f + g * g)
                e[i + 1] = r
                if r == 0.0:
                    break
                s, c = f / r, g / r
                g = d[i + 1] - p
                r = (d[i] - g) * s + 2.0 * c * b
                p = s * r
                d[i + 1] = g + p
                g = c * r - b
                after, before = z[i + 1], z[i]
                z[i + 1] = s * before + c * after
                z[i] = c * before - s * after
                i -= 1
            if i >= l:  # the matrix fell apart at row i + 1
                d[i + 1] -= p
                e[m] = 0.0
                continue
            d[l] -= p
            e[l] = g
            e[m] = 0.0
    return 0
