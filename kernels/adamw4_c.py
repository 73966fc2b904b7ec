"""The fused 4-bit AdamW step in C: one call for all tensors, threads over ranges of their blocks."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from . import _native
from ._native import in_parallel, library
from .adamw4_batch import Batch, Scalars
from .codec_tables import BLOCK

# As `Tensor` and `Numbers` in adamw4.c.
_POINTERS = ("p", "g", "m_codes", "m_scales", "v_codes", "v_scales", "v_columns", "skipped")
_SCRATCH = ("rows", "columns", "skips")
_TENSOR = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in ("n", "width", "first_block")]
    + [(name, np.uint64) for name in _SCRATCH]
    + [(name, np.uint32) for name in ("id", "p_bf16", "g_bf16", "unused")]
)
_NUMBERS = np.dtype(
    [(name, np.float32) for name in Scalars._fields[:8]]
    + [(name, np.uint32) for name in ("step", "map", "stochastic", "unused")]
    + [("seed", np.uint64)]
)
_MAPS = {"linear": 1, "square": 2}
# Blocks that are worth a thread.
_GRAIN = 512


def why_unavailable() -> str | None:
    """None where this path runs; else the reason."""
    return _native.why_unavailable("adamw4")


def step(batch: Batch, numbers: Scalars) -> None:
    """Update every tensor of the batch in place."""
    code = library("adamw4")
    tensors, blocks = _tensors(batch)
    if not blocks:
        return
    constants = (*numbers, _MAPS[batch.map], batch.stochastic, 0, batch.seed & 0xFFFFFFFFFFFFFFFF)
    packed = np.array([constants], _NUMBERS)
    at, count, k = ctypes.c_void_p(tensors.ctypes.data), ctypes.c_int64(len(tensors)), _address(packed)
    widest = int(tensors["width"].max())
    scratch = _give_scratch(tensors) if widest else None

    def update(first: int, last: int) -> None:
        room = np.zeros(widest, np.uint32)
        code.adamw4_update(at, count, k, ctypes.c_int64(first), ctypes.c_int64(last), _address(room))

    def encode_v(first: int, last: int) -> None:
        code.adamw4_encode_v(at, count, k, ctypes.c_int64(first), ctypes.c_int64(last))

    in_parallel(update, blocks, grain=_GRAIN)
    if scratch is not None:
        in_parallel(encode_v, blocks, grain=_GRAIN)
        code.adamw4_store_maxima(at, count)


def _tensors(batch: Batch) -> tuple[np.ndarray, int]:
    """The table of tensors and the number of their blocks."""
    table = np.zeros(len(batch.params), _TENSOR)
    for name, addresses in zip(_POINTERS, batch.addresses, strict=True):
        table[name] = addresses
    table["n"] = [tensor.numel() for tensor in batch.params]
    table["width"] = [tensor.numel() for tensor in batch.v_columns]
    table["id"] = np.array(batch.ids, np.uint64).astype(np.uint32)
    half = torch.bfloat16
    table["p_bf16"] = [tensor.dtype is half for tensor in batch.params]
    table["g_bf16"] = [tensor.dtype is half for tensor in batch.grads]
    ends = np.cumsum(-(-table["n"] // BLOCK))
    table["first_block"][1:] = ends[:-1]
    return table, int(ends[-1]) if len(ends) else 0


def _give_scratch(table: np.ndarray) -> list[np.ndarray]:
    """Room for the new maxima and the skipped blocks of the matrices with rank-1 scales; to be kept until the end."""
    width = table["width"]
    sizes = {
        "rows": np.where(width > 0, table["n"] // np.maximum(width, 1), 0),
        "columns": width,
        "skips": np.where(width > 0, -(-table["n"] // BLOCK), 0),
    }
    kept = []
    for name, size in sizes.items():
        room = np.zeros(int(size.sum()), np.uint8 if name == "skips" else np.uint32)
        table[name] = room.ctypes.data + (np.cumsum(size) - size) * room.itemsize
        kept.append(room)
    return kept


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
