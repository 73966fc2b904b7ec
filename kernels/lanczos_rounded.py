"""The vector work of batched Lanczos over a basis rounded to float16, in torch operations on any device.

A stored vector is q̃ = q + δ with |δ_i| at most 2⁻¹¹ |q_i|, and the δ_i are independent of everything that q̃ meets
later, so that inner products are off by about 3e-4 / √n: no more than float32 sums for n beyond a million. Subtracting
c q̃ leaves c δ, however. Of the vectors that a product is orthogonalised against, only the two latest have a large c, by
the symmetry of the operator; those are kept unrounded. The others have a c of the size of rounding errors.

Sizes: n entries of all recurrences, j + 1 vectors so far.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .accurate import combine, norm, project
from .lanczos_state import State

# Entries of a row converted at once: on a CPU all rows of such a piece should stay in the cache.
CPU_PIECE = 1 << 13
GPU_PIECE = 1 << 20
# A second pass over the stored rows where the first took away more than this share of what it left.
REPEAT_SHARE = 1e-2


class VectorWork:
    """See `lanczos_state`; a step reads the stored rows twice as a rule, and makes sums over pieces in float64."""

    def __init__(self, state: State) -> None:
        if state.recent is None:
            raise ValueError("`state` keeps its basis unrounded; this path is for one in float16")
        self._state, self._recent = state, state.recent
        self._piece = CPU_PIECE if state.basis.device.type == "cpu" else GPU_PIECE
        self._spans = [slice(*pair) for pair in pairwise(state.bounds.tolist())]

    def begin(self, start: Tensor) -> None:
        for b, span in enumerate(self._spans):
            self._write(0, b, start[span], norm(start[span]))

    def step(self, product: Tensor, j: int) -> None:
        state = self._state
        for b, span in enumerate(self._spans):
            w = product[span].clone()
            near = self._recent[:, span] if j else self._recent[:1, span]
            c = self._subtract_near(near, w) + self._subtract_near(near, w)
            left, squares = norm(w), c.square().sum()
            if j > 1:
                stored = state.basis[: j - 1, span]
                for _ in range(2):
                    far = self._dots(stored, w) / state.unit[b].item()
                    self._subtract(stored, far / state.unit[b].item(), w)
                    squares = squares + far.square().sum()
                    left = norm(w)
                    if float(torch.linalg.vector_norm(far)) <= REPEAT_SHARE * float(left):
                        break
                    self._subtract_near(near, w)
                    left = norm(w)
            self._finish(b, j, c[j % 2], (squares + left.square()).sqrt(), left)
            if j + 1 < len(state.basis):
                self._write(j + 1, b, w, left)

    def _subtract_near(self, near: Tensor, w: Tensor) -> Tensor:
        c = project(near, w)
        w -= combine(near, c)
        return c

    def _dots(self, stored: Tensor, w: Tensor) -> Tensor:
        """stored · w [rows], float64."""
        total = torch.zeros(len(stored), dtype=torch.float64, device=w.device)
        for part in self._pieces(w):
            total += stored[:, part].to(w.dtype) @ w[part]
        return total

    def _subtract(self, stored: Tensor, c: Tensor, w: Tensor) -> None:
        """w −= cᵀ stored, in place."""
        c = c.to(w.dtype)
        for part in self._pieces(w):
            w[part] -= c @ stored[:, part].to(w.dtype)

    def _pieces(self, w: Tensor) -> list[slice]:
        return [slice(first, min(first + self._piece, len(w))) for first in range(0, len(w), self._piece)]

    def _finish(self, b: int, j: int, alpha: Tensor, size: Tensor, left: Tensor) -> None:
        state, was = self._state, self._state.open[b].bool()
        state.scale[b] = torch.where(was & (size > state.scale[b]), size, state.scale[b])
        state.alpha[b, j] = torch.where(was, alpha, 0.0)
        state.remainder[b, j] = torch.where(was, left, 0.0)
        state.steps[b] += was
        length = int(state.bounds[b + 1] - state.bounds[b])
        state.open[b] = was & (left > state.noise * state.scale[b]) & (length > j + 1)

    def _write(self, row: int, b: int, w: Tensor, left: Tensor) -> None:
        """q = w / left, or 0 once the recurrence has ended, unrounded and stored."""
        state, span = self._state, self._spans[b]
        q = self._recent[row % 2, span]
        if bool(state.open[b]):
            torch.div(w, left.to(w.device), out=q)
            stored = state.basis[row, span]
            for part in self._pieces(q):
                stored[part] = q[part] * state.unit[b].item()
        else:
            q.zero_()
            state.basis[row, span] = 0.0
