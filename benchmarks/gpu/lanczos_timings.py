"""Batched Lanczos beside a loop over its blocks, and quadrature beside dense eigensolvers."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import torch
from sharpscope.kernels import tridiagonal_quadrature
from sharpscope.kernels.batched_lanczos import batched_lanczos
from torch import Tensor

from .clock import Clock
from .report import Part


def ragged_offsets(n: int, blocks: int, least: int) -> list[int]:
    """Borders of `blocks` blocks of very different lengths, at least `least`, that sum to n."""
    weights = torch.rand(blocks, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(5).exp()
    lengths = least + ((n - blocks * least) * weights / weights.sum()).floor().long()
    lengths[-1] += n - int(lengths.sum())
    return [0, *lengths.cumsum(0).tolist()]


def loop(matvec: Callable[[Tensor], Tensor], offsets: list[int], m: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """The same recurrences, block after block: alpha [B, m] and the basis [m, n]; two passes of two `torch.mv` each."""
    parts = [slice(a, b) for a, b in itertools.pairwise(offsets)]
    Q, alpha = start.new_empty(m, len(start)), start.new_zeros(len(parts), m)
    for part in parts:
        Q[0, part] = start[part] / torch.linalg.vector_norm(start[part])
    for j in range(m):
        w = matvec(Q[j])
        for b, part in enumerate(parts):
            rows, rest = Q[: j + 1, part], w[part]
            for _ in range(2):
                c = torch.mv(rows, rest)
                rest.sub_(torch.mv(rows.T, c))
                alpha[b, j] += c[j]
            if j + 1 < m:
                torch.div(rest, torch.linalg.vector_norm(rest), out=Q[j + 1, part])
    return alpha, Q


def time_lanczos(part: Part, clock: Clock, *, small: int, large: int, blocks: int, m: int) -> None:
    """100 ragged blocks at n = 1e6, with the loop, and at n = 1e7, against memory traffic."""
    for n in (small, large):
        offsets = ragged_offsets(n, blocks, m + 2)
        diagonal = torch.rand(n, device=clock.device) + 0.5
        start = torch.randn(n, device=clock.device)

        def matvec(v: Tensor, diagonal: Tensor = diagonal) -> Tensor:
            return diagonal * v

        def run(matvec=matvec, offsets=offsets, start=start):
            return batched_lanczos(matvec, offsets, m, start=start)

        timing = clock.measure([run])
        product = clock.measure([lambda matvec=matvec, start=start: matvec(start)])["device_us"]
        vector_us, traffic = timing["device_us"] - m * product, 6.0 * n * m * m
        clock.poison(4 * n)
        runs = run()
        correct = _is_right(runs.basis, runs.alpha, offsets, diagonal)
        probe = min(1 << 30, int(traffic))
        copies = vector_us / (clock.copy_us(probe) * traffic / probe)
        more = {"blocks": blocks, "m": m, "bytes": traffic, "product_us": product, "vector_us": vector_us}
        part.add("batched Lanczos, diagonal products", n, timing, copies=copies, correct=correct, **more)
        if not correct:
            part.fail("batched Lanczos", AssertionError(f"n = {n}: bases are not orthonormal or T is not Q A Qᵀ"))
        elif n == large:
            part.figure("ragged Lanczos, n = 1e7, m = 64: vector work over a copy of 6 n m² bytes", copies)
        if n == small:
            other = clock.measure([lambda matvec=matvec, o=offsets, s=start: loop(matvec, o, m, s)])
            alpha, _ = loop(matvec, offsets, m, start)
            same = bool((alpha[:, :4].double() - runs.alpha[:, :4]).abs().max() < 1e-3)
            part.add("loop of torch.mv over the blocks", n, other, blocks=blocks, m=m, correct=same)
            if correct and same:
                name = "ragged Lanczos, 100 blocks, n = 1e6, m = 64: times faster than a loop of torch.mv"
                part.figure(name, other["wall_us"] / timing["wall_us"])
        del runs


def _is_right(basis: Tensor, alpha: Tensor, offsets: list[int], diagonal: Tensor) -> bool:
    for b in (0, len(offsets) // 2, len(offsets) - 2):
        part = slice(offsets[b], offsets[b + 1])
        Q = basis[:, part].double()
        one = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
        T = (Q * diagonal[part].double()) @ Q.T
        if float((Q @ Q.T - one).abs().max()) > 5e-6 or float((T.diagonal() - alpha[b]).abs().max()) > 1e-5:
            return False
    return True


def time_quadrature(part: Part, clock: Clock, *, count: int, k: int) -> None:
    """(256, 64) beside torch's and CuPy's dense eigensolvers, and many more matrices alone."""
    rng = torch.Generator().manual_seed(0)
    alpha = torch.randn(16 * count, k, generator=rng, dtype=torch.float64)
    beta = torch.rand(16 * count, k - 1, generator=rng, dtype=torch.float64)
    there = [
        (alpha[i * count : (i + 1) * count].to(clock.device), beta[i * count : (i + 1) * count].to(clock.device))
        for i in range(4)
    ]
    what = f"quadrature ({count}, {k})"
    ours = clock.measure([lambda a=a, b=b: tridiagonal_quadrature(a, b) for a, b in there])
    dense = [torch.diag_embed(a) + torch.diag_embed(b, 1) + torch.diag_embed(b, -1) for a, b in there]
    clock.poison(8 * count * k)
    nodes, weights = tridiagonal_quadrature(*there[0])
    values, vectors = torch.linalg.eigh(dense[0].cpu())
    correct = bool((nodes.cpu() - values).abs().max() < 1e-12)
    correct = correct and bool((weights.cpu() - vectors[:, 0].square()).abs().max() < 1e-9)
    part.add(what, count, ours, correct=correct)
    if not correct:
        part.fail(what, AssertionError("nodes or weights differ from those of a dense solver"))
    by_torch = clock.measure([lambda T=T: torch.linalg.eigh(T) for T in dense])
    part.add(f"{what}, torch.linalg.eigh", count, by_torch)
    if correct:
        part.figure("quadrature (256, 64): times faster than torch.linalg.eigh", by_torch["wall_us"] / ours["wall_us"])
    all_there = alpha.to(clock.device), beta.to(clock.device)
    part.add(f"quadrature ({16 * count}, {k})", 16 * count, clock.measure([lambda: tridiagonal_quadrature(*all_there)]))
    if clock.device.type == "cuda" and importlib.util.find_spec("cupy"):
        import cupy

        arrays = [cupy.from_dlpack(T) for T in dense]
        by_cupy = clock.measure([lambda T=T: cupy.linalg.eigh(T) for T in arrays])
        part.add(f"{what}, cupy.linalg.eigh", count, by_cupy)
        if correct:
            part.figure(
                "quadrature (256, 64): times faster than cupy.linalg.eigh", by_cupy["wall_us"] / ours["wall_us"]
            )
