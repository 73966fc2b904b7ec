"""The vector work of batched Lanczos in torch operations, one recurrence after the other: slow, anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .lanczos_state import State

# Entries of the basis converted to float64 at once.
ENTRIES = 1 << 20


def why_unavailable() -> str | None:
    """None: torch is always there."""
    return None


class VectorWork:
    """See `lanczos_state`; dots, updates and norms are made in float64.

    Pieces of the basis are copied first: what a product of torch's rounds to may depend on strides and alignment, and a
    recurrence must not notice its neighbours.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def begin(self, start: Tensor) -> None:
        for b, part in self._parts():
            w = start[part].double()
            self._write(0, b, w, torch.linalg.vector_norm(w))

    def step(self, product: Tensor, j: int) -> None:
        state = self._state
        for b, part in self._parts():
            w = product[part].double()
            Q = state.basis[: j + 1, part]
            h = torch.zeros(j + 1, dtype=torch.float64, device=w.device)
            for _ in range(2):
                c = sum((X @ w[at] for at, X in _pieces(Q)), torch.zeros_like(h))
                for at, X in _pieces(Q):
                    w[at] -= c @ X
                # Between the passes the vector is one of the basis's precision, as it will be in the end.
                w = w.to(Q.dtype).double()
                h += c
            left = torch.linalg.vector_norm(w)
            self._finish(b, j, h, left)
            if j + 1 < len(state.basis):
                self._write(j + 1, b, w, left)

    def _parts(self) -> Iterator[tuple[int, slice]]:
        bounds = self._state.bounds.tolist()
        return ((b, slice(*pair)) for b, pair in enumerate(pairwise(bounds)))

    def _finish(self, b: int, j: int, h: Tensor, left: Tensor) -> None:
        state, was = self._state, self._state.open[b].bool()
        size = (h.square().sum() + left.square()).sqrt()
        state.scale[b] = torch.where(was & (size > state.scale[b]), size, state.scale[b])
        state.alpha[b, j] = torch.where(was, h[j], 0.0)
        state.remainder[b, j] = torch.where(was, left, 0.0)
        state.steps[b] += was
        state.open[b] = (
            was & (left > state.noise * state.scale[b]) & bool(state.bounds[b + 1] - state.bounds[b] > j + 1)
        )

    def _write(self, row: int, b: int, w: Tensor, left: Tensor) -> None:
        state = self._state
        part = slice(int(state.bounds[b]), int(state.bounds[b + 1]))
        state.basis[row, part] = torch.where(state.open[b].bool(), w / left, 0.0).to(state.basis.dtype)


def _pieces(Q: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Float64 copies of column ranges of Q [j, n]."""
    size = max(ENTRIES // len(Q), 1024)
    for first in range(0, Q.shape[1], size):
        at = slice(first, min(first + size, Q.shape[1]))
        yield at, Q[:, at].to(torch.float64, copy=True, memory_format=torch.contiguous_format)
