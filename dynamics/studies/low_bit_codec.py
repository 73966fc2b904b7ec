"""What the 4-bit codec promises: its errors, its codes, its bytes, its scales and its rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...kernels.codec import dequantize, quantize_m, quantize_v
from ...kernels.codec_reference import quantize_block
from ...kernels.codec_tables import BLOCK, DE_THRESHOLDS
from ..optimizer_measurements import nibbles
from ..optimizers.adamw4bit import AdamW4bit
from ..optimizers.base import tensor_bytes
from .laboratory import Laboratory
from .result import Claim

PAPER = "Li, Chen and Zhu 2023"


def round_trip(entries: int) -> dict[str, float]:
    """Largest errors over the scale on random values, and codes that differ from the definition's, ties among them."""
    gen = torch.Generator().manual_seed(0)
    signed = torch.rand(entries, generator=gen) * 2 - 1
    unsigned = torch.rand(entries, generator=gen)
    ties = torch.tensor(DE_THRESHOLDS)[torch.randint(0, 15, (entries // 4,), generator=gen)]
    signed[-len(ties) :] = ties
    half = (torch.randint(2, 33, (entries // 4,), generator=gen).float() - 0.5) / 16
    unsigned[-len(half) :] = half.clamp(max=1)
    for x in (signed, unsigned):
        x[::BLOCK] = 1.0  # the scale of every block
    error_m = (dequantize(quantize_m(signed)) - signed).abs()
    error_v = (dequantize(quantize_v(unsigned, scale="block128")) - unsigned).abs()
    differ = 0
    for x, packed in ((signed, quantize_m(signed)), (unsigned, quantize_v(unsigned, scale="block128"))):
        codes, scales = torch.empty_like(packed.codes), torch.empty_like(packed.scales[0])
        quantize_block(x, codes, scales, torch.zeros(1, dtype=torch.int64), map=packed.map)
        differ += int((nibbles(codes, entries) != nibbles(packed.codes, entries)).sum())
    return {
        "m": float(error_m.max()),
        "v": float(error_v[unsigned >= 1 / 16].max()),
        "v_small": float(error_v[unsigned < 1 / 16].max()),
        "differ": differ,
    }


def memory(shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Bytes of codes and scales, and of the whole state, after a step on matrices; with those that formulas give."""
    found: dict[str, Any] = {}
    entries = sum(rows * columns for rows, columns in shapes)
    for v in ("block", "rank1", "factor", None):
        params = [nn.Parameter(torch.zeros(*shape)) for shape in shapes]
        optimizer = torch.optim.AdamW(params) if v is None else AdamW4bit(params, v=v)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        counters = ("step", "skipped")
        kept = [x for state in optimizer.state.values() for key, x in state.items() if key not in counters]
        expected = 0
        for rows, columns in shapes:
            n = rows * columns
            block, lines = 4 * math.ceil(n / BLOCK), 4 * (rows + columns)
            expected += {
                "block": 2 * math.ceil(n / 2) + 2 * block,
                "rank1": 2 * math.ceil(n / 2) + block + lines,
                "factor": math.ceil(n / 2) + block + lines,
                None: 8 * n,
            }[v]
        whole = tensor_bytes(optimizer.state.values())
        found[v or "AdamW"] = {"kept": tensor_bytes(kept), "expected": expected, "whole": whole, "entries": entries}
    return found


def scales_of_a_matrix(along: str) -> dict[str, float]:
    """Median relative error of rank-1 and block scales on a matrix whose columns, or rows, span six decades."""
    gen = torch.Generator().manual_seed(0)
    x = torch.rand(512, 512, generator=gen) ** 8
    decades = torch.logspace(-6, 0, 512)
    x = x * (decades if along == "columns" else decades.unsqueeze(1))
    return {
        scale: float(((dequantize(quantize_v(x, scale=scale)) - x).abs() / x).median())
        for scale in ("rank1", "block128")
    }


def stochastic_means(entries: int) -> dict[str, float]:
    """Mean of many stochastic encodings of a value in blocks with scale 1."""
    blocks = -(-entries // (BLOCK - 1))
    means = {}
    for i, value in enumerate((0.3, -0.5, 0.02, -0.95)):
        x = torch.full((blocks, BLOCK), value)
        x[:, 0] = 1.0
        decoded = dequantize(quantize_m(x, rounding="stochastic", seed=i))
        means[str(value)] = float(decoded[:, 1:].double().mean())
    return means


def codec_claims(lab: Laboratory) -> list[Claim]:
    """The claims that need no training."""
    entries = 100_000 if lab.quick else 1_000_000
    trip = lab.part("round-trip", round_trip, entries=entries)
    ulp = 2.0**-23
    shapes = [[1024, 1024], [512, 2048], [4096, 256]]
    bytes_of = lab.part("memory", memory, shapes=shapes)
    columns, rows = (lab.part(f"scales-{along}", scales_of_a_matrix, along=along) for along in ("columns", "rows"))
    means = lab.part("stochastic", stochastic_means, entries=200_000)
    bias = max(abs(mean - float(value)) for value, mean in means.items() if value != "-0.95")
    reduced = {name: bytes_of["AdamW"]["whole"] / found["whole"] for name, found in bytes_of.items()}
    return [
        Claim(
            "errors of a round trip, relative to the scale of the block",
            "derived here from the maps",
            "first moment <= 0.1125; second, linear <= 1/32 from 1/16 on and <= 1/16 below",
            f"{trip['m']:.6f}; {trip['v']:.6f} and {trip['v_small']:.6f} on {entries:,} values",
            trip["m"] <= 0.1125 + ulp and trip["v"] <= 1 / 32 + ulp and trip["v_small"] <= 1 / 16 + ulp,
        ),
        Claim(
            "codes equal those of the definition, ties included",
            "derived here",
            "0 differ",
            f"{trip['differ']} of {2 * entries:,}, a quarter of them ties",
            trip["differ"] == 0,
            "the path of this machine; `python benchmarks/gpu_suite.py` compares CUDA",
        ),
        Claim(
            "codes and scales take what the formulas say",
            f"{PAPER}, section 3; formulas: derived here",
            "equal to the byte; the whole state >= 7.4 times smaller than that of AdamW",
            ", ".join(
                f"{k} {f['kept'] / f['entries']:.4f} a parameter ({reduced[k]:.2f} x)" for k, f in bytes_of.items()
            ),
            all(f["kept"] == f["expected"] for f in bytes_of.values())
            and all(reduced[k] >= 7.4 for k in ("block", "rank1", "factor")),
        ),
        Claim(
            "columns of different size: rank-1 scales have the smaller median relative error than blocks",
            f"{PAPER}, section 4, rank-1 normalization",
            "at least 2 times smaller",
            f"{columns['rank1']:.1f} against {columns['block128']:.1f}",
            2 * columns["rank1"] <= columns["block128"],
            "512 x 512 entries u^8, u uniform, columns over six decades",
        ),
        Claim(
            "rows of different size: the two kinds of scales agree",
            "derived here",
            "within 10 %",
            f"{rows['rank1']:.1f} against {rows['block128']:.1f}",
            abs(rows["rank1"] / rows["block128"] - 1) <= 0.1,
        ),
        Claim(
            "stochastic rounding has no bias inside the range of the map",
            "derived here from the map",
            "means of 0.3, −0.5, 0.02 within 0.001; −0.95, outside, gives −0.8875",
            f"largest bias {bias:.1g}; −0.95 gives {means['-0.95']:.4f}",
            bias <= 1e-3 and abs(means["-0.95"] + 0.8875) < 1e-6,
        ),
    ]
