"""The definition of the fused 4-bit AdamW step, in numpy: slow and obvious. Every other path must give these bits.

With old moments m, v decoded, every operation rounded to float32 once and in this order:

    m' = (b1 m) + (omb1 g)          v' = (b2 v) + (omb2 (g g))
    p' = (p decay) − (step_size (m' / ((√v' rs2) + eps)))

p' uses m' and v' before they are encoded; in bfloat16 it is rounded once more, to nearest even. A block of 128 entries
(of the flat tensor, with either kind of scale) in which an m' or v' is not finite is skipped: p, m and v keep their
values there, and it is counted. With scales of blocks that means their very bits; with rank-1 scales the old values of
v are encoded again (a NaN among them as 0), because the column maxima may have changed.

Source: Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023, algorithm 1, with AdamW as the optimizer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .adamw4_batch import Batch, Scalars
from .codec_reference import (
    decoded,
    dequantize_block,
    encode,
    flushed,
    packed,
    padded_blocks,
    quantize_block,
    rank1_scale,
    reciprocal,
    uniform,
)
from .codec_tables import BLOCK


def step(batch: Batch, numbers: Scalars) -> None:
    """Update every tensor of the batch in place."""
    for i in range(len(batch.params)):
        _step_one(batch, i, numbers)


def _step_one(batch: Batch, i: int, k: Scalars) -> None:
    flat = batch.params[i].detach().view(-1)
    p, g = flat.float().numpy(), batch.grads[i].detach().view(-1).float().numpy()
    n, rank1 = p.size, batch.v_columns[i].numel() > 0
    m_old = torch.empty(n, dtype=torch.float32, device="cpu")
    dequantize_block(batch.m_codes[i], batch.m_scales[i], m_old, map="de")
    v_old = _decoded_v(batch, i, n, rank1)
    with np.errstate(all="ignore"):
        m = (k.b1 * m_old.numpy()) + (k.omb1 * g)
        v = (k.b2 * v_old) + (k.omb2 * (g * g))
        new = (p * k.decay) - (k.step_size * (m / ((np.sqrt(v) * k.rs2) + k.eps)))
    finite = np.isfinite(padded_blocks(m)) & np.isfinite(padded_blocks(v))
    skip: np.ndarray = np.any(~finite, axis=1)
    batch.skipped[i] += int(skip.sum())
    keep = np.repeat(skip, BLOCK)[:n]
    flat.copy_(torch.from_numpy(np.where(keep, p, new)))
    _store_m(batch, i, m, skip, k)
    if rank1:
        kept = np.where(np.isfinite(v_old), v_old, np.float32(0))
        _store_v_rank1(batch, i, np.where(keep, kept, v), k)
    else:
        _store_v_block(batch, i, v, skip, k)


def _decoded_v(batch: Batch, i: int, n: int, rank1: bool) -> np.ndarray:
    if not rank1:
        out = torch.empty(n, dtype=torch.float32, device="cpu")
        dequantize_block(batch.v_codes[i], batch.v_scales[i], out, map=batch.map)
        return out.numpy()
    scale = rank1_scale(batch.v_scales[i].numpy(), batch.v_columns[i].numpy())
    return decoded(batch.v_codes[i].numpy(), n, batch.map) * scale.reshape(-1)


def _store_m(batch: Batch, i: int, m: np.ndarray, skip: np.ndarray, k: Scalars) -> None:
    _store_blocks(batch.m_codes[i], batch.m_scales[i], m, skip, "de", 2 * batch.ids[i], batch, k)


def _store_v_block(batch: Batch, i: int, v: np.ndarray, skip: np.ndarray, k: Scalars) -> None:
    _store_blocks(batch.v_codes[i], batch.v_scales[i], v, skip, batch.map, 2 * batch.ids[i] + 1, batch, k)


def _store_blocks(
    codes: Tensor, scales: Tensor, x: np.ndarray, skip: np.ndarray, map: str, stream: int, batch: Batch, k: Scalars
) -> None:
    new_codes, new_scales = torch.empty_like(codes), torch.empty_like(scales)
    quantize_block(
        torch.from_numpy(np.where(np.repeat(skip, BLOCK)[: x.size], np.float32(0), x)),
        new_codes,
        new_scales,
        torch.zeros(1, dtype=torch.int64, device="cpu"),
        map=map,
        stochastic=batch.stochastic,
        seed=batch.seed,
        step=int(k.step),
        stream=stream,
    )
    scales.copy_(torch.where(torch.from_numpy(skip), scales, new_scales))
    in_skipped = torch.from_numpy(np.repeat(skip, BLOCK // 2)[: codes.numel()])
    codes.copy_(torch.where(in_skipped, codes, new_codes))


def _store_v_rank1(batch: Batch, i: int, v: np.ndarray, k: Scalars) -> None:
    matrix = v.reshape(batch.v_scales[i].numel(), batch.v_columns[i].numel())
    row, column = flushed(matrix.max(axis=1)), flushed(matrix.max(axis=0))
    y = (matrix * reciprocal(rank1_scale(row, column))).reshape(-1)
    u = None
    if batch.stochastic:
        u = uniform(y.size, seed=batch.seed, step=int(k.step), stream=2 * batch.ids[i] + 1)
    batch.v_codes[i].numpy()[:] = packed(encode(y, batch.map, u), batch.map)
    batch.v_scales[i].numpy()[:], batch.v_columns[i].numpy()[:] = row, column
