"""Stochastic rounding on the tie u · gap = y − value, which stays below, on every path."""

import importlib
from functools import partial

import numpy as np
import pytest
import torch
from sharpscope.kernels import _dispatch, codec_c, codec_cuda
from sharpscope.kernels.codec_reference import uniform
from sharpscope.kernels.codec_tables import BLOCK, VALUES

BLOCKS = 30
STREAM = {"seed": 2**62 + 5, "step": 7, "stream": 11}


@pytest.fixture(params=["reference", "c", "numba", "torch", "cuda"])
def path(request):
    """`path(name)` is that function of the path's module; the CUDA text runs emulated."""
    if request.param == "cuda":
        launcher = request.getfixturevalue("emulated")()
        return lambda name: partial(getattr(codec_cuda, name), launcher=launcher)
    if reason := _dispatch.why_unavailable("codec", request.param):
        pytest.skip(f"{request.param}: {reason}")
    return partial(getattr, importlib.import_module(f"sharpscope.kernels.codec_{request.param}"))


def ties(map):
    """(x, codes) [BLOCKS · 128], of scale 1: entry e is value + u_e · gap of some code where that is exact, else 1."""
    table, n = VALUES[map], BLOCKS * BLOCK
    u, value, gap = uniform(n, **STREAM), table[:-1, None], np.diff(table)[:, None]
    y = value + u * gap  # [15, n]
    fits = (y - value == u * gap) & (u > 0) & (y < table[1:, None])
    fits[:, ::BLOCK] = False
    low = np.where(fits, np.random.default_rng(0).random(y.shape), -1).argmax(axis=0)
    some = fits.any(axis=0)
    assert some.sum() > 100
    assert len(set(low[some])) > 8
    x = np.where(some, y[low, np.arange(n)], np.float32(1))
    return torch.from_numpy(x), np.where(some, low, 15)


def check_blocks(quantize, map):
    x, codes = ties(map)
    packed, scales, bad = torch.empty(len(x) // 2, dtype=torch.uint8), torch.empty(BLOCKS), torch.tensor([0])
    quantize(x, packed, scales, bad, map=map, stochastic=True, **STREAM)
    assert bool((scales == 1).all())
    assert_codes(packed, codes)


def check_rank1(quantize, map):
    x, codes = (part.reshape(BLOCKS, BLOCK) for part in ties(map))
    x[0], codes[0] = 1, 15
    packed, bad = torch.empty(x.numel() // 2, dtype=torch.uint8), torch.tensor([0])
    rows, columns = torch.empty(BLOCKS), torch.empty(BLOCK)
    quantize(x, packed, rows, columns, bad, map=map, stochastic=True, **STREAM)
    assert bool((rows == 1).all() and (columns == 1).all())
    assert_codes(packed, codes.reshape(-1))


def assert_codes(packed, codes):
    found = packed.numpy().repeat(2) >> np.tile([0, 4], len(packed)) & 15
    wrong = np.flatnonzero(found != codes)
    assert not wrong.size, f"{wrong.size} differ, first at {wrong[0]}: {found[wrong[0]]}, not {codes[wrong[0]]}"


@pytest.mark.parametrize("map", VALUES)
def test_scales_of_blocks(path, map):
    check_blocks(path("quantize_block"), map)


@pytest.mark.parametrize("map", ["linear", "square"])
def test_rank1_scales(path, map):
    check_rank1(path("quantize_rank1"), map)


@pytest.mark.parametrize("map", VALUES)
def test_both_forms_of_the_c_code(compiled_as, map):
    compiled_as("codec")
    check_blocks(codec_c.quantize_block, map)
    if map != "de":
        check_rank1(codec_c.quantize_rank1, map)
