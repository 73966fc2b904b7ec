"""The definition of the codec against closed forms and statistics that share no code with it."""

import numpy as np
import pytest
import torch
from sharpscope.kernels import codec_reference, codec_tables
from sharpscope.kernels.adamw4 import adamw4_state

F32 = np.float32
TINY = 2.0**-126


def encoded(x, map, **rounding):
    """(codes [n], scales, bad) of a flat x."""
    x = torch.as_tensor(np.asarray(x, F32))
    packed, scales = torch.empty(-(-x.numel() // 2), dtype=torch.uint8), torch.empty(-(-x.numel() // 128))
    bad = torch.zeros(1, dtype=torch.int64)
    codec_reference.quantize_block(x, packed, scales, bad, map=map, **rounding)
    codes = np.stack([packed.numpy() & 15, packed.numpy() >> 4], axis=1).reshape(-1)
    return codes[: x.numel()], scales.numpy(), int(bad)


def there_and_back(x, map, **rounding):
    x = torch.as_tensor(np.asarray(x, F32))
    packed, scales = torch.empty(-(-x.numel() // 2), dtype=torch.uint8), torch.empty(-(-x.numel() // 128))
    codec_reference.quantize_block(x, packed, scales, torch.zeros(1, dtype=torch.int64), map=map, **rounding)
    out = torch.empty_like(x)
    codec_reference.dequantize_block(packed, scales, out, map=map)
    return out.numpy()


def rank1_there_and_back(x, map):
    x = torch.as_tensor(x)
    packed, rows, columns = torch.empty(-(-x.numel() // 2), dtype=torch.uint8), *empty_scales(x.shape)
    codec_reference.quantize_rank1(x, packed, rows, columns, torch.zeros(1, dtype=torch.int64), map=map)
    out = torch.empty_like(x)
    codec_reference.dequantize_rank1(packed, rows, columns, out, map=map)
    return out.numpy()


def empty_scales(shape):
    """For rows and columns."""
    return [torch.empty(size) for size in shape]


def unit_blocks(values):
    """Values with a 1 at the head of every 127 of them, so that all scales are 1."""
    values = np.asarray(values, F32)
    padded = np.zeros(-(-values.size // 127) * 127, F32)
    padded[: values.size] = values
    return np.concatenate([np.ones((padded.size // 127, 1), F32), padded.reshape(-1, 127)], axis=1).reshape(-1)


def of_values(blocks, n):
    return blocks.reshape(-1, 128)[:, 1:].reshape(-1)[:n]


def relative_rmse(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sqrt(((a - b) ** 2).sum() / (b**2).sum())


# The maps.


def test_the_de_map_follows_from_its_construction():
    """10^-E times the midpoints of [0.1, 1] cut into 2^F parts, F = 2 − E, both signs, and 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(3):
        edges = np.linspace(0.1, 1, 2 ** (2 - exponent) + 1)
        middles = 10.0**-exponent * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *-middles]
    assert codec_tables.VALUES["de"].tolist() == np.sort(values).round(6).astype(F32).tolist()
    assert codec_tables.VALUES["de"][7] == 0


def test_the_de_map_is_within_a_unit_of_the_one_of_the_paper():
    """There the numbers come from a float32 linspace; these bits are its entries 3, 5, 9 and 11."""
    theirs = np.array([0xBE599999, 0xBD051EB9, 0x3D051EB9, 0x3E599999], np.uint32)
    ours = codec_tables.VALUES["de"][[3, 5, 9, 11]].view(np.uint32)
    assert (np.abs(ours.astype(np.int64) - theirs) <= 1).all()


def test_second_moments_have_no_zero():
    k = np.arange(1, 17) / 16
    assert codec_tables.VALUES["linear"].tolist() == k.tolist()
    assert codec_tables.VALUES["square"].tolist() == (k**2).tolist()


@pytest.mark.parametrize(
    ("code", "threshold"),
    [
        (0, "-0x1.8cccccp-1"),
        (3, "-0x1.28f5c4p-3"),
        (6, "-0x1.6872b0p-9"),
        (7, "0x1.6872b0p-9"),
        (8, "0x1.374bc6p-6"),
        (11, "0x1.4cccccp-2"),
        (14, "0x1.e33334p-1"),
    ],
)
def test_a_tie_goes_to_the_lower_code(code, threshold):
    tie = F32(float.fromhex(threshold))
    x = unit_blocks([np.nextafter(tie, F32(-2)), tie, np.nextafter(tie, F32(2))])
    assert encoded(x, "de")[0][1:4].tolist() == [code, code, code + 1]


def test_linear_codes_are_rounded_sixteenths():
    y = np.arange(4097) / 4096
    codes = of_values(encoded(unit_blocks(y), "linear")[0], y.size)
    assert codes.tolist() == [min(max(round(16 * value), 1), 16) - 1 for value in y.tolist()]


def test_square_codes_are_rounded_sixteenths_of_the_root():
    root = np.arange(1025) / 1024
    codes = of_values(encoded(unit_blocks(root**2), "square")[0], root.size)
    assert codes.tolist() == [min(max(round(16 * value), 1), 16) - 1 for value in root.tolist()]


def test_the_earlier_code_is_in_the_low_nibble_and_the_spare_one_is_of_a_zero():
    for map, x, expected in (("de", [1.0, -1.0, 0.0325], [0x0F, 0x79]), ("linear", [1.0, 0.5, 0.25], [0x7F, 0x03])):
        packed = torch.empty(2, dtype=torch.uint8)
        codec_reference.quantize_block(
            torch.tensor(x), packed, torch.empty(1), torch.zeros(1, dtype=torch.int64), map=map
        )
        assert packed.tolist() == expected


# Errors.


def test_errors_keep_their_bounds():
    rng = np.random.default_rng(0)
    y = rng.uniform(-1, 1, 1_000_000).astype(F32)
    nearest = np.abs(of_values(there_and_back(unit_blocks(y), "de"), y.size) - y)
    assert 0.1124 < nearest.max() <= 0.1125 + 1e-7
    random = np.abs(of_values(there_and_back(unit_blocks(y), "de", stochastic=True), y.size) - y)
    assert 0.2240 < random.max() <= 0.225 + 1e-7
    v = np.abs(y)
    for rounding, bound in ({}, 1 / 32), ({"stochastic": True}, 1 / 16):
        back = of_values(there_and_back(unit_blocks(v), "linear", **rounding), y.size)
        assert np.abs(back - v)[v >= 1 / 16].max() <= bound
        assert np.abs(back - v).max() <= 1 / 16
        assert (back >= v)[v < 1 / 16].all()  # the safe side: steps get shorter
    back = of_values(there_and_back(unit_blocks(v), "linear"), y.size)
    ratio = (back / v)[v >= 1 / 16]
    assert 2 / 3 - 1e-6 < ratio.min() < 0.667  # of √v between 0.816 and 1.155
    assert 1.332 < ratio.max() < 4 / 3 + 1e-6
    back = of_values(there_and_back(unit_blocks(v), "square"), y.size)
    assert np.abs(np.sqrt(back) - np.sqrt(v))[v >= 1 / 256].max() <= 1 / 32 + 1e-7
    assert 0.0614 < np.abs(back - v).max() <= 1 - (31 / 32) ** 2 + 1e-7


def test_errors_of_normal_blocks():
    x = np.random.default_rng(1).standard_normal(128 * 4000).astype(F32)
    assert relative_rmse(there_and_back(x, "de"), x) == pytest.approx(0.149, abs=0.002)
    assert relative_rmse(there_and_back(x * x, "linear"), x * x) == pytest.approx(0.182, abs=0.002)


def test_linear_and_square_codes_survive_a_second_encoding():
    v = np.random.default_rng(2).standard_normal(128 * 500).astype(F32) ** 2
    for map in ("linear", "square"):
        once = there_and_back(v, map)
        assert encoded(once, map)[0].tolist() == encoded(v, map)[0].tolist()
        assert np.array_equal(there_and_back(once, map), once)


def test_a_negative_extreme_shrinks_at_every_encoding():
    """−1 is missing from the map: of a block whose largest entry is negative 0.8875 of the scale is left."""
    x = np.random.default_rng(3).standard_normal((4000, 128)).astype(F32)
    before = np.abs(x).max(axis=1)
    after = np.abs(there_and_back(x.reshape(-1), "de").reshape(x.shape)).max(axis=1)
    shrunk = after < 0.99 * before
    assert np.allclose(after[shrunk], 0.8875 * before[shrunk], rtol=1e-6)
    assert np.array_equal(after[~shrunk], before[~shrunk])
    negative = -x.min(axis=1) > x.max(axis=1)
    assert shrunk[negative & (x.max(axis=1) < 0.94 * before)].all()
    assert not shrunk[~negative].any()
    assert 0.35 < shrunk.mean() < 0.45


# Scales.


def test_zeros_decode_to_zeros():
    for map, zero in (("de", 7), ("linear", 0), ("square", 0)):
        x = np.zeros(300, F32)
        x[130] = 1  # the second of three blocks
        codes, scales, bad = encoded(x, map)
        assert scales.tolist() == [0, 1, 0]
        assert set(codes[:128]) == set(codes[256:]) == {zero}
        assert bad == 0
        back = there_and_back(x, map)
        assert not back[:128].any()
        assert not back[256:].any()
    assert not rank1_there_and_back(np.zeros((3, 5), F32), "linear").any()


def test_blocks_of_subnormals_are_flushed_and_larger_ones_are_not():
    x = np.full(384, 1e-42, F32)
    x[128], x[256] = TINY, np.nextafter(F32(TINY), F32(0))
    codes, scales, _ = encoded(x, "linear")
    assert scales.tolist() == [0, TINY, 0]
    assert codes[128] == 15
    back = there_and_back(x, "linear")
    assert not back[:128].any()
    assert (back[128:256] > 0).all()  # without a zero in the map, and subnormal
    assert back[129] == F32(TINY / 16)


def test_the_largest_numbers_have_a_subnormal_reciprocal():
    x = np.array([3.4e38, 1.7e38, -3.4e38], F32)
    assert encoded(x, "de")[0].tolist() == [15, 12, 0]
    assert encoded(np.abs(x), "linear")[0].tolist() == [15, 7, 15]


@pytest.mark.parametrize("map", ["de", "linear", "square"])
def test_the_unit_of_the_gradients_does_not_matter(map):
    x = np.random.default_rng(4).standard_normal(128 * 300).astype(F32)
    power, factor = (1, 1e-4) if map == "de" else (2, 1e-8)
    x = x if map == "de" else x * x
    codes, scales, _ = encoded(x, map)
    small_codes, small_scales, _ = encoded(x * F32(2.0**-13) ** power, map)
    assert np.array_equal(codes, small_codes)
    assert np.array_equal(scales * F32(2.0**-13) ** power, small_scales)
    small = x * F32(factor)
    error = relative_rmse(there_and_back(x, map), x)
    assert relative_rmse(there_and_back(small, map), small) == pytest.approx(error, rel=1e-4)


def test_a_bad_entry_spoils_its_block_only_and_is_counted():
    x = np.random.default_rng(5).random(1000).astype(F32)
    spoilt = x.copy()
    spoilt[[130, 131, 300, 700]] = np.nan, np.inf, -np.inf, -1e-30
    for map, expected in (("linear", {1, 2, 5}), ("de", {1, 2})):
        codes, scales, bad = encoded(spoilt, map)
        clean_codes, clean_scales, _ = encoded(x, map)
        others = [b for b in range(8) if b not in expected]
        assert bad == len(expected)
        assert set(np.flatnonzero(np.isnan(scales))) == expected
        entries = np.concatenate([np.arange(128 * b, min(128 * b + 128, 1000)) for b in others])
        if map == "linear":
            assert np.array_equal(codes[entries], clean_codes[entries])
            assert np.array_equal(scales[others], clean_scales[others])


def test_a_bad_row_stays_out_of_the_column_maxima():
    x = torch.tensor([[1.0, 2.0, 3.0], [8.0, torch.nan, 9.0], [2.0, 1.0, 1.0]])
    codes, rows, columns = torch.empty(5, dtype=torch.uint8), *empty_scales((3, 3))
    bad = torch.zeros(1, dtype=torch.int64)
    codec_reference.quantize_rank1(x, codes, rows, columns, bad, map="linear")
    assert (int(bad), columns.tolist()) == (1, [2, 2, 3])
    assert rows[[0, 2]].tolist() == [3, 2]
    assert rows[1].isnan()


def test_rank1_scales_are_the_smaller_maximum():
    x = np.array([[4.0, 1.0], [2.0, 8.0]], F32)
    # scales [[4, 4], [4, 8]], so that y = [[1, 1/4], [1/2, 1]] is in the map
    assert np.array_equal(rank1_there_and_back(x, "linear"), x)
    outer = np.outer([1.0, 0.5, 0.25], [2.0, 1.0, 8.0]).astype(F32)
    row = outer[:1]
    assert np.array_equal(rank1_there_and_back(row, "linear"), row)  # every column's maximum is its entry


def test_rank1_follows_columns_and_block_scales_do_not():
    rng = np.random.default_rng(6)
    x, decades = rng.random((512, 512)) ** 8, 10 ** np.linspace(-3, 3, 512)
    for factor, ratio in ((decades[None, :], (2, 8)), (decades[:, None], (0.8, 1.2))):
        v = (x * factor).astype(F32)
        normal = v >= TINY
        block = np.median(np.abs(there_and_back(v.reshape(-1), "linear").reshape(v.shape)[normal] / v[normal] - 1))
        rank1 = np.median(np.abs(rank1_there_and_back(v, "linear")[normal] / v[normal] - 1))
        assert ratio[0] < block / rank1 < ratio[1]


def test_bytes_of_the_states():
    block = adamw4_state(torch.empty(1024, 1024), scale="block128")
    assert block.nbytes == 1.0625 * 2**20
    rank1 = adamw4_state(torch.empty(1024, 1024), scale="rank1")
    assert rank1.nbytes == (1.03125 + 4 * 2048 / 2**20) * 2**20
    assert 8 * 2**20 / block.nbytes > 7.4
    assert adamw4_state(torch.empty(5)).nbytes == 2 * (3 + 4)


# Stochastic rounding.


def philox_words(counter, key):
    """Ten rounds of Philox4x32 on Python's integers."""
    (a, b, c, d), (k, l) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ l, p % 2**32
        k, l = (k + 0x9E3779B9) % 2**32, (l + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_gives_the_known_answers_of_random123(counter, key, words):
    assert philox_words(counter, key) == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(
    ("seed", "step", "stream"), [(0, 0, 0), (0x299F31D0A4093822, 0x13198A2E, 0x03707344), (2**63 - 1, 2**32 - 1, 5)]
)
def test_the_random_words_are_those_of_philox(seed, step, stream):
    words = codec_reference.philox(40, seed=seed, step=step, stream=stream)
    key = [seed % 2**32, seed >> 32]
    assert words.tolist() == [philox_words([group, 0, step, stream], key) for group in range(40)]
    u = codec_reference.uniform(158, seed=seed, step=step, stream=stream)
    assert u.tolist() == [(word >> 8) / 2**24 for word in words.reshape(-1)[:158].tolist()]


def test_stochastic_rounding_has_the_right_mean():
    for value in (0.3, -0.5, 0.02):
        back = of_values(there_and_back(unit_blocks(np.full(200_000, value)), "de", stochastic=True), 200_000)
        assert len(np.unique(back)) == 2
        assert back.mean(dtype=np.float64) == pytest.approx(value, abs=1e-3)
    below = of_values(there_and_back(unit_blocks(np.full(1000, -0.95)), "de", stochastic=True), 1000)
    assert set(below.tolist()) == {float(F32(-0.8875))}  # nothing lies below: a bias that is documented


@pytest.mark.parametrize("map", ["de", "linear", "square"])
def test_stochastic_rounding_is_unbiased_to_its_standard_error(map):
    table = codec_tables.VALUES[map].astype(np.float64)
    y = np.random.default_rng(7).uniform(table[0], 1, 127).astype(F32)
    repeats = 4000
    back = of_values(there_and_back(unit_blocks(np.tile(y, repeats)), map, stochastic=True, seed=1), 127 * repeats)
    above = np.searchsorted(table, y, side="right")
    sd = np.sqrt((table[above] - y) * (y - table[above - 1]))
    z = (back.reshape(repeats, 127).mean(axis=0, dtype=np.float64) - y) / (sd / np.sqrt(repeats))
    assert 0.6 < (z**2).mean() < 1.5  # 127 squares of standard normal numbers: 1 ± 0.125
    assert np.abs(z).max() < 4.5
    assert abs(z.mean()) < 4 / np.sqrt(127)


def second_moments(beta2, steps, rounding, *, permuted, blocks=16):
    """(rate of code changes, correlation of log v with the log of the true variances) of gradients of fixed variances.

    v begins at the variances of other entries where `permuted`, else at its stationary value.
    """
    rng = np.random.default_rng(8)
    variance = np.exp(rng.standard_normal(128 * blocks))
    start = rng.permutation(variance) if permuted else variance
    v = there_and_back(start, "linear")
    codes, changes = encoded(v, "linear")[0], 0
    for step in range(steps):
        v = beta2 * v + (1 - beta2) * variance * rng.standard_normal(variance.size) ** 2
        new = encoded(v, "linear", step=step, **rounding)[0]
        v = there_and_back(v, "linear", step=step, **rounding)
        changes += int((new != codes).sum())
        codes = new
    return changes / steps / codes.size, np.corrcoef(np.log(v), np.log(variance))[0, 1]


def test_nearest_rounding_freezes_and_stochastic_rounding_does_not():
    """An increment below half a code's width, (1 − β₂) g² < s/32, leaves no trace."""
    rates = [second_moments(beta2, 100, {}, permuted=False)[0] for beta2 in (0.95, 0.99, 0.999)]
    assert rates[0] > 10 * rates[1] > 0
    assert rates[2] < 1e-4
    assert second_moments(0.999, 100, {"stochastic": True}, permuted=False)[0] > 1e-3
    frozen = second_moments(0.999, 1500, {}, permuted=True)[1]
    following = second_moments(0.999, 1500, {"stochastic": True}, permuted=True)[1]
    assert frozen < 0.35
    assert following > frozen + 0.2
