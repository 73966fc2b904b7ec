"""The tensors behind an objective as plain data: gathered, cast, and a token of their contents."""

from __future__ import annotations

import torch
from torch import Tensor

from .sharded import is_sharded


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself without its history; a sharded one gathered from its ranks."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def content(tensor: Tensor) -> tuple:
    local = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    plain = local.detach()
    if plain.numel() == 0:
        return (0, 0)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(plain.element_size(), torch.uint8)
    bits = plain.contiguous().reshape(-1).view(words)
    version = 0 if plain.is_inference() else plain._version
    return (plain.data_ptr(), version, int(bits.sum(dtype=torch.int64)))
