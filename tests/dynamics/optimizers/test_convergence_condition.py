"""The sufficient condition: polynomial schedules against the published table, ratios against integrals."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.convergence_condition import (
    check_sufficient_condition,
    predicted_rate,
    second_moment_weights,
)
from sharpscope.dynamics.optimizers.schedules import PaperTheta, PolynomialTheta, PowerSchedule

GRID = [(s, r) for s in (0.0, 0.25, 0.5, 0.75, 1.0) for r in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)]


def verdict(s, r, T=10_000):
    # From K on, θ_K > β² = 0.81, as the theory wants it.
    theta = PolynomialTheta(r, c=0.15, start=1) if r else 0.85
    return check_sufficient_condition(PowerSchedule(s), 0.9, theta, T)


@pytest.mark.parametrize(("s", "r"), GRID)
def test_polynomial_schedules_are_classified_as_in_the_table(s, r):
    found = verdict(s, r)
    assert found.s == pytest.approx(s, abs=1e-9)
    assert found.r == pytest.approx(r, abs=1e-9)
    assert found.items[0].holds
    assert found.items[1].holds
    assert found.items[2].holds == (r <= 2 * s)
    assert found.items[3].holds == (r > 0 and s < 1)
    assert found.holds == (0 < r <= 2 * s < 2)
    if not found.holds:
        assert found.rate is None
    elif s + r / 2 == 1:
        assert found.rate == f"T^{s - 1:g} log T"
    else:
        assert found.rate == f"T^{max(-r / 2, s - 1):g}"


@pytest.mark.parametrize(("s", "r"), [(s, r) for s, r in GRID if 0 < r <= 2 * s < 2])
def test_the_ratio_falls_at_the_predicted_rate(s, r):
    found = check_sufficient_condition(PowerSchedule(s), 0.9, PolynomialTheta(r, c=0.15), 1_000_000)
    kept = found.horizons >= 1000
    slope = np.polyfit(np.log(found.horizons[kept]), np.log(found.ratios[kept]), 1)[0]
    predicted = max(-r / 2, s - 1)
    if s + r / 2 == 1:
        T = found.horizons[kept]
        predicted = np.polyfit(np.log(T), np.log(np.log(T) * T ** (s - 1)), 1)[0]
    assert slope == pytest.approx(predicted, abs=0.05)


def test_ratio_and_constant_agree_with_integrals():
    found = check_sufficient_condition("s=0.5", 0.9, PolynomialTheta(0.5, c=0.15), 1_000_000)
    # Σ t^-3/4 lies between ∫_1^T+1 and 1 + ∫_1^T.
    T = found.horizons
    lower, upper = 4 * ((T + 1) ** 0.25 - 1), 4 * T**0.25 - 3
    scale = math.sqrt(0.15) / (T * T**-0.5)
    assert (scale * lower <= found.ratios).all()
    assert (found.ratios <= scale * upper).all()
    assert pytest.approx(1.0) == found.C0  # χ = t^-1/4 / √c falls
    rising = check_sufficient_condition("s=0.25", 0.9, PolynomialTheta(1.0, c=0.15), 10_000)
    assert pytest.approx(10_000**0.25) == rising.C0


def test_a_constant_theta_violates_the_last_item_only_and_leaves_a_neighbourhood():
    found = check_sufficient_condition("s=0.5", 0.9, 0.999, 1_000_000)
    assert [item.holds for item in found.items] == [True, True, True, False]
    assert found.ratios[-1] == pytest.approx(2 * math.sqrt(0.001), rel=2e-3)
    assert "violated  4." in str(found)
    assert "none follows" in str(found)


def test_published_schedules_violate_the_second_item_at_small_steps():
    found = check_sufficient_condition("s=0.5", 0.9, PaperTheta(0.5), 1000)
    assert not found.items[1].holds
    assert "β = 0.9 but √θ_1 = 0.7068" in found.items[1].found
    later = check_sufficient_condition("s=0.5", 0.9, PaperTheta(0.5), 1000, start=8)
    assert later.items[1].holds
    assert later.rate == "T^-0.25"


def test_logged_values_are_judged_like_schedules_and_warmup_shows_in_the_constant():
    T = 5000
    t = np.arange(1.0, T + 1)
    by_schedule = check_sufficient_condition("s=0.5", 0.5, PolynomialTheta(1.0, c=0.5), T)
    by_log = check_sufficient_condition(torch.tensor(t**-0.5), 0.5, (1 - 0.5 / t).tolist(), 10**9)
    assert by_log.rate == by_schedule.rate == "T^-0.5 log T"
    np.testing.assert_allclose(by_log.ratios, by_schedule.ratios, rtol=1e-12)
    warmup = check_sufficient_condition(t**-0.5 * np.minimum(1, t / 100), 0.5, 1 - 0.5 / t, T)
    assert warmup.holds
    assert pytest.approx(100, rel=0.02) == warmup.C0


def test_each_item_can_fail():
    assert not check_sufficient_condition("s=0.5", np.ones(100), 0.9, 100).items[0].holds
    falling = check_sufficient_condition("s=0.5", 0.0, lambda t: 0.5 + 0.4 / t, 100).items[1]
    assert not falling.holds
    assert "decreases" in falling.found
    assert not check_sufficient_condition("s=0.5", 0.0, "r=1", 100).items[1].holds  # θ_1 = 0
    with pytest.raises(ValueError, match="alpha"):
        check_sufficient_condition(np.zeros(100), 0.0, 0.9, 100)
    with pytest.raises(ValueError, match="ten steps"):
        check_sufficient_condition("s=0.5", 0.0, 0.9, 5)
    assert predicted_rate(0.5, 2.0) is None


def test_effective_windows():
    weights, rest = second_moment_weights("r=1", 400)
    np.testing.assert_allclose(weights, 1 / 400, rtol=1e-12)
    assert rest == 0
    weights, _ = second_moment_weights(0.99, 5000)
    assert 1 / np.sum(weights**2) == pytest.approx((1 + 0.99) / (1 - 0.99), rel=1e-6)
