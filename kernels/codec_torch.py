"""The codec in torch operations: for tensors on a CPU without compiler and numba, and on a GPU without CuPy.

Nothing here waits for a GPU, and memory beside the arguments is that of a chunk. Torch rounds +, −, × and / of float32
correctly; its square root on a CPU does not always, so that numpy's is used there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .codec_tables import BLOCK, DE_THRESHOLDS, TINY, VALUES, ZERO_CODE

# Entries of a chunk, a multiple of the block. On a CPU temporaries should stay in the cache; on a GPU launches count.
CPU_ENTRIES = 1 << 16
GPU_ENTRIES = 1 << 24
LOW32 = 0xFFFFFFFF


def why_unavailable() -> str | None:
    """None: torch is there."""
    return None


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
    for part in parts(x.numel(), x.device):
        blocks = padded_blocks(x[part.entries])
        largest, broken = _maxima(blocks, 1, map)
        scales[part.blocks] = torch.where(broken, torch.nan, flushed(largest))
        bad += broken.sum()
        y = relative(blocks, scales[part.blocks, None]).view(-1)[: part.size]
        u = uniform(part, x.device, seed=seed, step=step, stream=stream) if stochastic else None
        codes[part.bytes] = packed(encode(y, map, u), map)


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
    largest, broken = _maxima(x, 1, map)
    rows.copy_(torch.where(broken, torch.nan, flushed(largest)))
    bad += broken.sum()
    columns.zero_()
    height = max(_entries(x.device) // x.shape[1], 1)
    for some, without in zip(x.split(height), broken.split(height), strict=True):
        torch.maximum(columns, torch.where(without[:, None], 0.0, some).amax(0), out=columns)
    columns.copy_(flushed(columns))
    flat = x.view(-1)
    for part in parts(flat.numel(), x.device):
        y = relative(flat[part.entries], rank1_scale(rows, columns, part))
        u = uniform(part, x.device, seed=seed, step=step, stream=stream) if stochastic else None
        codes[part.bytes] = packed(encode(y, map, u), map)


def dequantize_block(codes: Tensor, scales: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [n] float32."""
    for part in parts(out.numel(), out.device):
        out[part.entries] = decoded_block(codes, scales, part, map)


def dequantize_rank1(codes: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, map: str) -> None:
    """Decode into `out` [R, C] float32."""
    flat = out.view(-1)
    for part in parts(flat.numel(), out.device):
        flat[part.entries] = decoded_rank1(codes, rows, columns, part, map)


class Part(NamedTuple):
    """The entries [first, last) of a flat tensor; `first` begins a block."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """How many entries there are."""
        return self.last - self.first

    @property
    def entries(self) -> slice:
        """Where entries are."""
        return slice(self.first, self.last)

    @property
    def blocks(self) -> slice:
        """Where scales of blocks are."""
        return slice(self.first // BLOCK, -(-self.last // BLOCK))

    @property
    def bytes(self) -> slice:
        """Where codes are."""
        return slice(self.first // 2, (self.last + 1) // 2)


class Rectangle(NamedTuple):
    """Entries of a part that fill the same columns of neighbouring rows."""

    rows: slice
    columns: slice
    entries: slice

    def of(self, x: Tensor) -> Tensor:
        """These entries of the part's x as [rows, columns]."""
        return x[self.entries].view(self.rows.stop - self.rows.start, -1)


def parts(n: int, device: torch.device) -> Iterator[Part]:
    """Chunks of n entries."""
    size = _entries(device)
    return (Part(first, min(first + size, n)) for first in range(0, n, size))


def rectangles(part: Part, width: int) -> Iterator[Rectangle]:
    """A part of a matrix with rows of length `width`: the end of a row, whole rows, the beginning of a row."""
    at = part.first
    while at < part.last:
        row, column = divmod(at, width)
        height = 1 if column else max((part.last - at) // width, 1)
        count = min(height * width - column, part.last - at)
        yield Rectangle(
            slice(row, row + height),
            slice(column, column + count // height),
            slice(at - part.first, at - part.first + count),
        )
        at += count


def padded_blocks(x: Tensor) -> Tensor:
    """The flat x as [⌈n/128⌉, 128], zeros beside the end; a view where nothing is missing."""
    missing = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)


def flushed(largest: Tensor) -> Tensor:
    """Scales from maxima."""
    return torch.where(largest >= float(TINY), largest, 0.0)


def relative(x: Tensor, scale: Tensor) -> Tensor:
    """x · (1/s), and 0 where s is 0 or NaN."""
    return torch.where(scale > 0, x * scale.reciprocal(), 0.0)


def rank1_scale(rows: Tensor, columns: Tensor, part: Part) -> Tensor:
    """min(R_i, C_j) of the entries of a part; NaN in a row whose maximum is NaN."""
    found = []
    for piece in rectangles(part, columns.numel()):
        R, C = rows[piece.rows, None], columns[piece.columns]
        found.append(torch.where(C < R, C, R).view(-1))
    return found[0] if len(found) == 1 else torch.cat(found)


def encode(y: Tensor, map: str, u: Tensor | None) -> Tensor:
    """Codes [n] uint8 of scaled values y [n], which are overwritten; nearest where `u` is None."""
    if u is not None:
        table, gaps = _table(map, y.device), _gaps(map, y.device)
        low = _count(y, VALUES[map][1:], reached=True)
        index = low.int()
        up = u * gaps.index_select(0, index) < y - table.index_select(0, index)
        return low + up
    if map == "de":
        return _count(y, DE_THRESHOLDS, reached=False)
    root = y if map == "linear" else square_root_(y)
    return root.mul_(16).round_().clamp_(1, 16).sub_(1).to(torch.uint8)


def square_root_(x: Tensor) -> Tensor:
    """√x in place, correctly rounded."""
    if x.device.type != "cpu":
        return x.sqrt_()
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=x.numpy())
    return x


def packed(codes: Tensor, map: str) -> Tensor:
    """Codes [n] as bytes [⌈n/2⌉]."""
    even = torch.nn.functional.pad(codes, (0, 1), value=ZERO_CODE[map]) if codes.numel() % 2 else codes
    return even[0::2] | (even[1::2] << 4)


def decoded_block(codes: Tensor, scales: Tensor, part: Part, map: str) -> Tensor:
    """The entries of a part, from all codes and all scales of blocks."""
    values = padded_blocks(_unscaled(codes, part, map))
    return (values * scales[part.blocks, None]).view(-1)[: part.size]


def decoded_rank1(codes: Tensor, rows: Tensor, columns: Tensor, part: Part, map: str) -> Tensor:
    """The entries of a part, from all codes and the row and column maxima."""
    return _unscaled(codes, part, map) * rank1_scale(rows, columns, part)


def uniform(part: Part, device: torch.device, *, seed: int, step: int, stream: int) -> Tensor:
    """u of the entries of a part, from Philox4x32-10 in int64, whose products wrap to the right 64 bits."""
    index = torch.arange(part.first // 4, -(-part.last // 4), device=device)
    c: list[Tensor] = [index & LOW32, index >> 32]
    c += [torch.full_like(index, step & LOW32), torch.full_like(index, stream & LOW32)]
    key = [seed & LOW32, seed >> 32 & LOW32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & LOW32) ^ c[1] ^ key[0], b & LOW32, (a >> 32 & LOW32) ^ c[3] ^ key[1], a & LOW32]
        key = [(key[0] + 0x9E3779B9) & LOW32, (key[1] + 0xBB67AE85) & LOW32]
    words = torch.stack(c, dim=1).view(-1)[: part.size]
    return (words >> 8).float() * 2.0**-24


def _maxima(x: Tensor, dim: int, map: str) -> tuple[Tensor, Tensor]:
    """Largest entry (magnitude, with a sign in the map) along `dim`, and whether one is not to be represented."""
    if map == "de":
        largest = x.abs().amax(dim)
        return largest, ~largest.isfinite()
    largest = x.amax(dim)
    return largest, ~largest.isfinite() | (x.amin(dim) < 0)


def _count(y: Tensor, bounds: np.ndarray, *, reached: bool) -> Tensor:
    """How many ascending bounds y is above, or has `reached`."""
    if y.device.type != "cpu":
        return torch.bucketize(y, _on(tuple(bounds.tolist()), y.device), out_int32=True, right=reached).to(torch.uint8)
    compare = torch.ge if reached else torch.gt
    count = torch.zeros_like(y, dtype=torch.uint8)
    for bound in bounds.tolist():
        count += compare(y, bound)
    return count


def _unscaled(codes: Tensor, part: Part, map: str) -> Tensor:
    pairs = _pairs(map, codes.device).index_select(0, codes[part.bytes].int())
    return pairs.view(torch.float32)[: part.size]


def _entries(device: torch.device) -> int:
    return CPU_ENTRIES if device.type == "cpu" else GPU_ENTRIES


@functools.cache
def _pairs(map: str, device: torch.device) -> Tensor:
    """The two values of every byte, in the bits of one number."""
    both = VALUES[map][[[byte & 15, byte >> 4] for byte in range(256)]]
    return torch.from_numpy(both.view(np.int64).ravel()).to(device)


def _table(map: str, device: torch.device) -> Tensor:
    return _on(tuple(VALUES[map].tolist()), device)


def _gaps(map: str, device: torch.device) -> Tensor:
    """Between a value and the next; beside the last, which is never left, an infinite one."""
    return _on((*np.diff(VALUES[map]).tolist(), float("inf")), device)


@functools.cache
def _on(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)
