"""The claims on learned rounding that are cheap to check, and the experiments behind them."""

import itertools

import pytest
import torch
from sharpscope.dynamics.optimizers.weight_grid import WeightGrid
from sharpscope.dynamics.studies import sign_round as study
from sharpscope.dynamics.studies.laboratory import Laboratory
from sharpscope.dynamics.studies.rounding_experiments import (
    best_of_all,
    block_and_inputs,
    rounded_block,
    rounding_landscape,
    row_roundings,
    update_rules,
)


def test_the_inputs_are_correlated_and_some_channels_stand_out():
    _, X, held_out = block_and_inputs(0)
    assert X.shape == (2048, 64)
    assert held_out.shape == (1024, 64)
    spread = X.std(0)
    assert int((spread > 4 * spread.median()).sum()) == 3
    correlation = torch.corrcoef(X.T) - torch.eye(64)
    assert float(correlation.abs().max()) > 0.3


def test_a_block_is_rounded_better_than_to_nearest():
    bits = 3
    found = rounded_block(bits, True, seed=0)
    assert found["ratio"] <= 0.6
    assert found["held_out"] <= 0.6
    assert found["best"] <= 1
    assert found["best"] == min(found["curve"])
    assert found["curve"][0] == 1
    assert found["max_offset"] <= 0.5025 + 1e-6
    assert found["exact"]
    # Groups of 32 with a scale of 16 bits and a zero point each; rows of the narrow layer fill their bytes.
    assert found["bits_per_weight"] == pytest.approx(bits + 16 / 32 + bits / 32, abs=0.1)


def test_the_scale_of_the_loss_does_not_matter():
    found = update_rules(4, seed=0, iterations=10)
    assert found["moved"] == 0
    assert found["sign"] < 1
    assert found["Adam 1"] < 1


def test_the_best_of_all_roundings_by_hand():
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(10, 3, generator=gen, dtype=torch.float64)
    W = torch.randn(1, 3, generator=gen, dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    s, z = WeightGrid(2, -1).scales(W, ones, ones)
    errors = []
    for way in itertools.product((torch.floor, torch.ceil), repeat=3):
        q = torch.stack([f(w) for f, w in zip(way, (W / s)[0], strict=True)])
        e = s * ((q + z).clamp(0, 3) - z) - W
        errors.append(float((X @ e.T).square().mean()))
    assert best_of_all(X, W, 2) == pytest.approx(min(errors), rel=1e-12)


def test_rows_lie_between_the_best_and_nearest():
    for seed in range(2):
        found = row_roundings(3, False, seed)
        assert 1 - 1e-9 <= found["best"] <= found["nearest"]
        straight = row_roundings(3, True, seed)
        assert straight["best"] == pytest.approx(1)
        assert straight["flips best"] == 0


def test_the_line_starts_at_nearest_and_the_loss_is_nearly_quadratic_at_four_bits():
    found = rounding_landscape(4, 0, 5)
    assert found["place"] == pytest.approx([-0.5, 0, 0.5, 1, 1.5])
    assert found["loss"][1] == pytest.approx(1)
    assert found["loss"][3] == pytest.approx(found["learned loss"] / found["nearest loss"])
    assert found["loss"][3] < 0.7
    assert found["nearest quadratic"] == pytest.approx(1, abs=0.05)
    assert found["learned length"] > found["nearest length"]


def test_claims_of_the_short_version():
    claims, panel = study._all_roundings(Laboratory(quick=True))
    assert claims[0].holds
    assert claims[2].holds
    assert len(panel.lines) == 3
