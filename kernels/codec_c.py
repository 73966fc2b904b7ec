"""The 4-bit codec in C, threads over ranges of blocks or rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import _native
from ._native import in_parallel, library
from .codec_tables import BLOCK

_MAPS = {"de": 0, "linear": 1, "square": 2}
# Blocks, and entries in whole rows, that are worth a thread.
_GRAIN = 512


class _Noise(ctypes.Structure):
    """As `Noise` in codec.h."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
        ("on", ctypes.c_uint32),
    )


def why_unavailable() -> str | None:
    """None where this path runs; else the reason."""
    return _native.why_unavailable("codec")


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
) -> None:
    """Encode x [n] float32 into `codes` [⌈n/2⌉] uint8 and `scales` [⌈n/128⌉] float32; add bad blocks to `bad` [1]."""
    code, noise, n = library("codec"), _noise(stochastic, seed, step, stream), x.numel()

    def work(first: int, last: int) -> None:
        code.codec_quantize_block(
            _at(x), _long(n), _MAPS[map], noise, _long(first), _long(last), _at(codes), _at(scales), _at(bad)
        )

    in_parallel(work, scales.numel(), grain=_GRAIN)


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
) -> None:
    """Encode x [R, C] ≥ 0 into `codes` [⌈RC/2⌉], row maxima `rows` [R] and column maxima `columns` [C]."""
    code, noise, (height, width) = library("codec"), _noise(stochastic, seed, step, stream), x.shape
    columns.zero_()

    def maxima(first: int, last: int) -> None:
        scratch = columns if last - first == height else torch.zeros_like(columns)
        code.codec_rank1_maxima(
            _at(x), _long(width), _MAPS[map], _long(first), _long(last), _at(rows), _at(scratch), _at(columns), _at(bad)
        )

    def encode(first: int, last: int) -> None:
        code.codec_quantize_rank1(
            *(_at(x), _long(height * width), _long(width), _MAPS[map], noise, _long(first), _long(last)),
            *(_at(rows), _at(columns), _at(codes)),
        )

    in_parallel(maxima, height, grain=max(1, _GRAIN * BLOCK // width))
    code.codec_flush(_at(columns), _long(width))
    in_parallel(encode, -(-height * width // BLOCK), grain=_GRAIN)


def dequantize_block(codes: Tensor, scales: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [n] float32."""
    _dequantize(codes, scales, None, out, map)


def dequantize_rank1(codes: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [R, C] float32."""
    _dequantize(codes, rows, columns, out, map)


def _dequantize(codes: Tensor, scales: Tensor, columns: Tensor | None, out: Tensor, map: str) -> None:
    code, n = library("codec"), out.numel()
    width = 0 if columns is None else columns.numel()

    def work(first: int, last: int) -> None:
        code.codec_dequantize(
            *(_at(codes), _at(scales), None if columns is None else _at(columns), _long(n), _long(width), _MAPS[map]),
            *(_long(first), _long(last), _at(out)),
        )

    in_parallel(work, -(-n // BLOCK), grain=_GRAIN)


def _noise(stochastic: bool, seed: int, step: int, stream: int):
    return ctypes.byref(_Noise(seed & 0xFFFFFFFFFFFFFFFF, step & 0xFFFFFFFF, stream & 0xFFFFFFFF, stochastic))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)
