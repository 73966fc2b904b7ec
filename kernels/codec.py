"""Optimizer moments in four bits: a signed map for first moments, two unsigned ones for second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _ops
from .codec_tables import BLOCK, VERSION

Rounding = Literal["nearest", "stochastic"]
Map = Literal["de", "linear", "square"]
Scale = Literal["block128", "rank1"]
SIGNED_MAP = "de"
UNSIGNED_MAPS = ("linear", "square")
SCALES = ("rank1", "block128")
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """A tensor in four bits an entry.

    Attributes:
        codes: uint8 [⌈n/2⌉], two codes a byte, the earlier entry in the low nibble.
        scales: (float32 [⌈n/128⌉],) for blocks, (row maxima [R], column maxima [C]) for rank-1 scales of the tensor
            read as a matrix [R, C] = [shape[0], rest].
        shape: Of the tensor.
        map: "de", "linear" or "square".
        bad: int64 [1], blocks or rows that held NaN, infinite or (without a sign in the map) negative entries; they
            decode to NaN.
        version: Of the format; another one is refused.
    """

    codes: Tensor
    scales: tuple[Tensor, ...]
    shape: torch.Size
    map: Map
    bad: Tensor
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        check_packed(self)

    def __repr__(self) -> str:
        return f"Packed({list(self.shape)}, map={self.map!r}, scale={self.scale!r}, {self.nbytes} bytes)"

    @property
    def scale(self) -> Scale:
        """Kind of the scales."""
        return "block128" if len(self.scales) == 1 else "rank1"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.numel() * part.element_size() for part in (self.codes, *self.scales))


def quantize_m(x: Tensor, *, rounding: Rounding = "nearest", seed: int = 0, step: int = 0, id: int = 0) -> Packed:
    """Encode a first moment: 15 signed values and 0, relative to the largest magnitude of each block of 128.

    The values are ±(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875), 0 and 1; −1 is not among them, so an
    entry that is the largest of its block and negative decodes to −0.8875 of itself. The error is at most 0.1125 of
    the block's largest magnitude, twice that with stochastic rounding.

    Args:
        x: float32, bfloat16 or float16, any shape, contiguous, at least one entry.
        rounding: "stochastic" makes the mean of many encodings equal to x (within −0.8875 to 1 of the scale). Its
            random numbers come from Philox4x32-10 and are the same on every device.
        seed: Key of the random numbers, 0 ≤ seed < 2⁶³; `step` and `id` (of the tensor) number the streams under it.

    Raises:
        TypeError, ValueError: another dtype or layout, no entries, arguments out of range.

    Source: Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023, section 3.
    """
    _check_input(x, seed, step, id)
    _one_of(rounding, ROUNDINGS, "rounding")
    return _quantize(x, SIGNED_MAP, "block128", rounding, seed, step, 2 * id)


def quantize_v(
    x: Tensor,
    *,
    map: Literal["linear", "square"] = "linear",
    scale: Scale = "rank1",
    rounding: Rounding = "nearest",
    seed: int = 0,
    step: int = 0,
    id: int = 0,
) -> Packed:
    """Encode a second moment, x ≥ 0: 16 values without a zero, so that no update is divided by one.

    Args:
        x: As for `quantize_m`. Negative entries count as bad ones.
        map: "linear", values (k + 1)/16, as in the paper; "square", values ((k + 1)/16)², evenly spaced in √x, has
            smaller errors of the update.
        scale: "rank1" stores the row and column maxima of x as a matrix [shape[0], rest] and scales entry ij by
            min(R_i, C_j); a tensor of fewer than two dimensions gets "block128", the maxima of blocks of 128.
        rounding, seed, step, id: As for `quantize_m`. With nearest rounding codes freeze where (1 − β₂) g² is below
            half a code's width, stochastic rounding lets them follow.

    Source: As `quantize_m`, with section 4.2 for the rank-1 scales.
    """
    _check_input(x, seed, step, id)
    _one_of(rounding, ROUNDINGS, "rounding")
    _one_of(map, UNSIGNED_MAPS, "map")
    _one_of(scale, SCALES, "scale")
    return _quantize(x, map, scale if x.ndim > 1 else "block128", rounding, seed, step, 2 * id + 1)


def dequantize(packed: Packed) -> Tensor:
    """The values, float32, in the shape and on the device of what was encoded.

    Zeros of a first moment come back as zeros; those of a second moment do where the scale is 0, and else as the
    smallest value of the map.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"`packed` is a {type(packed).__name__}; pass what quantize_m or quantize_v returned")
    check_packed(packed)
    n = packed.shape.numel()
    columns = packed.scales[1] if packed.scale == "rank1" else packed.codes.new_empty(0, dtype=torch.float32)
    decode = torch.ops.sharpscope.dequantize4 if torch.compiler.is_compiling() else _ops.dequantize4
    flat = decode(packed.codes, packed.scales[0], columns, n, packed.map)
    return flat.view(packed.shape)


def check_packed(packed: Packed) -> None:
    """Raise ValueError unless the parts of a payload belong together."""
    if packed.version != VERSION:
        raise ValueError(
            f"`version` of the payload is {packed.version}; this code reads version {VERSION}: decode it with the "
            "release that wrote it and encode it again"
        )
    _one_of(packed.map, (SIGNED_MAP, *UNSIGNED_MAPS), "map")
    n = packed.shape.numel()
    codes, scales = packed.codes, packed.scales
    if codes.dtype != torch.uint8 or codes.shape != (-(-n // 2),):
        raise ValueError(
            f"`codes` is {codes.dtype} {list(codes.shape)}; shape {list(packed.shape)} needs uint8 [{-(-n // 2)}]"
        )
    if len(scales) not in (1, 2) or (len(scales) == 2 and len(packed.shape) < 2):
        raise ValueError(f"`scales` has {len(scales)} tensors; pass one for blocks, or rows and columns of a matrix")
    if len(scales) == 2 and packed.map == SIGNED_MAP:
        raise ValueError("`scales` has rows and columns, but map 'de' has scales of blocks only")
    lengths = (-(-n // BLOCK),) if len(scales) == 1 else (packed.shape[0], n // max(packed.shape[0], 1))
    for part, length in zip(scales, lengths, strict=True):
        if part.dtype != torch.float32 or part.shape != (length,):
            raise ValueError(
                f"`scales` holds {part.dtype} {list(part.shape)}; shape {list(packed.shape)} needs float32 [{length}]"
            )
    if any(not part.is_contiguous() or part.device != codes.device for part in (codes, *scales)):
        raise ValueError("`codes` and `scales` must be contiguous and on one device")


def _quantize(x: Tensor, map: Map, scale: Scale, rounding: Rounding, seed: int, step: int, stream: int) -> Packed:
    rows = x.shape[0] if scale == "rank1" else 0
    flat = x.detach().reshape(-1)
    encode = torch.ops.sharpscope.quantize4 if torch.compiler.is_compiling() else _ops.quantize4
    codes, first, second, bad = encode(flat, rows, map, rounding == "stochastic", seed, step, stream)
    return Packed(codes, (first, second) if rows else (first,), x.shape, map, bad)


def _check_input(x: Tensor, seed: int, step: int, id: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` is a {type(x).__name__}; pass a torch tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"`x` is {x.dtype}; it must be float32, bfloat16 or float16: use x.float()")
    if x.numel() == 0:
        raise ValueError(f"`x` has shape {list(x.shape)} and no entries; there is nothing to encode")
    if not x.is_contiguous():
        raise ValueError(f"`x` has strides {list(x.stride())}; it must be contiguous: use x.contiguous()")
    if not is_plain(x):
        raise ValueError("`x` is a negated view or has no memory of its own: use x.resolve_neg().clone()")
    check_streams(seed, step, id)


def is_plain(x: Tensor) -> bool:
    """Its memory holds its values: the kernels read it through its address."""
    return torch.compiler.is_compiling() or not (x.is_neg() or x._is_zerotensor())


def check_streams(seed: int, step: int, id: int) -> None:
    """Raise unless a seed, a step and a tensor's number fit into the generator's key and counter."""
    for name, value, bits in (("seed", seed, 63), ("step", step, 32), ("id", id, 31)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"`{name}` is {value!r}; it must be an int")
        if not 0 <= value < 2**bits:
            raise ValueError(f"`{name}` is {value}; it must be in [0, 2**{bits})")


def _one_of(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


torch.serialization.add_safe_globals([Packed])
