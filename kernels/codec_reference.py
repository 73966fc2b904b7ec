"""The definition of the 4-bit codec, in numpy: slow and obvious. Every other path must give these bits.

All arithmetic is IEEE float32, one rounding to nearest even per operation, subnormals kept.

A tensor is read flat, in blocks of 128 of which the last may be short. With s the largest magnitude of a block, or 0
where that is below 2⁻¹²⁶, and r = 1/s (0 where s = 0), an entry x has the code of y = x r and decodes to value(code) s.
Two codes share a byte, the earlier in the low nibble; the spare nibble at the end of an odd tensor is a zero's code.

- de, nearest: the number of thresholds below y, so that a tie goes to the lower code.
- linear, values (k + 1)/16: k + 1 = rint(16 y), kept in 1 to 16, ties to even.
- square, values ((k + 1)/16)²: k + 1 = rint(16 √y), kept in 1 to 16.
- stochastic: from the largest code with a value of at most y (the lowest code if none has), one up where
  u (next value − value) < y − value. u = (w >> 8) 2⁻²⁴ with w word e mod 4 of Philox4x32-10 for element e, counter
  (e // 4 low, e // 4 high, step, stream) and key (seed low, seed high).
- rank-1 scales of a matrix x ≥ 0: s_ij = min(R_i, C_j), row and column maxima with the same flush to 0.

A block, or with rank-1 scales a row, that has a non-finite entry (or a negative one, where the map has no sign) gets
the scale NaN and zero codes, is left out of the column maxima, and is counted.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .codec_tables import BLOCK, DE_THRESHOLDS, TINY, VALUES, ZERO_CODE

F32 = np.float32


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
    values = x.numpy()
    padded = padded_blocks(values)
    broken: np.ndarray = np.any(~valid(padded, map), axis=1)
    scale = flushed(np.abs(np.where(broken[:, None], F32(0), padded)).max(axis=1))
    y = np.where(broken[:, None], F32(0), padded) * reciprocal(scale)[:, None]
    u = uniform(y.size, seed=seed, step=step, stream=stream) if stochastic else None
    codes.numpy()[:] = packed(encode(y.reshape(-1), map, u)[: values.size], map)
    scales.numpy()[:] = np.where(broken, F32(np.nan), scale)
    bad += int(broken.sum())


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
    values = x.numpy()
    broken: np.ndarray = np.any(~valid(values, map), axis=1)
    clean = np.where(broken[:, None], F32(0), values)
    row, column = flushed(clean.max(axis=1)), flushed(clean.max(axis=0))
    y = clean * reciprocal(rank1_scale(row, column))
    u = uniform(y.size, seed=seed, step=step, stream=stream) if stochastic else None
    chosen = encode(y.reshape(-1), map, u).reshape(y.shape)
    chosen[broken] = ZERO_CODE[map]
    codes.numpy()[:] = packed(chosen.reshape(-1), map)
    rows.numpy()[:] = np.where(broken, F32(np.nan), row)
    columns.numpy()[:] = column
    bad += int(broken.sum())


def dequantize_block(codes: Tensor, scales: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [n] float32."""
    n = out.numel()
    out.numpy()[:] = decoded(codes.numpy(), n, map) * np.repeat(scales.numpy(), BLOCK)[:n]


def dequantize_rank1(codes: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [R, C] float32."""
    shape = out.shape
    out.numpy()[:] = decoded(codes.numpy(), out.numel(), map).reshape(shape) * rank1_scale(
        rows.numpy(), columns.numpy()
    )


def padded_blocks(values: np.ndarray) -> np.ndarray:
    """The flat values as [⌈n/128⌉, 128], zeros beside the end: they change no maximum."""
    blocks = -(-values.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, F32)
    padded[: values.size] = values.reshape(-1)
    return padded.reshape(blocks, BLOCK)


def valid(values: np.ndarray, map: str) -> np.ndarray:
    """What the map can represent: finite, and not negative where it has no sign."""
    finite = np.isfinite(values)
    return finite if map == "de" else np.logical_and(finite, values >= 0)


def flushed(largest: np.ndarray) -> np.ndarray:
    """Scales from maxima."""
    return np.where(largest >= TINY, largest, F32(0))


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """1/s, and 0 where s = 0."""
    return np.where(scale > 0, F32(1) / np.where(scale > 0, scale, F32(1)), F32(0))


def rank1_scale(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """min(R_i, C_j) [R, C]; NaN in a row whose maximum is NaN."""
    R, C = row[:, None], column[None, :]
    return np.where(C < R, C, R)


def encode(y: np.ndarray, map: str, u: np.ndarray | None) -> np.ndarray:
    """Codes [n] uint8 of scaled values y [n]; nearest where `u` is None."""
    if u is not None:
        table = VALUES[map]
        low = (y[:, None] >= table[1:]).sum(axis=1)
        gap = table[np.minimum(low + 1, 15)] - table[low]
        return (low + ((low < 15) & (u * gap < y - table[low]))).astype(np.uint8)
    if map == "de":
        return (y[:, None] > DE_THRESHOLDS).sum(axis=1).astype(np.uint8)
    root = y if map == "linear" else np.sqrt(y)
    return (np.clip(np.rint(root * F32(16)), 1, 16) - 1).astype(np.uint8)


def decoded(codes: np.ndarray, n: int, map: str) -> np.ndarray:
    """Values [n] relative to the scale."""
    both = np.empty(2 * codes.size, np.uint8)
    both[0::2], both[1::2] = codes & 15, codes >> 4
    return VALUES[map][both[:n]]


def packed(codes: np.ndarray, map: str) -> np.ndarray:
    """Codes [n] as bytes [⌈n/2⌉]."""
    even = np.append(codes, np.uint8(ZERO_CODE[map])) if codes.size % 2 else codes
    return even[0::2] | (even[1::2] << 4)


def uniform(n: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """u of the elements 0 to n − 1: multiples of 2⁻²⁴ in [0, 1), float32, exact."""
    words = philox(-(-n // 4), seed=seed, step=step, stream=stream)
    return (words.reshape(-1)[:n] >> np.uint32(8)).astype(F32) * F32(2.0**-24)


def philox(groups: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """Words [groups, 4] uint32 of Philox4x32-10 for the groups of four elements 0, 1, ...

    Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    mask, index = np.uint64(0xFFFFFFFF), np.arange(groups, dtype=np.uint64)
    c = [index & mask, index >> np.uint64(32), np.full(groups, step & 0xFFFFFFFF, np.uint64)]
    c.append(np.full(groups, stream & 0xFFFFFFFF, np.uint64))
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            b & mask,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            a & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).astype(np.uint32)
