"""The tensors behind an objective as plain data: gathered, cast, and a token of their contents."""

from __future__ import annotations

import ctypes
import zlib

import torch
from torch import Tensor

from .sharded import is_sharded

COLUMNS = 1024


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself without its history; a sharded one gathered from its ranks."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def content(tensor: Tensor) -> tuple:
    """A token of where a tensor lies and what it holds; it changes with any entry, also when two change places."""
    local = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    plain = local.detach()
    if plain.layout != torch.strided:
        return tuple(content(part) for part in sparse_parts(plain))
    version = 0 if plain.is_inference() else plain._version
    return (plain.data_ptr(), version, *checksums(plain))


def checksums(tensor: Tensor) -> tuple[int, ...]:
    """Numbers that change with any entry of a dense tensor, but for one change in 2^32.

    On a CPU a CRC of its bytes, read where they lie; else row and column sums of the bit patterns, which take two
    reads of the memory and no copy of it.
    """
    plain = tensor.detach().contiguous()
    if plain.device.type == "cpu":
        if plain.numel() == 0:
            return (0,)
        # Not through NumPy: it would make the storage unresizable, which FSDP has to resize.
        held = (ctypes.c_char * num_bytes(plain)).from_address(plain.data_ptr())
        return (zlib.crc32(held),)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(plain.element_size(), torch.uint8)
    bits = plain.reshape(-1).view(words)
    whole = len(bits) // COLUMNS * COLUMNS
    table = bits[:whole].view(-1, COLUMNS)
    sums = [bits[whole:], table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64)]
    return tuple(hash(part.cpu().numpy().tobytes()) for part in sums)


def sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Indices and values of a sparse tensor of any layout."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def num_bytes(tensor: Tensor) -> int:
    """Memory behind a tensor; `nbytes` does not exist for sparse ones."""
    parts = (tensor,) if tensor.layout == torch.strided else sparse_parts(tensor)
    return sum(part.numel() * part.element_size() for part in parts)
