"""The codec in numba, for a CPU without a C compiler: loops over contiguous chunks, on as many threads as torch has.

The loops are plain functions of numpy arrays; numba is imported when the first one runs, and keeps what it compiled in
its own cache where that can be written. Without fast-math LLVM neither contracts a product and a sum nor reorders.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ._native import in_parallel
from .codec_reference import flushed
from .codec_tables import BLOCK, DE_THRESHOLDS, VALUES, ZERO_CODE

# Entries of a chunk: a handful of scratch arrays of this length stay in the cache beside each other.
CHUNK = 256 * BLOCK
F32, U64 = np.float32, np.uint64
ONE, NOTHING, SIXTEEN, UNIT = F32(1), F32(0), F32(16), F32(2.0**-24)
LOW32, SHIFT, EIGHT = U64(0xFFFFFFFF), U64(32), U64(8)
MULTIPLIERS, WEYL = (U64(0xD2511F53), U64(0xCD9E8D57)), (U64(0x9E3779B9), U64(0xBB67AE85))
MAGNITUDE, INFINITY, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x80000000)
KINDS = {"de": 0, "linear": 1, "square": 2}
# The two values of every byte, in the bits of one number.
PAIRS = {name: table[[[b & 15, b >> 4] for b in range(256)]].view(np.uint64).ravel() for name, table in VALUES.items()}
# y is at least a value where it is above the float next to it.
BELOW = {name: np.nextafter(table[1:], F32(-np.inf)) for name, table in VALUES.items()}
# Beside the last value, which is never left, an infinite gap.
GAPS = {name: np.append(np.diff(table), F32(np.inf)) for name, table in VALUES.items()}
NO_RANDOM = np.empty(0, np.float32)


def why_unavailable() -> str | None:
    """None where numba can be imported; else the reason, with the cure."""
    try:
        importlib.import_module("numba")
    except Exception as error:  # an incompatible numpy raises other kinds, too
        return f"numba cannot be imported ({error}); install it: pip install numba"
    return None


@functools.cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """A loop over arrays as machine code, which lets other threads of Python run."""
    njit = importlib.import_module("numba").njit
    try:
        return njit(loop, nogil=True, fastmath=False, error_model="numpy", cache=True)
    except RuntimeError:  # no folder for the cache can be written
        return njit(loop, nogil=True, fastmath=False, error_model="numpy")


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
    values, bits, scale = x.numpy(), x.numpy().view(np.uint32), scales.numpy()
    counts: list[int] = []

    def work(first: int, last: int) -> None:
        keep, wide = np.zeros(CHUNK // BLOCK, np.uint8), np.empty(CHUNK, F32)
        for part in parts(first, last, x.numel()):
            broken, largest = segment_maxima(bits[part.entries], BLOCK, map)
            scale[part.blocks] = np.where(broken, F32(np.nan), flushed(largest))
            counts.append(int(broken.sum()))
            spread = wide[: part.size]
            compiled(spread_blocks)(scale[part.blocks], spread)
            u = uniform(part, seed=seed, step=step, stream=stream) if stochastic else NO_RANDOM
            encode(values[part.entries], spread, u, keep, codes.numpy()[part.bytes], map)

    in_parallel(work, scales.numel(), grain=CHUNK // BLOCK)
    bad += sum(counts)


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
    values, n = x.reshape(-1).numpy(), x.numel()
    bits, blocks = values.view(np.uint32), -(-n // BLOCK)
    broken, largest = segment_maxima(bits, columns.numel(), map)
    rows.numpy()[:] = np.where(broken, F32(np.nan), flushed(largest))
    maxima = RankOneMaxima(rows.numel(), columns.numel())

    def find(first: int, last: int) -> None:
        part = Part(first, last, n)
        maxima.raise_to(bits[part.entries], part.first, broken)

    def work(first: int, last: int) -> None:
        keep, wide = np.zeros(CHUNK // BLOCK, np.uint8), np.empty(CHUNK, F32)
        for part in parts(first, last, n):
            spread = wide[: part.size]
            compiled(spread_rank1)(rows.numpy(), columns.numpy(), part.first, spread)
            u = uniform(part, seed=seed, step=step, stream=stream) if stochastic else NO_RANDOM
            encode(values[part.entries], spread, u, keep, codes.numpy()[part.bytes], map)

    in_parallel(find, blocks, grain=CHUNK // BLOCK)
    columns.numpy()[:] = maxima.scales()[1]
    in_parallel(work, blocks, grain=CHUNK // BLOCK)
    bad += int(broken.sum())


def dequantize_block(codes: Tensor, scales: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [n] float32."""

    def work(first: int, last: int) -> None:
        for part in parts(first, last, out.numel()):
            decode_block(codes.numpy(), scales.numpy(), out.numpy()[part.entries], part, map)

    in_parallel(work, scales.numel(), grain=CHUNK // BLOCK)


def dequantize_rank1(codes: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [R, C] float32."""
    flat = out.view(-1).numpy()

    def work(first: int, last: int) -> None:
        for part in parts(first, last, flat.size):
            decode_rank1(codes.numpy(), rows.numpy(), columns.numpy(), flat[part.entries], part, map)

    in_parallel(work, -(-flat.size // BLOCK), grain=CHUNK // BLOCK)


class Part(NamedTuple):
    """The blocks [first_block, last_block) of a flat tensor of n entries."""

    first_block: int
    last_block: int
    n: int

    @property
    def first(self) -> int:
        """The first entry."""
        return self.first_block * BLOCK

    @property
    def size(self) -> int:
        """How many entries there are."""
        return min(self.last_block * BLOCK, self.n) - self.first

    @property
    def blocks(self) -> slice:
        """Where scales of blocks are."""
        return slice(self.first_block, self.last_block)

    @property
    def entries(self) -> slice:
        """Where entries are."""
        return slice(self.first, self.first + self.size)

    @property
    def bytes(self) -> slice:
        """Where codes are."""
        return slice(self.first // 2, (self.first + self.size + 1) // 2)


def parts(first: int, last: int, n: int) -> Iterator[Part]:
    """Chunks of the blocks [first, last) of a tensor of n entries."""
    blocks = CHUNK // BLOCK
    return (Part(begin, min(begin + blocks, last), n) for begin in range(first, last, blocks))


class RankOneMaxima:
    """Row and column maxima that several threads raise, each in arrays of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        self._shape = (rows, columns)
        self._found: list[tuple[np.ndarray, np.ndarray]] = []

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column maxima of nothing, as bits, for one thread."""
        pair = np.zeros(self._shape[0], np.uint32), np.zeros(self._shape[1], np.uint32)
        self._found.append(pair)
        return pair

    def raise_to(self, bits: np.ndarray, first: int, broken: np.ndarray) -> None:
        """Account for the entries from `first` on, given as bits, but for those in broken rows [R]."""
        compiled(raise_maxima)(bits, first, broken, *self.start())

    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Row scales [R] and column scales [C]."""
        rows, columns = (np.maximum.reduce(side) for side in zip(*self._found, strict=True))
        return flushed(rows.view(F32)), flushed(columns.view(F32))


def segment_maxima(bits: np.ndarray, width: int, map: str) -> tuple[np.ndarray, np.ndarray]:
    """Which segments of `width` entries hold what the map cannot represent, and the maxima of |x| of the others."""
    segments = -(-bits.size // width)
    magnitudes, raw = np.empty(segments, np.uint32), np.empty(segments, np.uint32)
    compiled(largest_bits)(bits, width, magnitudes, raw)
    broken = magnitudes >= INFINITY
    if map != "de":
        broken |= raw > SIGN  # −0 is a zero
    return broken, np.where(broken, np.uint32(0), magnitudes).view(F32)


def decode_block(codes: np.ndarray, scales: np.ndarray, out: np.ndarray, part: Part, map: str) -> None:
    """The entries of a part, from all codes and all scales of blocks."""
    _unscaled(codes[part.bytes], out, map)
    compiled(scale_blocks)(scales[part.blocks], out)


def decode_rank1(
    codes: np.ndarray, rows: np.ndarray, columns: np.ndarray, out: np.ndarray, part: Part, map: str
) -> None:
    """The entries of a part, from all codes and the row and column maxima."""
    _unscaled(codes[part.bytes], out, map)
    compiled(scale_rank1)(rows, columns, part.first, out)


def _unscaled(codes: np.ndarray, out: np.ndarray, map: str) -> None:
    whole = out.size // 2 * 2
    compiled(look_up)(codes, PAIRS[map], out[:whole].view(np.uint64))
    if out.size % 2:
        out[-1] = VALUES[map][codes[-1] & 15]


def encode(x: np.ndarray, spread: np.ndarray, u: np.ndarray, keep: np.ndarray, codes: np.ndarray, map: str) -> None:
    """Codes of x [n] under the scales `spread` [n], but for blocks with a `keep` above 0; nearest if u is empty."""
    bounds = BELOW[map] if u.size else DE_THRESHOLDS
    compiled(encode_blocks)(x, spread, u, keep, KINDS[map], VALUES[map], GAPS[map], bounds, ZERO_CODE[map], codes)


def uniform(part: Part, *, seed: int, step: int, stream: int) -> np.ndarray:
    """u of the entries of a part."""
    out = np.empty(-(-part.size // 4) * 4, F32)
    words = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, step & 0xFFFFFFFF, stream & 0xFFFFFFFF)
    compiled(philox_uniform)(part.first // 4, *map(U64, words), out)
    return out


# The loops. Each works on slices, whose indices are plainly not negative, and on few arrays: so they become vectors.


def largest_bits(bits, width, magnitudes, raw):
    """Of each segment the largest bits without the sign, and with it: of integers a maximum has no order."""
    for k in range(magnitudes.size):
        segment = bits[k * width : (k + 1) * width]
        largest, largest_raw = np.uint32(0), np.uint32(0)
        for i in range(segment.size):
            largest = max(largest, segment[i] & MAGNITUDE)
            largest_raw = max(largest_raw, segment[i])
        magnitudes[k], raw[k] = largest, largest_raw


def raise_maxima(bits, first, broken, rows, columns):
    """Raise maxima of rows and columns, as bits, to the magnitudes of the entries from `first` on."""
    width = columns.size
    done, row, column = 0, first // width, first % width
    while done < bits.size:
        piece = bits[done : done + width - column]
        if not broken[row]:
            below, largest = columns[column : column + piece.size], rows[row]
            for i in range(piece.size):
                largest = max(largest, piece[i] & MAGNITUDE)
            for i in range(piece.size):
                below[i] = max(below[i], piece[i] & MAGNITUDE)
            rows[row] = largest
        done, row, column = done + piece.size, row + 1, 0


def spread_blocks(scales, out):
    """The scale of every entry."""
    for k in range(scales.size):
        out[k * BLOCK : (k + 1) * BLOCK] = scales[k]


def spread_rank1(rows, columns, first, out):
    """The scale of every entry from `first` on: the smaller of its row's and its column's, NaN in a broken row."""
    width = columns.size
    done, row, column = 0, first // width, first % width
    while done < out.size:
        piece, limit = out[done : done + width - column], rows[row]
        above = columns[column : column + piece.size]
        for i in range(piece.size):
            piece[i] = above[i] if above[i] < limit else limit
        done, row, column = done + piece.size, row + 1, 0


def look_up(codes, pairs, out):
    """Two values at once."""
    for i in range(out.size):
        out[i] = pairs[codes[i]]


def scale_blocks(scales, out):
    """Multiply every entry by the scale of its block."""
    for k in range(scales.size):
        block, scale = out[k * BLOCK : (k + 1) * BLOCK], scales[k]
        for i in range(block.size):
            block[i] *= scale


def scale_rank1(rows, columns, first, out):
    """Multiply every entry, from `first` on, by its scale, as `spread_rank1` has it."""
    width = columns.size
    done, row, column = 0, first // width, first % width
    while done < out.size:
        piece, limit = out[done : done + width - column], rows[row]
        above = columns[column : column + piece.size]
        for i in range(piece.size):
            piece[i] *= above[i] if above[i] < limit else limit
        done, row, column = done + piece.size, row + 1, 0


def encode_blocks(x, spread, u, keep, kind, table, gaps, thresholds, zero_code, codes):
    """Block by block, through two short arrays; y stays 0 or what it was beside the end of a short block."""
    y, chosen = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.uint32)
    for first in range(0, x.size, BLOCK):
        if keep[first // BLOCK]:
            continue
        entries, scales = x[first : first + BLOCK], spread[first : first + BLOCK]
        for i in range(entries.size):
            y[i] = entries[i] * (ONE / scales[i]) if scales[i] > NOTHING else NOTHING
        if kind == 0 or u.size > 0:
            for i in range(BLOCK):
                code = np.uint32(0)
                for j in range(15):
                    code += np.uint32(y[i] > thresholds[j])
                chosen[i] = code
        if u.size > 0:
            random = u[first : first + BLOCK]
            for i in range(entries.size):
                low = chosen[i]
                chosen[i] = low + np.uint32(random[i] * gaps[low] < y[i] - table[low])
        elif kind > 0:
            if kind == 2:
                for i in range(BLOCK):
                    y[i] = np.sqrt(y[i])
            for i in range(BLOCK):
                chosen[i] = np.uint32(min(max(np.rint(y[i] * SIXTEEN), ONE), SIXTEEN)) - np.uint32(1)
        if entries.size % 2:
            chosen[entries.size] = zero_code
        block = codes[first // 2 : (first + BLOCK) // 2]
        for i in range(block.size):
            block[i] = chosen[2 * i] | (chosen[2 * i + 1] << 4)


def philox_uniform(first, key0, key1, step, stream, out):
    """Multiples of 2⁻²⁴ from the words of Philox4x32-10 for the groups of four entries from `first` on."""
    for group in range(out.size // 4):
        index = np.uint64(first + group)
        c0, c1, c2, c3, k0, k1 = index & LOW32, index >> SHIFT, step, stream, key0, key1
        for _ in range(10):
            a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
            c0, c1, c2, c3 = (b >> SHIFT) ^ c1 ^ k0, b & LOW32, (a >> SHIFT) ^ c3 ^ k1, a & LOW32
            k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
        out[4 * group] = np.float32(c0 >> EIGHT) * UNIT
        out[4 * group + 1] = np.float32(c1 >> EIGHT) * UNIT
        out[4 * group + 2] = np.float32(c2 >> EIGHT) * UNIT
        out[4 * group + 3] = np.float32(c3 >> EIGHT) * UNIT
