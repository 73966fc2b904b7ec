"""The fused 4-bit AdamW step in numba: chunk by chunk decode, update and encode, in arrays that stay in the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._native import in_parallel
from .adamw4_batch import Batch, Scalars
from .codec_numba import (
    CHUNK,
    F32,
    NO_RANDOM,
    NOTHING,
    Part,
    RankOneMaxima,
    compiled,
    decode_block,
    decode_rank1,
    encode,
    parts,
    raise_maxima,
    segment_maxima,
    spread_blocks,
    spread_rank1,
    uniform,
    why_unavailable,
)
from .codec_reference import flushed
from .codec_tables import BLOCK

__all__ = ["step", "why_unavailable"]

LARGEST = np.finfo(np.float32).max


def step(batch: Batch, numbers: Scalars) -> None:
    """Update every tensor of the batch in place."""
    for i in range(len(batch.params)):
        _Tensor(batch, i, numbers).step()


class _Tensor:
    """One entry of a batch, as numpy arrays where numpy has the dtype."""

    def __init__(self, batch: Batch, i: int, numbers: Scalars) -> None:
        self.batch, self.k, self.id = batch, numbers, batch.ids[i]
        self.p, self.g = batch.params[i].detach().view(-1), batch.grads[i].detach().view(-1)
        self.skipped = batch.skipped[i]
        self.m_codes, self.m_scales = batch.m_codes[i].numpy(), batch.m_scales[i].numpy()
        self.v_codes, self.v_scales = batch.v_codes[i].numpy(), batch.v_scales[i].numpy()
        self.v_columns = batch.v_columns[i].numpy()
        self.rank1 = self.v_columns.size > 0
        self.n, self.blocks = self.p.numel(), -(-self.p.numel() // BLOCK)
        self.keep = np.zeros(self.blocks, np.uint8)
        self.maxima = RankOneMaxima(self.v_scales.size, self.v_columns.size)

    def step(self) -> None:
        """One pass over the chunks, and with rank-1 scales, which need all of the new v, a second."""
        in_parallel(self._update, self.blocks, grain=CHUNK // BLOCK)
        self.skipped += int(self.keep.sum())
        if self.rank1:
            rows, columns = self.maxima.scales()
            in_parallel(
                lambda first, last: self._encode_v(first, last, rows, columns), self.blocks, grain=CHUNK // BLOCK
            )
            self.v_scales[:], self.v_columns[:] = rows, columns

    def _update(self, first: int, last: int) -> None:
        scratch, k = np.empty((3, CHUNK), F32), self.k
        whole_rows = np.zeros(self.v_scales.size, np.bool_)
        raised = self.maxima.start() if self.rank1 else None
        for part in parts(first, last, self.n):
            m, v, spread = scratch[:, : part.size]
            p, g, keep = _wide(self.p[part.entries]), _wide(self.g[part.entries]), self.keep[part.blocks]
            decode_block(self.m_codes, self.m_scales, m, part, "de")
            self._decode_v(v, part)
            compiled(update_v)(g, v, k.b2, k.omb2, keep)
            compiled(update)(p, g, m, v, k.b1, k.omb1, k.eps, k.decay, k.step_size, k.rs2, keep)
            if self.p.dtype != torch.float32:
                self.p[part.entries] = torch.from_numpy(p)
            self._store_blocks(m, spread, part, self.m_codes, self.m_scales, "de", 0)
            if raised is None:
                self._store_blocks(v, spread, part, self.v_codes, self.v_scales, self.batch.map, 1)
                continue
            if keep.any():
                self._decode_v(v, part)
                compiled(update_v)(g, v, k.b2, k.omb2, keep)
            compiled(raise_maxima)(v.view(np.uint32), part.first, whole_rows, *raised)

    def _decode_v(self, out: np.ndarray, part: Part) -> None:
        if self.rank1:
            decode_rank1(self.v_codes, self.v_scales, self.v_columns, out, part, self.batch.map)
        else:
            decode_block(self.v_codes, self.v_scales, out, part, self.batch.map)

    def _store_blocks(
        self, x: np.ndarray, spread: np.ndarray, part: Part, codes: np.ndarray, scales: np.ndarray, map: str, word: int
    ) -> None:
        keep = self.keep[part.blocks]
        _, largest = segment_maxima(x.view(np.uint32), BLOCK, "de")
        scales[part.blocks] = np.where(keep, scales[part.blocks], flushed(largest))
        compiled(spread_blocks)(scales[part.blocks], spread)
        encode(x, spread, self._random(part, word), keep, codes[part.bytes], map)

    def _encode_v(self, first: int, last: int, rows: np.ndarray, columns: np.ndarray) -> None:
        """The second pass of rank-1 scales: v once more from its old codes, encoded under the new maxima."""
        scratch, encoded = np.empty((2, CHUNK), F32), np.zeros(CHUNK // BLOCK, np.uint8)
        for part in parts(first, last, self.n):
            v, spread = scratch[:, : part.size]
            self._decode_v(v, part)
            compiled(update_v)(_wide(self.g[part.entries]), v, self.k.b2, self.k.omb2, self.keep[part.blocks])
            compiled(spread_rank1)(rows, columns, part.first, spread)
            encode(v, spread, self._random(part, 1), encoded, self.v_codes[part.bytes], self.batch.map)

    def _random(self, part: Part, word: int) -> np.ndarray:
        if not self.batch.stochastic:
            return NO_RANDOM
        return uniform(part, seed=self.batch.seed, step=int(self.k.step), stream=2 * self.id + word)


def _wide(x: Tensor) -> np.ndarray:
    """Float32 memory: that of x itself, or a copy."""
    return x.float().numpy()


# The loops, short ones over few arrays, so that they become vectors.


def update_v(g, v, b2, omb2, keep):
    """New v in place; a block with a `keep` other than 0 has its finite entries, and 0 for the others."""
    for first in range(0, g.size, BLOCK):
        gradient, second = g[first : first + BLOCK], v[first : first + BLOCK]
        if keep[first // BLOCK]:
            for i in range(second.size):
                second[i] = second[i] if second[i] <= LARGEST else NOTHING
        else:
            for i in range(second.size):
                second[i] = (b2 * second[i]) + (omb2 * (gradient[i] * gradient[i]))


def update(p, g, m, v, b1, omb1, eps, decay, step_size, rs2, keep):
    """New m and p in place, for the new v; a block with a non-finite m or v keeps p, and is marked in `keep`."""
    for first in range(0, p.size, BLOCK):
        gradient, parameter = g[first : first + BLOCK], p[first : first + BLOCK]
        moment, second = m[first : first + BLOCK], v[first : first + BLOCK]
        for i in range(moment.size):
            moment[i] = (b1 * moment[i]) + (omb1 * gradient[i])
        broken = np.uint32(0)
        for i in range(moment.size):
            broken |= np.uint32(not abs(moment[i]) <= LARGEST) | np.uint32(not second[i] <= LARGEST)
        keep[first // BLOCK] = broken
        if broken:
            continue
        for i in range(parameter.size):
            change = step_size * (moment[i] / ((np.sqrt(second[i]) * rs2) + eps))
            parameter[i] = (parameter[i] * decay) - change
