"""The vector work of batched Lanczos on a GPU: seven launches a step, none of which the host waits for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _cupy
from ._launch import Argument, Launcher, Source
from .lanczos_state import State, Tiles

REALS = {torch.float32: "float", torch.float64: "double"}
SOURCES = tuple(Source(("lanczos.cu",), (("REAL", real),)) for real in REALS.values())

# As in lanczos.cu.
TILE = 256
THREADS = 256
GROUPS = 32
# A recurrence is cut into about this many strips, of at least one tile, so that the GPU is full and sums are short.
STRIPS = 2048


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return _cupy.why_unavailable()


class VectorWork:
    """See `lanczos_state`; a step reads the basis three times."""

    def __init__(self, state: State, *, launcher: Launcher | None = None) -> None:
        self._launcher = _cupy.launcher() if launcher is None else launcher
        self._source = SOURCES[list(REALS).index(state.basis.dtype)]
        self._state = state
        (self._m, self._n), count, device = state.basis.shape, len(state.steps), state.basis.device
        # The length of a strip depends on its own recurrence only, so that neighbours change no bit.
        sizes = np.diff(state.bounds)
        self._strips = Tiles.of(state.bounds, TILE * np.maximum(1, sizes // (STRIPS * TILE)), device)
        self._work = torch.empty_like(state.basis[0])
        self._partial = torch.empty(len(self._strips), self._m, dtype=torch.float64, device=device)
        self._c, self._total = (torch.empty(count, self._m, dtype=torch.float64, device=device) for _ in range(2))
        self._divisor = torch.empty(count, dtype=torch.float64, device=device)

    def begin(self, start: Tensor) -> None:
        self._dots(start, 0)
        self._update(0, norm=True)
        self._finish(-1)
        self._next(0)

    def step(self, product: Tensor, j: int) -> None:
        rows = j + 1
        self._dots(product, rows)
        self._reduce(rows, accumulate=False)
        self._update(rows, norm=False)
        self._reduce(rows, accumulate=True)
        self._update(rows, norm=True)
        self._finish(j)
        if rows < self._m:
            self._next(rows)

    def _dots(self, source: Tensor, rows: int) -> None:
        strips = self._strips
        self._launch(
            "lanczos_dots",
            len(strips),
            THREADS,
            *(self._state.basis, source, self._work, np.int64(self._n), np.int32(rows), np.int32(self._m)),
            *(strips.first, strips.last, self._partial),
        )

    def _reduce(self, rows: int, *, accumulate: bool) -> None:
        self._launch(
            "lanczos_reduce",
            len(self._divisor) * -(-rows // 32),
            32 * GROUPS,
            *(self._partial, self._strips.tiles_of, np.int32(rows), np.int32(self._m), np.int32(accumulate)),
            *(self._c, self._total),
        )

    def _update(self, rows: int, *, norm: bool) -> None:
        strips = self._strips
        self._launch(
            "lanczos_update",
            len(strips),
            THREADS,
            *(self._state.basis, self._work, np.int64(self._n), np.int32(rows), np.int32(self._m)),
            *(strips.owner, strips.first, strips.last, self._c, np.int32(norm), self._partial),
        )

    def _finish(self, j: int) -> None:
        state = self._state
        self._launch(
            "lanczos_finish",
            len(self._divisor),
            THREADS,
            *(self._partial, self._strips.tiles_of, state.offsets, np.int32(self._m), np.int32(j)),
            *(np.float64(state.noise), self._total, state.alpha, state.remainder, state.scale, state.steps, state.open),
            self._divisor,
        )

    def _next(self, row: int) -> None:
        strips = self._strips
        self._launch(
            "lanczos_next",
            len(strips),
            THREADS,
            *(self._state.basis[row], self._work, strips.owner, strips.first, strips.last, self._divisor),
        )

    def _launch(self, kernel: str, grid: int, block: int, *args: Argument) -> None:
        self._launcher.launch(self._source, kernel, grid, block, args)
