"""The codec on a GPU; the definition is `codec_reference`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _cupy
from ._launch import Argument, Launcher, Source
from .codec_tables import BLOCK

MAPS = ("de", "linear", "square")


def _source(map: str, stochastic: bool) -> Source:
    defines = (("MAP", str(MAPS.index(map))), ("STOCHASTIC", str(int(stochastic))))
    return Source(("codec.cuh", "codec.cu"), defines)


SOURCES = tuple(_source(map, stochastic) for map in MAPS for stochastic in (False, True))

# As in codec.cuh and codec.cu.
THREADS = 128
WARPS = THREADS // 32
CHUNK = 1024


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return _cupy.why_unavailable()


def quantize_block(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bad: Tensor,
    *,
    map: str,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    launcher: Launcher | None = None,
) -> None:
    """Encode x [n] float32 into `codes` [⌈n/2⌉] uint8 and `scales` [⌈n/128⌉] float32; add bad blocks to `bad` [1]."""
    n = x.numel()
    args = (x, codes, scales, bad, np.int64(n), _aligned(x, codes), *_random(seed, step, stream))
    _launch(launcher, _source(map, stochastic), "quantize_block", _ceil(_ceil(n, 2 * BLOCK), WARPS), args)


def dequantize_block(codes: Tensor, scales: Tensor, out: Tensor, *, map: str, launcher: Launcher | None = None) -> None:
    """Decode into `out` [n] float32."""
    n = out.numel()
    args = (codes, scales, out, np.int64(n), _aligned(out, codes))
    _launch(launcher, _source(map, False), "dequantize_block", _ceil(_ceil(n, 2 * BLOCK), WARPS), args)


def quantize_rank1(
    x: Tensor,
    codes: Tensor,
    rows: Tensor,
    columns: Tensor,
    bad: Tensor,
    *,
    map: str,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    launcher: Launcher | None = None,
) -> None:
    """Encode x [R, C] ≥ 0 into `codes` [⌈RC/2⌉], row maxima `rows` [R] and column maxima `columns` [C]."""
    source, (R, C) = _source(map, stochastic), x.shape
    shape = (np.int64(R), np.int64(C))
    rows.zero_()
    columns.zero_()
    top, side = rows.view(torch.int32), columns.view(torch.int32)
    _launch(launcher, source, "rank1_rows", _ceil(R * _ceil(C, CHUNK), WARPS), (x, top, *shape))
    _launch(launcher, source, "rank1_columns", _ceil(C, THREADS) * _ceil(R, CHUNK), (x, top, side, *shape))
    args = (x, top, side, codes, *shape, _aligned(x, codes), *_random(seed, step, stream))
    _launch(launcher, source, "rank1_encode", _ceil(R * C, 4 * THREADS), args)
    _launch(launcher, source, "rank1_finish", _ceil(R + C, THREADS), (top, side, bad, *shape))


def dequantize_rank1(
    codes: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, map: str, launcher: Launcher | None = None
) -> None:
    """Decode into `out` [R, C] float32."""
    R, C = out.shape
    args = (codes, rows, columns, out, np.int64(R), np.int64(C), _aligned(out, codes))
    _launch(launcher, _source(map, False), "dequantize_rank1", _ceil(R * C, 4 * THREADS), args)


def _launch(launcher: Launcher | None, source: Source, kernel: str, grid: int, args: tuple[Argument, ...]) -> None:
    (_cupy.launcher() if launcher is None else launcher).launch(source, kernel, grid, THREADS, args)


def _random(seed: int, step: int, stream: int) -> tuple[np.generic, ...]:
    return np.uint64(seed & (1 << 64) - 1), np.uint32(step & 0xFFFFFFFF), np.uint32(stream & 0xFFFFFFFF)


def _aligned(values: Tensor, codes: Tensor) -> np.int32:
    return np.int32(values.data_ptr() % 16 == 0 and codes.data_ptr() % 2 == 0)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
