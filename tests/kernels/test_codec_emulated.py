"""The CUDA codec, run on the CPU, against the definition: every byte, under any order of threads.

golden/codec.json has digests of the definition's results for fixed inputs; `digests` explains the keys. On a GPU
`digests(codec_cuda, adamw4_cuda, "cuda")` must give the same.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digests import digests
from guarded import Guards, same_bits
from sharpscope.kernels import adamw4_cuda, adamw4_reference, codec_cuda, codec_reference
from sharpscope.kernels.codec_tables import BLOCK, DE_THRESHOLDS, VALUES

GOLDEN = Path(__file__).parent / "golden" / "codec.json"
SIZES = [
    1,
    2,
    3,
    4,
    5,
    31,
    33,
    64,
    127,
    128,
    129,
    130,
    255,
    256,
    257,
    383,
    511,
    513,
    1000,
    1023,
    1025,
    2049,
    3333,
    5000,
]
SHAPES = [(1, 1), (1, 2), (2, 1), (3, 5), (1, 700), (700, 1), (7, 128), (33, 65), (5, 1025), (129, 3), (2, 2050)]
VARIANTS = [(map, stochastic) for map in codec_cuda.MAPS for stochastic in (False, True)]
UNSIGNED = [variant for variant in VARIANTS if variant[0] != "de"]
RANDOM = {"seed": 2**63 + 12345, "step": 2**32 - 2, "stream": 2**31 + 3}


def moments(n, map, seed):
    """Magnitudes of 1e-45 to 1e38 between blocks and of 1e-4 to 1 within them; some zeros."""
    rng = np.random.default_rng(seed)
    blocks = 10.0 ** rng.uniform(-45, 38, -(-n // BLOCK)).repeat(BLOCK)[:n]
    x = rng.standard_normal(n).clip(-3, 3) * 10 ** rng.uniform(-4, 0, n) * blocks * (rng.random(n) > 0.1)
    x = torch.from_numpy(x.astype(np.float32))
    return x if map == "de" else x.abs()


def blocks_by(path, guards, x, shift=0, **how):
    """Codes, scales, count of bad blocks and decoded values, all in guarded memory."""
    n, launcher = x.numel(), {"launcher": how.pop("launcher")} if "launcher" in how else {}
    out = [
        guards.poisoned(((n + 1) // 2,), torch.uint8, shift),
        guards.poisoned((-(-n // BLOCK),), torch.float32, shift),
    ]
    out += [guards.copy(torch.tensor([5])), guards.poisoned((n,), torch.float32, shift)]
    path.quantize_block(guards.copy(x, shift), *out[:3], **how, **launcher)
    path.dequantize_block(*out[:2], out[3], map=how["map"], **launcher)
    return out


def rank1_by(path, guards, x, shift=0, **how):
    """Codes, rows, columns, count of bad rows and decoded values, all in guarded memory."""
    (R, C), launcher = x.shape, {"launcher": how.pop("launcher")} if "launcher" in how else {}
    out = [guards.poisoned(((R * C + 1) // 2,), torch.uint8, shift), guards.poisoned((R,), torch.float32, shift)]
    out += [guards.poisoned((C,), torch.float32), guards.copy(torch.tensor([5]))]
    out += [guards.poisoned((R, C), torch.float32, shift)]
    path.quantize_rank1(guards.copy(x, shift), *out[:4], **how, **launcher)
    path.dequantize_rank1(*out[:3], out[4], map=how["map"], **launcher)
    return out


def assert_as_defined(made_by, x, launcher, shift=0, **how):
    guards = Guards()
    expected = made_by(codec_reference, guards, x, **how)
    got = made_by(codec_cuda, guards, x, shift, launcher=launcher, **how)
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert same_bits(a, b), (how, list(x.shape), i, int((a != b).sum()))
    guards.check()


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_blocks_of_any_length(emulated, map, stochastic):
    for n in SIZES:
        assert_as_defined(blocks_by, moments(n, map, n), emulated(n % 3), map=map, stochastic=stochastic, **RANDOM)


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_views_that_begin_anywhere(emulated, map, stochastic):
    for shift in (1, 2, 3):
        x = moments(513 + shift, map, shift)
        assert_as_defined(blocks_by, x, emulated(1), shift, map=map, stochastic=stochastic, **RANDOM)


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_every_place_where_a_code_changes(emulated, map, stochastic):
    """And the neighbours of each, on both sides, with the scale 1."""
    edges = [*VALUES[map], *(DE_THRESHOLDS if map == "de" else []), *((np.arange(1, 33, dtype=np.float32) / 32) ** 2)]
    edges += [*(np.arange(1, 33, dtype=np.float32) / 32), 0.0, 2.0**-126, 2.0**-149, 2.0**-30]
    edges = np.array(edges, np.float32)
    around = np.concatenate([edges, *(np.nextafter(edges, np.float32(side)) for side in (-2, 2))])
    around = np.unique(np.concatenate([around, -around]) if map == "de" else np.abs(around))
    around = around[np.abs(around) <= 1]
    parts = [np.append(np.float32(1), part) for part in np.array_split(around, -(-around.size // (BLOCK - 1)))]
    x = np.zeros((len(parts), BLOCK), np.float32)
    for row, part in zip(x, parts, strict=True):
        row[: part.size] = part
    assert_as_defined(blocks_by, torch.from_numpy(x.reshape(-1)), emulated(), map=map, stochastic=stochastic, **RANDOM)


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_a_sweep_of_scaled_values(emulated, map, stochastic):
    y = torch.linspace(-1 if map == "de" else 0, 1, 127 * 256).view(256, 127)
    x = torch.cat([torch.ones(256, 1), y], 1).reshape(-1)
    assert_as_defined(blocks_by, x, emulated(2), map=map, stochastic=stochastic, **RANDOM)


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_bad_blocks_are_marked_and_counted(emulated, map, stochastic):
    x = moments(128 * 7 + 50, map, 3)
    x[5], x[300], x[-1] = torch.nan, torch.inf, -torch.inf
    if map != "de":
        x[400], x[600] = -1e-30, -0.0  # a negative number is bad, a negative zero is a zero
    guards = Guards()
    bad = blocks_by(codec_cuda, guards, x, launcher=emulated(1), map=map, stochastic=stochastic, **RANDOM)[2]
    assert bad.item() == 5 + (3 if map == "de" else 4)
    assert_as_defined(blocks_by, x, emulated(1), map=map, stochastic=stochastic, **RANDOM)


@pytest.mark.parametrize(("map", "stochastic"), UNSIGNED)
def test_rank1_scales_of_any_shape(emulated, map, stochastic):
    for seed, (R, C) in enumerate(SHAPES):
        x = moments(R * C, map, seed).view(R, C)
        for shift in (0, 1):
            assert_as_defined(rank1_by, x, emulated(seed), shift, map=map, stochastic=stochastic, **RANDOM)


@pytest.mark.parametrize("map", ["linear", "square"])
def test_bad_rows_leave_the_columns_alone(emulated, map):
    x = moments(9 * 1500, map, 3).clamp(max=1e30).view(9, 1500)
    x[1, 1400], x[4, 0], x[8, 77], x[5, 5] = torch.nan, torch.inf, -1e-40, -0.0
    x[1, :5] = 3e38
    assert_as_defined(rank1_by, x, emulated(1), map=map)
    made = rank1_by(codec_cuda, Guards(), x, launcher=emulated(), map=map)
    assert made[3].item() == 5 + 3
    assert made[2].max() <= 1e30


def test_zeros_decode_to_zeros(emulated):
    for map in codec_cuda.MAPS:
        out = blocks_by(codec_cuda, Guards(), torch.zeros(300), launcher=emulated(), map=map, stochastic=False)
        assert (out[3] == 0).all()
        assert (out[1] == 0).all()
    rows = rank1_by(codec_cuda, Guards(), torch.zeros(3, 70), launcher=emulated(), map="linear", stochastic=False)
    assert (rows[4] == 0).all()


def test_golden_digests(emulated):
    """The definition has not changed, and the kernels give its results for the same inputs."""
    golden = json.loads(GOLDEN.read_text())
    assert digests(codec_reference, adamw4_reference) == golden
    assert digests(codec_cuda, adamw4_cuda, launcher=emulated(1)) == golden
