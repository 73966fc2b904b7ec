"""Batched Lanczos beside a loop over its blocks, and quadrature beside dense eigensolvers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sharpscope.kernels import tridiagonal_quadrature
from sharpscope.kernels._dispatch import choose
from sharpscope.kernels.batched_lanczos import batched_lanczos
from sharpscope.kernels.lanczos_state import State
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
    """100 ragged blocks at n = 1e7, against memory traffic, and at n = 1e6, with the loop."""
    found = _time_ours(part, clock, large, blocks, m)
    if found.vector_copies is not None:
        name = "ragged Lanczos, n = 1e7, m = 64: vector work over a copy of 6 n m² bytes"
        part.figure(name, found.vector_copies)
    del found
    found = _time_ours(part, clock, small, blocks, m)

    def other() -> dict[str, Any]:
        kept: list[Tensor] = []
        timing = clock.glance(lambda: kept.append(loop(found.matvec, found.offsets, m, found.start)[0]))
        same = bool((kept[-1][:, :4].double() - found.alpha[:, :4]).abs().max() < 1e-3)
        return {**timing, "blocks": blocks, "m": m, "correct": same}

    timing = part.rival("loop of torch.mv over the blocks", small, other)
    if timing and timing["correct"] and found.vector_copies is not None:
        name = "ragged Lanczos, 100 blocks, n = 1e6, m = 64: times faster than a loop of torch.mv"
        part.figure(name, timing["wall_us"] / found.wall_us)


class _Ours(NamedTuple):
    """What the loop is held against; `vector_copies` is None where the result is wrong."""

    matvec: Callable[[Tensor], Tensor]
    offsets: list[int]
    start: Tensor
    alpha: Tensor
    wall_us: float
    vector_copies: float | None


def _time_ours(part: Part, clock: Clock, n: int, blocks: int, m: int) -> _Ours:
    """A whole run with diagonal products; and its vector work alone, on the products of that run."""
    offsets = ragged_offsets(n, blocks, m + 2)
    diagonal = torch.rand(n, device=clock.device) + 0.5
    start = torch.randn(n, device=clock.device)

    def matvec(v: Tensor) -> Tensor:
        return diagonal * v

    timing = clock.measure([lambda: batched_lanczos(matvec, offsets, m, start=start)])
    clock.poison(4 * n)
    runs = batched_lanczos(matvec, offsets, m, start=start)
    correct = _is_right(runs.basis, runs.alpha, offsets, diagonal)
    more = {"blocks": blocks, "m": m}
    part.add("batched Lanczos, diagonal products", n, timing, correct=correct, **more)
    if not correct:
        part.fail("batched Lanczos", AssertionError(f"n = {n}: bases are not orthonormal or T is not Q A Qᵀ"))
        return _Ours(matvec, offsets, start, runs.alpha, timing["wall_us"], None)
    products, alpha = runs.basis.mul_(diagonal), runs.alpha
    del runs
    state = State.empty(np.array(offsets), m, start.dtype, clock.device)
    work = choose("lanczos", clock.device).VectorWork(state)

    def vectors() -> None:
        work.begin(start)
        for j in range(m):
            work.step(products[j], j)

    vector = clock.measure([vectors])
    traffic = 6.0 * n * m * m
    probe = min(1 << 30, int(traffic))
    copies = vector["device_us"] / (clock.copy_us(probe) * traffic / probe)
    # The same products make the same diagonals.
    same = torch.equal(state.alpha, alpha)
    part.add("batched Lanczos, vector work alone", n, vector, bytes=traffic, copies=copies, correct=same, **more)
    if not same:
        part.fail("vector work of Lanczos", AssertionError(f"n = {n}: the diagonals are not those of the whole run"))
    return _Ours(matvec, offsets, start, alpha, timing["wall_us"], copies if same else None)


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
    dense = torch.diag_embed(there[0][0]) + torch.diag_embed(there[0][1], 1) + torch.diag_embed(there[0][1], -1)
    clock.poison(8 * count * k)
    nodes, weights = tridiagonal_quadrature(*there[0])
    values, vectors = torch.linalg.eigh(dense.cpu())
    correct = bool((nodes.cpu() - values).abs().max() < 1e-12)
    correct = correct and bool((weights.cpu() - vectors[:, 0].square()).abs().max() < 1e-9)
    part.add(what, count, ours, correct=correct)
    if not correct:
        part.fail(what, AssertionError("nodes or weights differ from those of a dense solver"))
    all_there = alpha.to(clock.device), beta.to(clock.device)
    part.add(f"quadrature ({16 * count}, {k})", 16 * count, clock.measure([lambda: tridiagonal_quadrature(*all_there)]))
    for name, solve in _dense_solvers(dense, clock.device).items():
        timing = part.rival(f"{what}, {name}", count, lambda solve=solve: clock.glance(solve()))
        if timing and correct:
            part.figure(f"quadrature (256, 64): times faster than {name}", timing["wall_us"] / ours["wall_us"])


def _dense_solvers(dense: Tensor, device: torch.device) -> dict[str, Callable[[], Callable[[], object]]]:
    """Each gives what is to be timed."""

    def by_cupy() -> Callable[[], object]:
        import cupy

        array = cupy.from_dlpack(dense)
        return lambda: cupy.linalg.eigh(array)

    solvers: dict[str, Callable[[], Callable[[], object]]] = {
        "torch.linalg.eigh": lambda: lambda: torch.linalg.eigh(dense)
    }
    return solvers | ({"cupy.linalg.eigh": by_cupy} if device.type == "cuda" else {})
