"""Extreme eigenvalues of a symmetric operator with residual bounds: thick-restart Lanczos that checks its own work.

Sizes: n parameters, j Krylov directions, num wanted pairs.
"""

from __future__ import annotations

import difflib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.accurate import norm
from .lanczos import KrylovBasis, checked_vector, plain_tensors
from .operator import LinearOperator

WHICH = {
    "LA": "largest",
    "SA": "smallest",
    "LM": "largest in magnitude",
    "BE": "from both ends",
}
GUARD = 0.3
WARM_GUARD = 0.1
DOUBT = 0.01
CHAIN = 24
KEEP = 0.34

class NotConvergedWarning(UserWarning):
    """The budget ended before every residual was small enough; the best pairs found are returned."""


@dataclass(frozen=True)
class EigenPairs:
    values: Tensor
    vectors: Tensor
    residuals: Tensor
    value_bounds: Tensor
    converged: bool
    verified: bool
    products: int
    seconds: float
    tol: float
    log: dict

    def __len__(self) -> int:
        return len(self.values)


def top_eigenvalues(op, num=1, *, which="LA", tol=1e-3, max_products=None, max_seconds=None, start=None, seed=0, verify=True, progress=False, basis_size=None):
    began = time.perf_counter()
    n = op.shape[0]
    gen = torch.Generator().manual_seed(seed)
    with plain_tensors():
        rand = lambda: torch.randn(n, generator=gen, dtype=op.dtype).to(op.device)
        if start is None:
            g = op.start_vector()
            r = rand()
            starts = [r if g is None else g / norm(g) + GUARD * r / norm(r)]
        else:
            r = rand()
            r = r/norm(r)
            g = op.start_vector()
            if g is not None:
                r = g/norm(g) + GUARD*r
                r /= norm(r)
            cols = start.unsqueeze(1) if start.ndim == 1 else start
            starts = [c / norm(c) for c in cols.T]
            starts[0] = (starts[0] + WARM_GUARD * r)
        base = basis_size or max(2 * num + 20, 40)
        K = KrylovBasis(op, base + len(starts) + (CHAIN if num > 1 and verify else 0))
        for s in starts: K.add(s.to(op.dtype))
        max_products = max_products or 2000
        eps = torch.finfo(op.dtype).eps
        log = {}
        def state():
            theta, S, rho = K.ritz()
            o = rank(theta, which)
            scale = theta.abs().max()
            floor = (op.relative_error + 8 * eps * (1 + K.restarts)) * float(scale)
            goal = max(tol * float(scale) - floor, 0.1 * floor)
            return theta, S, rho, o, float(scale), floor, goal
        def grow(row=None):
            if K.is_full or K.size + K.num_pending >= base+len(starts)+ (CHAIN if row else 0):
                theta, S, rho = K.ritz(); o = rank(theta, which)
                keep = min(K.size - 2, num + max(4, int(KEEP * (K.size - num))))
                K.restart(theta[o[:keep]], S[:, o[:keep]])
                row = None
                log['restarts'] = K.restarts
            K.expand(row)
        exhaust = n <= 3 * num
        def solve():
            while K.size < n:
                if K.num_pending == 0:
                    if not K.add(rand()): break
                row = None
                if K.num_pending > 1 and K.size:
                    theta, S, rho, o, scale, floor, goal = state()
                    w = o[:num]; w = w[rho[w] > goal]
                    C = K.coefficients[K.size:] @ S[:, w]
                    fresh = (K.coefficients[K.size:].abs().sum(1) == 0)
                    row = K.size + int(torch.where(fresh, torch.inf, C.abs().sum(1) if len(w) else torch.zeros(len(C))).argmax())
                grow(row)
                if K.size < num or K.products >= max_products:
                    if K.products >= max_products: return
                    continue
                if len(starts) > 1 and K.products < min(len(starts), n): continue
                theta, S, rho, o, scale, floor, goal = state()
                if bool((rho[o[:num]] <= goal).all()) and not exhaust: return
        solve()
        log['main'] = K.products
        verified = False
        chains = []
        while verify and num > 1 and K.size < n and K.products < max_products:
            theta, S, rho, o, scale, floor, goal = state()
            edge0 = edges(theta[o[:num]], which, num)
            margin = tol * scale
            if K.num_pending + K.size + CHAIN > len(K._Q) < n:
                keep = min(K.size, num + max(2, min(int(KEEP * (K.size - num)), len(K._Q)-CHAIN-num)))
                K.restart(theta[o[:keep]], S[:, o[:keep]])
            if not K.add(rand()): verified = True; break
            a, b = [], []
            dirty = False
            while not K.is_full and K.products < max_products:
                p = K.num_pending
                row = K.size + p - 1
                left = K.expand(row)
                dropped = K.num_pending < p
                a.append(float(K.coefficients[K.size - 1, K.size - 1])); b.append(0.0 if dropped else left)
                theta, S, rho, o, scale, floor, goal = state()
                edge = edges(theta[o[:num]], which, num)
                dirty = edge[0] < edge0[0] - margin or edge[1] > edge0[1] + margin
                if dirty: break
                if excludes(a, b, edge[0] - margin, edge[1] + margin, n): break
                if dropped: break
            chains.append(len(a))
            if dirty:
                solve()
                continue
            verified = excludes(a, b, edge[0] - margin, edge[1] + margin, n) or dropped
            log['Tc'] = (a, b)
            break
        log['chains'] = chains
        theta, S, rho, o, scale, floor, goal = state()
        w = o[:num]
        res = rho[w] + floor
        V = K.vectors(S[:, w])
        return EigenPairs(theta[w], V.T, res, res, bool((res <= tol * scale).all()), verified, K.products, time.perf_counter() - began, tol, log)


def rank(theta, which):
    up = torch.arange(len(theta))
    if which == "SA": return up
    if which == "LA": return up.flip(0)
    if which == "LM": return theta.abs().argsort(descending=True, stable=True)
    return torch.stack([up.flip(0), up], 1).flatten()[: len(theta)]

def edges(t, which, num):
    if which == "LA": return -math.inf, float(t.min())
    if which == "SA": return float(t.max()), math.inf
    if which == "LM": e = float(t.abs().min()); return -e, e
    return (float(t[1::2].max()) if num > 1 else -math.inf), float(t[::2].min())

def excludes(a, b, low, high, n):
    for mu in (low, high):
        if math.isinf(mu): continue
        s, p0, p1, bp, ok = 1.0, 0.0, 1.0, 0.0, False
        for al, be in zip(a, b):
            if be == 0: ok = True; break
            p0, p1 = p1, ((mu - al) * p1 - bp * p0) / be
            bp = be
            s += p1 * p1
            if s > n / DOUBT**2: ok = True; break
        if not ok: return False
    return True
