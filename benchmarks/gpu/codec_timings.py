"""Encoding and decoding beside a copy of the bytes that they must move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sharpscope.kernels import Packed, dequantize, quantize_m, quantize_v
from torch import Tensor

from .clock import Clock
from .report import Part

SCALES = 4 / 128
HOW = {
    "quantize_m": (lambda x: quantize_m(x), 4.5 + SCALES),
    "quantize_m, stochastic": (lambda x: quantize_m(x, rounding="stochastic", seed=1), 4.5 + SCALES),
    "quantize_v, block": (lambda x: quantize_v(x, scale="block128"), 4.5 + SCALES),
    "quantize_v, block, square": (lambda x: quantize_v(x, scale="block128", map="square"), 4.5 + SCALES),
    "quantize_v, rank-1": (lambda x: quantize_v(x), 8.5),
}


def time_codec(part: Part, clock: Clock, sizes: list[int]) -> None:
    """All kinds at all sizes."""
    for n in sizes:
        side = math.isqrt(n)
        n = side * side
        inputs = [torch.rand(side, side, device=clock.device) for _ in range(clock.sets_for(4.5 * n))]
        for name, (encode, bytes_per_entry) in HOW.items():
            try:
                _encode(part, clock, name, encode, inputs, bytes_per_entry * n)
            except Exception as error:
                part.fail(f"{name}, n = {n}", error)
        packed = [quantize_m(x) for x in inputs]
        _decode(part, clock, "dequantize, block", packed, (4.5 + SCALES) * n)
        packed = [quantize_v(x) for x in inputs]
        _decode(part, clock, "dequantize, rank-1", packed, 4.5 * n)
        del inputs, packed


def keeping(function: Callable[[Any], object], inputs: Sequence[Any]) -> list[Callable[[], None]]:
    """Calls that each keep their last result, so that the memory of results is rotated as that of inputs is."""
    kept: list[object] = [None] * len(inputs)

    def call(i: int) -> None:
        kept[i] = function(inputs[i])

    return [functools.partial(call, i) for i in range(len(inputs))]


def _encode(
    part: Part, clock: Clock, name: str, encode: Callable[[Tensor], Packed], inputs: list[Tensor], moved: float
) -> None:
    n = inputs[0].numel()
    timing = clock.measure(keeping(encode, inputs))
    clock.poison(-(-n // 2))
    found, true = encode(inputs[0]), encode(inputs[0].cpu())
    pairs = zip((found.codes, *found.scales), (true.codes, *true.scales), strict=True)
    correct = all(torch.equal(a.cpu(), b) for a, b in pairs)
    part.add(name, n, timing, bytes=moved, copies=timing["device_us"] / clock.copy_us(moved), correct=correct)
    if not correct:
        raise AssertionError("the codes differ from those of the CPU")


def _decode(part: Part, clock: Clock, name: str, packed: list[Packed], moved: float) -> None:
    n = packed[0].shape.numel()
    timing = clock.measure(keeping(dequantize, packed))
    clock.poison(4 * n)
    first = packed[0]
    there = Packed(first.codes.cpu(), tuple(s.cpu() for s in first.scales), first.shape, first.map, first.bad.cpu())
    correct = torch.equal(dequantize(first).cpu(), dequantize(there))
    part.add(name, n, timing, bytes=moved, copies=timing["device_us"] / clock.copy_us(moved), correct=correct)
    if not correct:
        part.fail(name, AssertionError(f"n = {n}: the values differ from those of the CPU"))
