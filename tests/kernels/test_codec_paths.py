"""Every path of the codec gives the bytes of the definition."""

import importlib
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sharpscope.kernels import _dispatch, codec_reference
from sharpscope.kernels.codec_tables import DE_THRESHOLDS, TINY, VALUES

ROUNDINGS = (False, True)
sizes = st.one_of(
    st.integers(1, 5000),
    st.sampled_from([2**k + d for k in range(13) for d in (-1, 0, 1) if 2**k + d > 0]),
    st.sampled_from([128 * k + d for k in (1, 3, 9, 33) for d in (-2, -1, 0, 1, 2)]),
)
kinds = st.sampled_from(["normal", "decades", "ties", "subnormal", "huge", "sparse", "constant", "bad"])
streams = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1), "step": st.integers(0, 2**32 - 1), "stream": st.integers(0, 2**32 - 1)}
)


@pytest.fixture(params=["c", "numba", "torch"])
def path(request):
    reason = _dispatch.why_unavailable("codec", request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return importlib.import_module(f"sharpscope.kernels.codec_{request.param}")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numbers(n, kind, map, seed):
    """Float32 [n] of one kind; not negative where the map has no sign, but for the bad ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n).astype(np.float32)
    if kind == "decades":
        x *= (10 ** rng.uniform(-8, 8, n)).astype(np.float32)
    if kind == "ties":
        points = DE_THRESHOLDS if map == "de" else np.arange(1, 64, dtype=np.float32) / 64
        ties = np.concatenate([points, VALUES[map], np.nextafter(points, np.float32(9))])
        x = rng.choice(ties, n) * np.float32(2.0 ** rng.integers(-20, 20))
        x[::128] = 2.0 ** rng.integers(-20, 20)
    if kind == "subnormal":
        x *= (10 ** rng.uniform(-44, -37, n)).astype(np.float32)
        limit = rng.choice([TINY, np.nextafter(TINY, np.float32(0)), np.float32(1)])  # the largest that is flushed, too
        x = np.clip(x, -limit, limit)
    if kind == "huge":
        x = np.clip(x, -1, 1) * np.float32(3.4e38)
    if kind == "sparse":
        x[rng.random(n) < 0.995] = rng.choice([0.0, -0.0]) if map == "de" else 0
    if kind == "constant":
        x[:] = x[0]
    x = x if map == "de" else np.abs(x)
    if kind == "bad":
        spoilt = rng.random(n) < 0.01
        x[spoilt] = rng.choice(np.array([np.nan, np.inf, -np.inf, -1.0, -0.0, -1e-45], np.float32), int(spoilt.sum()))
    return torch.from_numpy(x)


def garbage(size, dtype=torch.float32):
    return torch.full((size,), 173, dtype=torch.uint8) if dtype == torch.uint8 else torch.full((size,), -7.25)


def block_outputs(module, x, **how):
    n = x.numel()
    codes, scales, bad = garbage(-(-n // 2), torch.uint8), garbage(-(-n // 128)), torch.tensor([5])
    module.quantize_block(x, codes, scales, bad, **how)
    out = garbage(n)
    module.dequantize_block(codes, scales, out, map=how["map"])
    return {"codes": codes, "scales": scales, "bad": bad, "decoded": out}


def rank1_outputs(module, x, **how):
    codes, bad = garbage(-(-x.numel() // 2), torch.uint8), torch.tensor([5])
    rows, columns = garbage(x.shape[0]), garbage(x.shape[1])
    module.quantize_rank1(x, codes, rows, columns, bad, **how)
    out = torch.full_like(x, -7.25)
    module.dequantize_rank1(codes, rows, columns, out, map=how["map"])
    return {"codes": codes, "rows": rows, "columns": columns, "bad": bad, "decoded": out}


def assert_same(ours, reference):
    for name, expected in reference.items():
        found = ours[name]
        if expected.dtype == torch.float32:
            same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
        else:
            same = found == expected
        wrong = (~same).nonzero()
        assert not wrong.numel(), f"{name}: {len(wrong)} differ, first at {wrong[0].tolist()}: {found[tuple(wrong[0])]}"


@pytest.mark.parametrize("map", ["de", "linear", "square"])
@pytest.mark.parametrize("stochastic", ROUNDINGS)
def test_blocks(path, map, stochastic):
    @settings(max_examples=100, deadline=None, database=None)
    @given(n=sizes, kind=kinds, data=st.integers(0, 2**32 - 1), stream=streams)
    @example(n=1, kind="bad", data=0, stream={"seed": 0, "step": 0, "stream": 0})
    @example(n=4999, kind="bad", data=0, stream={"seed": 2**63 - 1, "step": 2**32 - 1, "stream": 2**32 - 1})
    @example(n=4992, kind="ties", data=0, stream={"seed": 1, "step": 2, "stream": 3})
    @example(n=300, kind="subnormal", data=0, stream={"seed": 1, "step": 2, "stream": 3})
    @example(n=300, kind="huge", data=0, stream={"seed": 1, "step": 2, "stream": 3})
    def check(n, kind, data, stream):
        x = numbers(n, kind, map, data)
        how = {"map": map, "stochastic": stochastic, **stream}
        assert_same(block_outputs(path, x, **how), block_outputs(codec_reference, x, **how))

    check()


@pytest.mark.parametrize("map", ["linear", "square"])
@pytest.mark.parametrize("stochastic", ROUNDINGS)
def test_rank1(path, map, stochastic):
    @settings(max_examples=100, deadline=None, database=None)
    @given(n=sizes, width=st.integers(1, 300), kind=kinds, data=st.integers(0, 2**32 - 1), stream=streams)
    @example(n=4999, width=1, kind="bad", data=0, stream={"seed": 0, "step": 0, "stream": 0})
    @example(n=4999, width=4999, kind="normal", data=0, stream={"seed": 0, "step": 0, "stream": 0})
    @example(n=4999, width=127, kind="bad", data=0, stream={"seed": 2**63 - 1, "step": 2**32 - 1, "stream": 9})
    def check(n, width, kind, data, stream):
        width = min(width, n)
        x = numbers(n // width * width, kind, map, data).view(-1, width)
        how = {"map": map, "stochastic": stochastic, **stream}
        assert_same(rank1_outputs(path, x, **how), rank1_outputs(codec_reference, x, **how))

    check()


@pytest.mark.parametrize("map", ["de", "linear", "square"])
@pytest.mark.parametrize("stochastic", ROUNDINGS)
def test_chunks_and_threads_leave_no_trace(path, map, stochastic, two_threads):
    how = {"map": map, "stochastic": stochastic, "seed": 3, "step": 4, "stream": 5}
    for kind in ("decades", "bad"):
        x = numbers(151 * 499, kind, map, 1)
        assert_same(block_outputs(path, x, **how), block_outputs(codec_reference, x, **how))
        if map == "de":
            continue
        for width in (3, 499, 75_349):
            matrix = x[: x.numel() // width * width].view(-1, width)
            assert_same(rank1_outputs(path, matrix, **how), rank1_outputs(codec_reference, matrix, **how))


def test_a_slice_at_an_odd_address_is_read_as_it_is(path):
    x = numbers(1000, "normal", "de", 2)
    for first in (1, 2, 3):
        part = x[first:]
        expected = block_outputs(codec_reference, part.clone(), map="de")
        assert_same(block_outputs(path, part, map="de"), expected)


def test_a_missing_numba_is_a_reason_with_a_cure(monkeypatch):
    module = importlib.import_module("sharpscope.kernels.codec_numba")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "pip install numba" in module.why_unavailable()


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    numba = pytest.importorskip("numba")
    module = importlib.import_module("sharpscope.kernels.codec_numba")
    njit, asked = numba.njit, []

    def no_cache(loop, **options):
        asked.append(options.pop("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(loop, **options)

    monkeypatch.setattr(numba, "njit", no_cache)
    out = np.empty(256, np.float32)
    module.compiled.__wrapped__(module.spread_blocks)(np.array([2, 3], np.float32), out)
    assert asked == [True, False]
    assert out.tolist() == [2] * 128 + [3] * 128


@pytest.mark.gpu
@pytest.mark.parametrize("map", ["de", "linear", "square"])
@pytest.mark.parametrize("stochastic", ROUNDINGS)
def test_torch_operations_on_a_gpu(map, stochastic):
    """The path of a GPU without CuPy, with every wait for the device forbidden."""
    module = importlib.import_module("sharpscope.kernels.codec_torch")
    how = {"map": map, "stochastic": stochastic, "seed": 3, "step": 4, "stream": 5}
    for kind in ("decades", "ties", "subnormal", "huge", "bad"):
        x = numbers(100_001, kind, map, 1)
        expected, on_device = block_outputs(codec_reference, x, **how), x.cuda()
        codes, scales = torch.empty(50_001, dtype=torch.uint8, device="cuda"), torch.empty(782, device="cuda")
        bad, out = torch.full((1,), 5, device="cuda"), torch.empty(100_001, device="cuda")
        try:
            for _ in range(2):  # tables are copied to the device once
                bad.fill_(5)
                module.quantize_block(on_device, codes, scales, bad, **how)
                module.dequantize_block(codes, scales, out, map=map)
                torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = {"codes": codes, "scales": scales, "bad": bad, "decoded": out}
        assert_same({name: value.cpu() for name, value in found.items()}, expected)
