"""Runs with the same random numbers: equal on equal data, and apart by what the data says."""

import pytest
import torch
from sharpscope.dynamics.coupled_runs import coupled_runs
from sharpscope.dynamics.optimizers.heavy_tailed import HeavyTailedSGD
from torch import nn


def noisy(model):
    return HeavyTailedSGD(model.parameters(), lr=0.1, alpha=1.5, sigma=0.3, seed=4)


def pull(target):
    return lambda model: 0.5 * (model.weight - target).square().sum()


def test_the_same_loss_keeps_them_together():
    """Dropout draws from torch's generator, which both runs must see in the same state."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(20, 3, dtype=torch.float64)

    def loss(model):
        return nn.functional.dropout(model(x), 0.5).square().mean()

    before = [p.clone() for p in model.parameters()]
    found = coupled_runs(model, (loss, loss), noisy, 5)
    assert found == {"step": [1, 2, 3, 4, 5], "distance": [0.0] * 5}
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_shifted_quadratics_part_as_predicted():
    """θ' − θ = c (1 − (1 − η)^k) in every coordinate, whatever the noise."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    found = coupled_runs(model, (pull(0.0), pull(0.5)), noisy, 30, every=10)
    assert found["step"] == [10, 20, 30]
    expected = [0.5 * 2**0.5 * (1 - 0.9**k) for k in (10, 20, 30)]
    assert found["distance"] == pytest.approx(expected, rel=1e-9)


def test_own_distance_and_refusal():
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    found = coupled_runs(
        model, (pull(0.0), pull(1.0)), noisy, 2, distance=lambda one, other: (other.weight - one.weight).tolist()
    )
    assert found["distance"][0] == [pytest.approx([0.1, 0.1])]
    with pytest.raises(ValueError, match="at least 1"):
        coupled_runs(model, (pull(0.0), pull(1.0)), noisy, 0)
