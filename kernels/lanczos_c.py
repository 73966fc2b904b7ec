"""The vector work of batched Lanczos in C, in as many threads as torch has, with the same bits for any number."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import _native
from .lanczos_state import State, Tiles

# Bytes of a row in a tile: with 64 rows of the basis a tile takes half a megabyte, which a core's cache holds.
TILE_BYTES = 8192
# Bytes of the basis that are worth a thread of their own.
GRAIN_BYTES = 1 << 19


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return _native.why_unavailable("lanczos")


class VectorWork:
    """See `lanczos_state`; a step reads the basis three times."""

    def __init__(self, state: State) -> None:
        library = _native.library("lanczos")
        kind = {torch.float32: "float", torch.float64: "double"}[state.basis.dtype]
        self._dots, self._update, self._next = (
            getattr(library, f"lanczos_{name}_{kind}") for name in ("dots", "update", "next")
        )
        self._reduce, self._norms, self._finish = (
            getattr(library, f"lanczos_{name}") for name in ("reduce", "norms", "finish")
        )
        self._state = state
        (self._m, self._n), count = state.basis.shape, len(state.steps)
        length = TILE_BYTES // state.basis.itemsize
        self._tiles = Tiles.of(state.bounds, np.full(count, length), torch.device("cpu"))
        self._work = torch.empty_like(state.basis[0])
        self._partial = torch.empty(len(self._tiles), self._m, dtype=torch.float64, device="cpu")
        self._c, self._total = (torch.empty(count, self._m, dtype=torch.float64, device="cpu") for _ in range(2))
        self._divisor = torch.empty(count, dtype=torch.float64, device="cpu")

    def begin(self, start: Tensor) -> None:
        self._take(start, rows=0)
        self._subtract(0, norm=True)
        self._norm()
        self._write(0)

    def step(self, product: Tensor, j: int) -> None:
        state, count, rows = self._state, len(self._state.steps), j + 1
        self._take(product, rows)
        self._add_up(rows, accumulate=False)
        self._subtract(rows, norm=False)
        self._add_up(rows, accumulate=True)
        self._subtract(rows, norm=True)
        self._norm()
        self._finish(
            *_pointers(state.offsets),
            *map(ctypes.c_int64, (count, self._m, j)),
            ctypes.c_double(state.noise),
            *_pointers(self._total, state.alpha, state.remainder, state.scale, state.steps, state.open, self._divisor),
        )
        if rows < self._m:
            self._write(rows)

    def _take(self, source: Tensor, rows: int) -> None:
        """w = source, and the dots of its tiles."""
        vectors = _pointers(self._state.basis, source, self._work)
        sizes = [ctypes.c_int64(x) for x in (self._n, rows, self._m)]
        tiles, partial = _pointers(self._tiles.first, self._tiles.last), _pointers(self._partial)
        self._over_tiles(rows, lambda *span: self._dots(*vectors, *sizes, *tiles, *span, *partial))

    def _subtract(self, rows: int, *, norm: bool) -> None:
        """One pass of Gram-Schmidt with the coefficients of the last `_add_up`."""
        vectors, tail = _pointers(self._state.basis, self._work), _pointers(self._partial)
        sizes = [ctypes.c_int64(x) for x in (self._n, rows, self._m)]
        tiles, c = _pointers(self._tiles.owner, self._tiles.first, self._tiles.last), _pointers(self._c)
        self._over_tiles(rows, lambda *span: self._update(*vectors, *sizes, *tiles, *span, *c, int(norm), *tail))

    def _write(self, row: int) -> None:
        """A row of the basis: w over the divisor of its recurrence."""
        vectors, divisor = _pointers(self._state.basis[row], self._work), _pointers(self._divisor)
        tiles = _pointers(self._tiles.owner, self._tiles.first, self._tiles.last)
        self._over_tiles(1, lambda *span: self._next(*vectors, *tiles, *span, *divisor))

    def _add_up(self, rows: int, *, accumulate: bool) -> None:
        self._reduce(
            *_pointers(self._partial, self._tiles.tiles_of),
            *map(ctypes.c_int64, (len(self._divisor), rows, self._m)),
            int(accumulate),
            *_pointers(self._c, self._total),
        )

    def _norm(self) -> None:
        self._norms(
            *_pointers(self._partial, self._tiles.tiles_of),
            *map(ctypes.c_int64, (len(self._divisor), self._m)),
            *_pointers(self._divisor),
        )

    def _over_tiles(self, rows: int, call: Callable[..., None]) -> None:
        grain = max(1, GRAIN_BYTES // (TILE_BYTES * (rows + 1)))
        _native.in_parallel(
            lambda first, last: call(ctypes.c_int64(first), ctypes.c_int64(last)), len(self._tiles), grain=grain
        )


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]
