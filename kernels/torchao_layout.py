"""Four-bit states from and to the layout of torchao's `OptimState4bit`: the earlier of two codes in the high nibble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .codec import Packed
from .codec_tables import BLOCK, VALUES

MAPS = ("de", "linear")


def to_torchao(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n/2], scales [n/128] and table of values [16] as `OptimState4bit` takes them.

    The table is this library's: torchao's differs from it by a unit in the last place of some values. Decoding there
    gives the very numbers that `dequantize` does.

    Raises:
        ValueError: a map that torchao does not have, rank-1 scales, or a number of entries that is no multiple of 128.
    """
    _check(packed.map, packed.shape)
    if packed.scale != "block128":
        raise ValueError(
            f"`packed` has {packed.scale} scales; torchao has scales of blocks only: encode with scale='block128'"
        )
    table = torch.from_numpy(VALUES[packed.map].copy()).to(packed.codes.device)
    return _swapped(packed.codes), packed.scales[0].clone(), table


def from_torchao(codes: Tensor, scale: Tensor, shape: Sequence[int], map: Literal["de", "linear"]) -> Packed:
    """The payload with the codes [n/2] and scales [n/128] of an `OptimState4bit` of `shape`; signed states have "de".

    torchao stores no scale below 1e-12; such a block of a second moment does not decode to zeros.

    Raises:
        ValueError: a map that torchao does not have, or codes and scales that do not fit the shape.
    """
    shape = torch.Size(shape)
    _check(map, shape)
    for name, part, dtype, length in (
        ("codes", codes, torch.uint8, shape.numel() // 2),
        ("scale", scale, torch.float32, shape.numel() // BLOCK),
    ):
        if part.dtype != dtype or part.shape != (length,):
            raise ValueError(
                f"`{name}` is {part.dtype} {list(part.shape)}; shape {list(shape)} in blocks of 128 needs {dtype} "
                f"[{length}]"
            )
    bad = (~scale.isfinite()).sum().view(1)
    return Packed(_swapped(codes), (scale.detach().clone(),), shape, map, bad)


def _check(map: str, shape: torch.Size) -> None:
    if map not in MAPS:
        raise ValueError(f"`map` is {map!r}; torchao has 'de' (signed) and 'linear' (unsigned) only")
    if shape.numel() == 0 or shape.numel() % BLOCK:
        raise ValueError(f"shape {list(shape)} has {shape.numel()} entries; torchao needs a multiple of {BLOCK}")


def _swapped(codes: Tensor) -> Tensor:
    return (codes << 4) | (codes >> 4)
