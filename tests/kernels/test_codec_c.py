"""The codec in C against its definition, byte for byte, in both of its forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sharpscope.kernels import _native, codec_c, codec_reference
from sharpscope.kernels.codec_tables import DE_THRESHOLDS, VALUES

F32 = np.float32
MAPS = ("de", "linear", "square")
ROUNDINGS = ({}, {"stochastic": True, "seed": 2**63 + 12345, "step": 2**32 - 1, "stream": 7})
SIZES = (1, 2, 3, 31, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 640, 699)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Skips where there is none."""
    reason = codec_c.why_unavailable()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def compiled(compiled_as):
    """The codec with the instructions of this processor, or as plain loops, chosen by the test's parameters."""
    return compiled_as("codec")


@pytest.fixture(autouse=True)
def many_ranges(monkeypatch):
    """Every block is worth a thread."""
    monkeypatch.setattr(codec_c, "_GRAIN", 1)


def quantized(path, x, map, **rounding):
    """Codes, scales, count and decoded values of a flat x; what is to be written holds nonsense before."""
    n = x.numel()
    codes = torch.full((-(-n // 2),), 0xAB, dtype=torch.uint8)
    scales, bad, out = torch.full((-(-n // 128),), -7.0), torch.ones(1, dtype=torch.int64), torch.full((n,), -7.0)
    path.quantize_block(x, codes, scales, bad, map=map, **rounding)
    path.dequantize_block(codes, scales, out, map=map)
    return codes, scales, bad, out


def quantized_rank1(path, x, map, **rounding):
    codes = torch.full((-(-x.numel() // 2),), 0xAB, dtype=torch.uint8)
    rows, columns = torch.full((x.shape[0],), -7.0), torch.full((x.shape[1],), -7.0)
    bad, out = torch.ones(1, dtype=torch.int64), torch.full_like(x, -7.0)
    path.quantize_rank1(x, codes, rows, columns, bad, map=map, **rounding)
    path.dequantize_rank1(codes, rows, columns, out, map=map)
    return codes, rows, columns, bad, out


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def check(x, map, rounding, widths=()):
    x = torch.from_numpy(np.asarray(x, F32))
    assert_same_bits(quantized(codec_c, x, map, **rounding), quantized(codec_reference, x, map, **rounding))
    for width in widths:
        matrix = x.view(-1, width)
        found, expected = (quantized_rank1(path, matrix, map, **rounding) for path in (codec_c, codec_reference))
        assert_same_bits(found, expected)


def values(rng, n, map, size):
    x = rng.standard_normal(n) * size
    return (x if map == "de" else np.abs(x)).astype(F32)


def divisors(n):
    return [width for width in range(1, n + 1) if n % width == 0]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["nearest", "stochastic"])
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.usefixtures("compiled")
class TestParity:
    @pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-20, 1.0, 1e37])
    def test_sizes(self, map, rounding, size):
        rng = np.random.default_rng(0)
        for n in SIZES:
            check(values(rng, n, map, size), map, rounding, divisors(n)[:3] + divisors(n)[-3:])

    def test_ties_and_their_neighbours(self, map, rounding):
        """Where a code ends: thresholds, map values, and the floats on both sides of each."""
        ends = np.concatenate([DE_THRESHOLDS, VALUES[map], (np.arange(33, dtype=F32) / 32) ** 2, np.arange(33) / 32])
        ends = ends.astype(F32)
        x = np.concatenate([ends, np.nextafter(ends, F32(2)), np.nextafter(ends, F32(-2)), -ends])
        x = np.clip(x if map == "de" else np.abs(x), -1, 1)
        for scale in (1.0, 2.0**-120, 3.0):
            blocks = np.concatenate([np.append(x[i : i + 127], F32(1)) for i in range(0, x.size, 127)]) * F32(scale)
            check(blocks, map, rounding, [1, blocks.size])

    def test_entries_that_the_map_cannot_represent(self, map, rounding):
        rng = np.random.default_rng(1)
        for strange in (np.nan, -np.nan, np.inf, -np.inf, -1.0, -0.0, -1e-45):
            for at in (0, 127, 128, 640):
                x = values(rng, 644, map, 1.0)
                x[at] = strange
                check(x, map, rounding, [1, 4, 23, 161, 644])

    def test_zeros(self, map, rounding):
        check(np.zeros(301), map, rounding, [1, 7, 43, 301])

    def test_number_of_threads(self, map, rounding):
        x = torch.from_numpy(values(np.random.default_rng(2), 1311, map, 1.0))
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append((*quantized(codec_c, x, map, **rounding),))
                results[-1] += (*quantized_rank1(codec_c, x.view(57, 23), map, **rounding),)
        finally:
            torch.set_num_threads(threads)
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])

    def test_nothing_is_written_beyond_the_end(self, map, rounding):
        for n in (1, 2, 129, 200):
            x = torch.from_numpy(values(np.random.default_rng(3), n, map, 1.0))
            room, scales = torch.full((n,), 0xAB, dtype=torch.uint8), torch.full((9,), -7.0)
            bad, blocks = torch.zeros(1, dtype=torch.int64), -(-n // 128)
            codec_c.quantize_block(x, room[: -(-n // 2)], scales[:blocks], bad, map=map, **rounding)
            assert (room[-(-n // 2) :] == 0xAB).all()
            assert (scales[blocks:] == -7).all()


@settings(max_examples=60, deadline=None)
@given(
    x=arrays(F32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    map=st.sampled_from(MAPS),
    rounding=st.sampled_from(ROUNDINGS),
    data=st.data(),
)
def test_any_floats(x, map, rounding, data):
    check(x, map, rounding, [data.draw(st.sampled_from(divisors(x.size)))])


def test_philox_counters_above_32_bits():
    """The group of an element is a 64-bit count; a lower half alone would repeat."""
    library = _native.library("codec")
    noise = codec_c._noise(True, 99, 3, 4)
    first = 2**32 // 32  # blocks of 32 groups
    x = torch.rand(128)
    codes, scales, bad = torch.empty(64, dtype=torch.uint8), torch.empty(1), torch.zeros(1, dtype=torch.int64)
    far = [pointer(t, first * size) for t, size in ((x, 512), (codes, 64), (scales, 4))]
    long = codec_c._long
    library.codec_quantize_block(
        far[0], long((first + 1) * 128), 1, noise, long(first), long(first + 1), far[1], far[2], codec_c._at(bad)
    )
    words = philox(0, 1, 3, 4, 99)
    u = F32(words[0] >> 8) * F32(2.0**-24)
    y = x.numpy()[0] * (F32(1) / scales.numpy()[0])
    low = max(int(np.floor(y * 16)), 1) - 1
    up = low < 15 and u * F32(1 / 16) < y - VALUES["linear"][low]
    assert int(codes[0]) & 15 == low + up


def pointer(tensor, offset):
    """As if `tensor` lay `offset` bytes into a larger one."""
    return type(codec_c._at(tensor))(tensor.data_ptr() - offset)


def philox(c0, c1, c2, c3, key):
    """Philox4x32-10 of one counter."""
    mask, k0, k1 = 0xFFFFFFFF, key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
