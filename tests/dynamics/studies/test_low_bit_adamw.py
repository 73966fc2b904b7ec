"""The cheap parts of the study of 4-bit states, and the codec that it takes apart."""

import math

import pytest
import torch
from sharpscope.dynamics.studies.dynamic_exponents import TableCodec, dynamic_exponents
from sharpscope.dynamics.studies.low_bit_adamw import DIGITS_VARIANTS, digits_run, frozen_codes, second_moment_map
from sharpscope.dynamics.studies.low_bit_codec import memory, round_trip, scales_of_a_matrix, stochastic_means
from sharpscope.kernels import dequantize, quantize_v
from sharpscope.kernels.codec_tables import VALUES


def test_dynamic_exponents_are_those_of_the_kernels():
    values = torch.tensor(dynamic_exponents(4, signed=True), dtype=torch.float32)
    torch.testing.assert_close(values, torch.from_numpy(VALUES["de"].copy()), rtol=1e-6, atol=0)


def test_unsigned_dynamic_exponents_have_two_small_values_a_decade_below_the_next():
    values = dynamic_exponents(4, signed=False)
    assert len(values) == 16
    assert values[:5] == pytest.approx([0, 0.00325, 0.00775, 0.02125, 0.04375])
    assert values[-2:] == pytest.approx([0.94375, 1])
    assert min(second_moment_map("DE-0")) == pytest.approx(0.00325)
    assert second_moment_map("DE-0")[1:] == second_moment_map("DE")[1:]


def test_eight_bits_have_two_hundred_and_fifty_six_values():
    for signed in (True, False):
        values = dynamic_exponents(8, signed=signed)
        assert len(set(values)) == 256
        assert max(values) == 1


def test_a_table_of_the_linear_map_encodes_as_the_kernels_do():
    x = torch.rand(300, generator=torch.Generator().manual_seed(0))
    codec = TableCodec(tuple(float(value) for value in VALUES["linear"]))
    decoded = codec.decode(codec.encode(x, step=1, id=0), x.shape, torch.float32)
    torch.testing.assert_close(decoded, dequantize(quantize_v(x, scale="block128")))


def test_a_block_of_zeros_decodes_to_zeros():
    codec = TableCodec(second_moment_map("DE-0"))
    x = torch.zeros(3, 50)
    assert torch.equal(codec.decode(codec.encode(x, step=1, id=0), x.shape, torch.float32), x)


def test_a_zero_code_in_the_second_moment_destroys_training_and_nothing_else_does():
    steps = 100
    zero = digits_run(DIGITS_VARIANTS["DE with zero"], 0, steps)
    assert zero["loss"] is None
    assert zero["failed_at"] < steps
    plain = digits_run(DIGITS_VARIANTS["AdamW, float32"], 0, steps)
    for name in ("DE without zero", "rank-1, linear", "factored"):
        run = digits_run(DIGITS_VARIANTS[name], 0, steps)
        assert run["loss"] < 0.05
        assert abs(run["accuracy"] - plain["accuracy"]) < 0.02  # seven images


def test_the_codec_obeys_its_bounds():
    found = round_trip(20_000)
    assert found["differ"] == 0
    assert 0.11 < found["m"] <= 0.1125 + 1e-7
    assert 0.031 < found["v"] <= 1 / 32 + 1e-7
    assert 0.06 < found["v_small"] <= 1 / 16 + 1e-7


def test_the_bytes_are_those_of_the_formulas():
    found = memory([[1024, 1024], [100, 300]])
    for row in found.values():
        assert row["kept"] == row["expected"]
    assert found["AdamW"]["whole"] / found["rank1"]["whole"] > 7.4


def test_rank_1_scales_follow_columns():
    columns = scales_of_a_matrix("columns")
    assert 2 * columns["rank1"] < columns["block128"]
    rows = scales_of_a_matrix("rows")
    assert rows["rank1"] == pytest.approx(rows["block128"], rel=0.1)


def test_stochastic_rounding_keeps_means_inside_the_map_only():
    means = stochastic_means(100_000)
    for value in (0.3, -0.5, 0.02):
        assert means[str(value)] == pytest.approx(value, abs=5 * 0.1125 / math.sqrt(100_000))
    assert means["-0.95"] == pytest.approx(-0.8875)


def test_nearest_rounding_freezes_the_codes_of_a_slow_average():
    slow, fast = (frozen_codes(beta2, "nearest", 200) for beta2 in (0.999, 0.95))
    stochastic = frozen_codes(0.999, "stochastic", 200)
    assert slow["changed"] < 1e-3 < fast["changed"]
    assert stochastic["changed"] > 10 * slow["changed"]
    assert stochastic["end"] > slow["end"]
