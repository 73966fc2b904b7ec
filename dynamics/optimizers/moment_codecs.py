"""How the moments of an optimizer are kept between steps: as they are, in four bits, or as row and column means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ...kernels.adamw4 import scale_of_shape
from ...kernels.codec import Packed, Rounding, Scale, dequantize, quantize_m, quantize_v

Parts = dict[str, Tensor]


class MomentCodec(Protocol):
    """Encoding of one moment of one tensor.

    A frozen dataclass is the usual form: what it encodes stands in the state of the optimizer, itself it keeps nothing.

    Attributes:
        divides_decoded: Whether the step uses the moment as it is after encoding and decoding. False: it uses the
            moment of full precision, and encodes it afterwards.
    """

    divides_decoded: ClassVar[bool]

    def encode(self, x: Tensor, *, step: int, id: int) -> Parts:
        """What is kept of x: tensors by name, which the optimizer's state holds.

        Args:
            x: Of the parameter's shape, float32 or float64; the optimizer does not use it afterwards.
            step: Count of the optimizer's step, from 1.
            id: Number of the parameter in the optimizer; with `step` it numbers a stream of random numbers.
        """
        ...

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The moment in the precision of the step, a tensor [*shape] that the step may overwrite."""
        ...


@dataclass(frozen=True)
class Uncompressed:
    """The moment itself."""

    divides_decoded: ClassVar[bool] = False

    def encode(self, x: Tensor, *, step: int, id: int) -> Parts:
        return {"values": x}

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts["values"]


@dataclass(frozen=True)
class SignedFourBit:
    """A first moment in four bits an entry, see `sharpscope.kernels.quantize_m`."""

    rounding: Rounding = "nearest"
    seed: int = 0
    divides_decoded: ClassVar[bool] = False

    def encode(self, x: Tensor, *, step: int, id: int) -> Parts:
        x = x.float().contiguous()
        return parts_of(quantize_m(x, rounding=self.rounding, seed=self.seed, step=step, id=id))

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return dequantize(packed_from(parts, shape, "de")).to(dtype)


@dataclass(frozen=True)
class UnsignedFourBit:
    """A second moment in four bits an entry, see `sharpscope.kernels.quantize_v`.

    Args:
        map: "linear" or "square".
        scale: "rank1" falls back to blocks of 128 where row and column maxima would take more than half a byte an
            entry.
    """

    map: Literal["linear", "square"] = "linear"
    scale: Scale = "rank1"
    rounding: Rounding = "nearest"
    seed: int = 0
    divides_decoded: ClassVar[bool] = False

    def encode(self, x: Tensor, *, step: int, id: int) -> Parts:
        scale, rounding = scale_of_shape(x.shape, self.scale), self.rounding
        x = x.float().contiguous()
        return parts_of(quantize_v(x, map=self.map, scale=scale, rounding=rounding, seed=self.seed, step=step, id=id))

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return dequantize(packed_from(parts, shape, self.map)).to(dtype)


@dataclass(frozen=True)
class Factored:
    """Row means R and column means C of a second moment, uncompressed: v_ij = R_i C_j / mean(R).

    The last two dimensions are rows and columns, those before them count matrices. Encoding β₂ v + (1 − β₂) g² is then
    the recurrence of Adafactor: R ← β₂ R + (1 − β₂) mean over columns of g², C likewise over rows.

    Source: Shazeer and Stern, Adafactor, 2018, algorithm 4 (without its clipping and its ε); Li, Chen and Zhu, Memory
    Efficient Optimizers with 4-bit States, 2023, section 4, factorization.
    """

    divides_decoded: ClassVar[bool] = True

    def encode(self, x: Tensor, *, step: int, id: int) -> Parts:
        return {"row_means": x.mean(-1), "column_means": x.mean(-2)}

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        rows, columns = parts["row_means"], parts["column_means"]
        mean = rows.mean(-1, keepdim=True)
        relative = torch.where(mean > 0, rows / mean, torch.zeros_like(rows))  # no gradient yet: 0, not 0/0
        return relative.unsqueeze(-1) * columns.unsqueeze(-2)


def parts_of(packed: Packed) -> Parts:
    """The tensors of a payload that must be kept."""
    parts = {"codes": packed.codes, "scales": packed.scales[0]}
    return parts if packed.scale == "block128" else {**parts, "columns": packed.scales[1]}


def packed_from(parts: Mapping[str, Tensor], shape: torch.Size, map: Literal["de", "linear", "square"]) -> Packed:
    """The payload again; its count of bad blocks starts from 0."""
    scales = (parts["scales"], parts["columns"]) if "columns" in parts else (parts["scales"],)
    bad = torch.zeros(1, dtype=torch.int64, device=parts["codes"].device)
    return Packed(parts["codes"], scales, shape, map, bad)
