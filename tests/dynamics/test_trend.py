"""Straight pieces are found where they are, with the error they have."""

import numpy as np
import pytest
from sharpscope.dynamics.trend import NUM_BINS, Trend, noise

X = np.linspace(0, 10, 121)  # the corners are among them
CORNERS = ([0, 3, 7, 10], [2.0, -1.0, -1.0, 3.0])


def test_pieces_without_noise_are_exact():
    trend = Trend.of(X, np.interp(X, *CORNERS))
    assert len(trend.knots) == 4
    assert trend.x == pytest.approx(CORNERS[0], abs=1e-9)
    assert trend.y == pytest.approx(CORNERS[1], abs=1e-9)


def test_a_line_is_one_piece():
    trend = Trend.of(X, 3 - 2 * X)
    assert trend.knots.tolist() == [0, 120]
    assert trend.change(0, 1)[0] == pytest.approx(-20)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_the_error_of_a_change_is_that_of_independent_fits(sigma):
    errors, changes = [], []
    for seed in range(100):
        y = 0.3 * X + sigma * np.random.default_rng(seed).standard_normal(len(X))
        trend = Trend.of(X, y)
        if len(trend.knots) == 2:
            change, error = trend.change(0, 1)
            changes.append(change)
            errors.append(error)
    assert len(changes) > 90
    assert np.mean(changes) == pytest.approx(3.0, abs=5 * sigma * 0.36 / np.sqrt(100))
    # With FLOOR in it the error is a little too large, never too small.
    assert 0.8 < np.std(changes) / np.mean(errors) < 1.2


@pytest.mark.parametrize("sigma", [0.0, 0.03, 0.3])
def test_the_noise_is_seen_apart_from_the_curve(sigma):
    random = np.random.default_rng(0)
    x = np.sort(random.uniform(0, 10, 2000))
    y = np.interp(x, *CORNERS) + np.where(x > 5, 4.0, 0.0) + sigma * random.standard_normal(2000)
    assert noise(x, y) == pytest.approx(sigma, rel=0.1, abs=1e-9)


def test_many_points_are_binned():
    x = np.linspace(0, 10, 20_000)
    trend = Trend.of(x, np.interp(x, *CORNERS) + 0.2 * np.random.default_rng(0).standard_normal(len(x)))
    assert len(trend.knots) - 1 <= NUM_BINS
    assert len(trend.knots) <= 6  # a corner inside a bin may take two
    assert np.abs(np.interp(x, trend.x, trend.y) - np.interp(x, *CORNERS)).max() < 0.1
    assert trend.knots[0] == 0
    assert trend.knots[-1] == len(x) - 1


def test_two_points_make_a_line():
    trend = Trend.of(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    assert trend.change(0, 1)[0] == pytest.approx(1.0)
    assert noise(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == 0
