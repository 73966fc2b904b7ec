"""Weights as integers of few bits: codes with their scales, and the same packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .weight_grid import WeightGrid


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n], each below 2^bits, as uint8 [..., ⌈n bits / 8⌉]: one stream of bits, lowest first.

    Raises:
        ValueError: a code does not fit, which would spill into its neighbour.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"`codes` is {codes.dtype}; it must be torch.uint8")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"`codes` has {int(codes.max())}; with {bits} bits it must be below {2**bits}")
    place = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> place) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    return (stream.unflatten(-1, (-1, 8)) << _of_byte(codes)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes [..., count] of what `pack_codes` made."""
    _check_bits(bits)
    if packed.shape[-1] != -(-count * bits // 8):
        raise ValueError(
            f"`packed` has {packed.shape[-1]} bytes a row; {count} codes of {bits} bits are {-(-count * bits // 8)}"
        )
    stream = ((packed.unsqueeze(-1) >> _of_byte(packed)) & 1).flatten(-2)[..., : count * bits]
    place = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.unflatten(-1, (count, bits)) << place).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight on its grid.

    Attributes:
        grid: Bits, group size, symmetric or not, dtype of the scales.
        codes: uint8 [rows, columns].
        scales: s of each group, in the grid's `scale_dtype` [rows, G]; negative where a symmetric group is turned.
        zero_points: uint8 [rows, G], in the unsigned range of the codes.
        shape, dtype: Of the weight.
    """

    grid: WeightGrid
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """s (q − z), the very numbers that the parameter holds."""
        exact = torch.promote_types(self.dtype, torch.float32)
        s, z = (x.to(exact).unsqueeze(-1) for x in (self.scales, self.zero_points))
        values = s * (self.grid.grouped(self.codes.to(exact)) - z)
        return self.grid.flat(values, self.codes.shape[1]).reshape(self.shape).to(self.dtype)

    def pack(self) -> PackedWeight:
        """In bytes."""
        # The zero points of a symmetric grid are all the same.
        zeros = None if self.grid.symmetric else pack_codes(self.zero_points, self.grid.bits)
        return PackedWeight(
            self.grid, pack_codes(self.codes, self.grid.bits), self.scales, zeros, self.shape, self.dtype
        )


@dataclass(frozen=True)
class PackedWeight:
    """What is stored of a quantized weight.

    Attributes:
        codes: uint8 [rows, ⌈columns bits / 8⌉].
        scales: [rows, G] in the grid's `scale_dtype`.
        zero_points: uint8 [rows, ⌈G bits / 8⌉], None for a symmetric grid.
        grid, shape, dtype: As in `QuantizedWeight`.
    """

    grid: WeightGrid
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        tensors = [self.codes, self.scales] + ([] if self.zero_points is None else [self.zero_points])
        return sum(t.numel() * t.element_size() for t in tensors)

    def unpack(self) -> QuantizedWeight:
        """The reverse of `QuantizedWeight.pack`, bit for bit."""
        bits = self.grid.bits
        codes = unpack_codes(self.codes, bits, self.shape[1:].numel())
        if self.zero_points is None:
            zeros = torch.full(self.scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=self.codes.device)
        else:
            zeros = unpack_codes(self.zero_points, bits, self.scales.shape[1])
        return QuantizedWeight(self.grid, codes, self.scales, zeros, self.shape, self.dtype)


def _of_byte(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"`bits` is {bits!r}; it must be a whole number from 1 to 8")
