"""The CUDA text on the CPU where numbers are hard: real moments, arbitrary ones, scales beside the smallest normal."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from guarded import same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sharpscope.kernels import adamw4_cuda, adamw4_reference, codec_cuda, codec_reference
from sharpscope.kernels.adamw4_batch import Batch, scalars
from sharpscope.kernels.codec_tables import TINY

SAMPLE = 30_000
FIELDS = ("params", "m_codes", "m_scales", "v_codes", "v_scales", "v_columns", "skipped")


@pytest.fixture(scope="module")
def moments():
    """[(first, second)] of the 16 tensors of Resemblyzer, every so many rows of the large ones."""
    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        pytest.skip("Resemblyzer is not installed; pip install --no-deps Resemblyzer==0.1.4")
    checkpoint = torch.load(Path(spec.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
    states = checkpoint["optimizer_state"]["state"].values()
    return [(sample(state["exp_avg"]), sample(state["exp_avg_sq"])) for state in states]


def sample(x):
    return x[:: -(-x.numel() // SAMPLE)].contiguous()


def coded(module, x, map, *, rank1, **how):
    """All that a module makes of x: codes, scales, count of what is bad, decoded values."""
    launcher = {"launcher": how.pop("launcher")} if "launcher" in how else {}
    bad, out = torch.tensor([3]), torch.empty_like(x)
    codes = torch.zeros((x.numel() + 1) // 2, dtype=torch.uint8)
    if rank1:
        scales = [torch.empty(size) for size in x.shape]
        module.quantize_rank1(x, codes, *scales, bad, map=map, **how, **launcher)
        module.dequantize_rank1(codes, *scales, out, map=map, **launcher)
    else:
        scales = [torch.empty(-(-x.numel() // 128))]
        module.quantize_block(x.view(-1), codes, *scales, bad, map=map, **how, **launcher)
        module.dequantize_block(codes, *scales, out.view(-1), map=map, **launcher)
    return [codes, *scales, bad, out]


def assert_as_defined(x, map, launcher, **how):
    expected = coded(codec_reference, x, map, **how)
    for i, (a, b) in enumerate(zip(coded(codec_cuda, x, map, launcher=launcher, **how), expected, strict=True)):
        assert same_bits(a, b), (map, list(x.shape), how, i, int((a != b).sum()))


@pytest.mark.parametrize("stochastic", [False, True])
def test_real_moments_are_stored_as_defined(moments, emulated, stochastic):
    seconds = torch.cat([v.view(-1) for _, v in moments])
    assert ((seconds > 0) & (seconds < float(TINY))).sum() > 10
    for m, v in moments:
        for x, map, rank1 in ((m, "de", False), (v, "linear", False), (v, "square", v.ndim == 2)):
            assert_as_defined(x, map, emulated(1), rank1=rank1, stochastic=stochastic, seed=6, step=2, stream=9)


floats = st.floats(width=32, allow_subnormal=True) | st.floats(0, 1, width=32)


@pytest.mark.parametrize("map", ["de", "linear", "square"])
def test_any_numbers_are_stored_as_defined(emulated, map):
    launcher = emulated()

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(
        some=st.lists(floats, min_size=1, max_size=40),
        n=st.integers(1, 700),
        width=st.integers(1, 300),
        stochastic=st.booleans(),
        seed=st.integers(0, 2**63 - 1),
        stream=st.integers(0, 2**32 - 1),
    )
    @example(some=[0.0, 2.0**-126, 1.0], n=257, width=256, stochastic=True, seed=2**63 - 1, stream=2**32 - 1)
    def check(some, n, width, stochastic, seed, stream):
        x = torch.tensor(some)[torch.arange(n) % len(some)]
        x = x if map == "de" else x.abs()
        how = {"stochastic": stochastic, "seed": seed, "step": 1, "stream": stream}
        assert_as_defined(x, map, launcher, rank1=False, **how)
        if map != "de" and n >= width:
            assert_as_defined(x[: n // width * width].view(-1, width), map, launcher, rank1=True, **how)

    check()


def batch_beside_tiny(rows, columns, stochastic, seed):
    """A first step, with β₂ = 1/2, that makes row and column maxima of v on both sides of 2⁻¹²⁶."""
    rng, n, blocks = np.random.default_rng(seed), rows * columns, -(-rows * columns // 128)
    v = 2.0**-126 * 2.0 ** rng.uniform(-1.5, 1.5, (rows, 1)) * 2.0 ** rng.uniform(-1.5, 1.5, (1, columns))
    g = np.sqrt(2 * v * rng.random((rows, columns))) * rng.choice([-1, 1], (rows, columns))
    return Batch(
        params=[torch.from_numpy(rng.standard_normal(n).astype(np.float32))],
        grads=[torch.from_numpy(g.astype(np.float32).reshape(-1))],
        m_codes=[torch.full((-(-n // 2),), 0x77, dtype=torch.uint8)],
        m_scales=[torch.zeros(blocks)],
        v_codes=[torch.zeros(-(-n // 2), dtype=torch.uint8)],
        v_scales=[torch.zeros(rows)],
        v_columns=[torch.zeros(columns)],
        skipped=[torch.tensor([0])],
        ids=[4],
        map="linear" if seed % 2 else "square",
        stochastic=stochastic,
        seed=seed,
    )


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (9, 128), (20, 256), (12, 70)], ids=str)
def test_maxima_beside_the_smallest_normal_number(emulated, shape, stochastic):
    """A scale that is flushed to 0 makes zero codes, whatever the other of its row and column is."""
    flushed, kept = 0, 0
    for seed in range(6):
        expected, found = (batch_beside_tiny(*shape, stochastic, seed) for _ in range(2))
        for t in (1, 2):
            numbers = scalars(lr=1e-3, betas=(0.9, 0.5), eps=1e-30, weight_decay=0.0, step=t)
            adamw4_reference.step(expected, numbers)
            adamw4_cuda.step(found, numbers, launcher=emulated(seed))
            for field in FIELDS:
                assert same_bits(getattr(found, field)[0], getattr(expected, field)[0]), (seed, t, field)
            for scales in (expected.v_scales[0], expected.v_columns[0]):
                flushed, kept = flushed + int((scales == 0).sum()), kept + int((scales > 0).sum())
    assert min(flushed, kept) > 10
