"""Number formats of a few bits, as a codec of optimizer moments: what the study of 4-bit states takes apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.codec_tables import BLOCK


def dynamic_exponents(bits: int, *, signed: bool) -> list[float]:
    """The 2^bits values of dynamic exponents, ascending.

    After the sign bit, if there is one, a code has E <= bits − 2 zeros, a one, and F fraction bits; its value is 10^−E
    times the middle of one of the 2^F equal parts of [0.1, 1]. The two codes left over stand for 0 and 1.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, dynamic tree quantization; Li, Chen and
    Zhu, Memory Efficient Optimizers with 4-bit States, 2023.
    """
    free = bits - 1 if signed else bits
    values = [0.0, 1.0]
    for zeros in range(bits - 1):
        parts = 2 ** (free - 1 - zeros)
        width = 0.9 / parts
        middles = [10.0**-zeros * (0.1 + width * (k + 0.5)) for k in range(parts)]
        values += middles + [-x for x in middles if signed]
    return sorted(values)


@dataclass(frozen=True)
class TableCodec:
    """Blocks of 128, each relative to its largest magnitude, rounded to the nearest of some ascending values.

    The codes take a byte each. A block of zeros decodes to zeros.
    """

    values: tuple[float, ...]

    divides_decoded: ClassVar[bool] = False

    def encode(self, x: Tensor, *, step: int, id: int) -> dict[str, Tensor]:
        flat = torch.nn.functional.pad(x.float().reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        scales = flat.abs().amax(1)
        relative = flat / torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(1)
        table = torch.tensor(self.values, device=x.device)
        # Ties go to the lower value.
        codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2)
        return {"codes": codes.to(torch.uint8), "scales": scales}

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        table = torch.tensor(self.values, device=parts["scales"].device, dtype=dtype)
        flat = table[parts["codes"].long()] * parts["scales"].to(dtype).unsqueeze(1)
        return flat.reshape(-1)[: shape.numel()].view(shape)
