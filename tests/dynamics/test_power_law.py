"""Exponents with their errors, and where a plateau is left."""

import numpy as np
import pytest
from sharpscope.dynamics.power_law import crossing, crossover, power_law_fit


def test_an_exact_law_is_found():
    x = np.array([1.0, 3.0, 10.0, 50.0])
    law = power_law_fit(x, 2.5 * x**-1.7)
    assert law.exponent == pytest.approx(-1.7, abs=1e-12)
    assert law.prefactor == pytest.approx(2.5, rel=1e-12)
    assert law.error < 1e-12
    assert law.num_points == 4
    np.testing.assert_allclose(law.at(x), 2.5 * x**-1.7, rtol=1e-12)


def test_the_fit_is_that_of_numpy():
    x, y = np.random.default_rng(0).uniform(1, 5, (2, 20))
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    law = power_law_fit(x, y)
    assert law.exponent == pytest.approx(slope, rel=1e-10)
    assert law.prefactor == pytest.approx(np.exp(intercept), rel=1e-10)


def test_repeats_count_by_their_geometric_mean():
    x = np.array([1.0, 2.0, 4.0])
    y = np.exp(np.random.default_rng(1).standard_normal((3, 7)))
    means = np.exp(np.log(y).mean(1))
    assert power_law_fit(x, y).exponent == pytest.approx(power_law_fit(x, means).exponent, rel=1e-12)
    assert power_law_fit(x, y[:, :1]) == power_law_fit(x, y[:, 0])


@pytest.mark.parametrize("repeats", [None, 16])
def test_the_bootstrap_error_is_the_spread_over_new_data(repeats):
    random, x, sigma = np.random.default_rng(0), np.geomspace(1, 100, 25), 0.3
    u = np.log(x) - np.log(x).mean()
    shape = (len(x),) if repeats is None else (len(x), repeats)
    true = sigma / np.sqrt((u @ u) * (repeats or 1))
    fits = [
        power_law_fit(x, (np.exp(sigma * random.standard_normal(shape)).T * x**0.5).T, num_resamples=200, seed=i)
        for i in range(200)
    ]
    assert np.std([fit.exponent for fit in fits]) == pytest.approx(true, rel=0.2)
    # With r repeats the bootstrap variance is smaller by 1 - 1/r.
    assert np.mean([fit.error for fit in fits]) == pytest.approx(true, rel=0.1)
    assert 0.88 <= np.mean([fit.low <= 0.5 <= fit.high for fit in fits]) <= 0.99


def test_few_points_do_not_look_too_good():
    """Residuals of a fit to five points are small by √(3/5) on average."""
    random, x, sigma = np.random.default_rng(0), np.geomspace(1, 16, 5), 0.2
    u = np.log(x) - np.log(x).mean()
    fits = [power_law_fit(x, x * np.exp(sigma * random.standard_normal(5)), num_resamples=100) for _ in range(300)]
    found = np.sqrt(np.mean([fit.error**2 for fit in fits]))
    assert found == pytest.approx(sigma / np.sqrt(u @ u), rel=0.1)


def test_a_window_leaves_points_out():
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    y = np.where(x < 3, 100.0, x**2)
    assert power_law_fit(x, y, window=(4, 16)).exponent == pytest.approx(2, abs=1e-12)
    assert power_law_fit(x, y).exponent < 1


def test_a_crossing_is_interpolated_in_logarithms():
    x = np.array([1.0, 10.0, 100.0])
    assert crossing(x, x**2, 30.0) == pytest.approx(30**0.5, rel=1e-12)
    assert crossing(x, 1 / x, 0.05, rising=False) == pytest.approx(20, rel=1e-12)
    assert crossing(x, x, 0.5) == 1.0
    assert crossing(x, x, 100.0) == pytest.approx(100, rel=1e-12)
    assert crossing(x, x, 101.0) is None


def test_the_first_crossing_counts():
    assert crossing([1.0, 2.0, 4.0, 8.0], [1.0, 4.0, 1.0, 4.0], 2.0) == pytest.approx(2**0.5, rel=1e-12)


def test_a_plateau_is_left():
    x = np.geomspace(0.01, 100, 41)
    y = 3 * (1 + x)
    assert crossover(x, y) == pytest.approx(1, rel=0.02)  # 1.01 of the first value is the plateau
    assert crossover(x, 1 / y, 0.5) == pytest.approx(1, rel=0.02)
    assert crossover(x, y, 1000) is None
    noisy = y.copy()
    noisy[0] *= 0.25
    assert crossover(x, noisy) < 0.02  # one low value makes a low plateau
    assert crossover(x, noisy, plateau=10) == pytest.approx(0.8, rel=0.1)


def test_misuse_is_refused():
    x = [1.0, 2.0, 3.0]
    for call, words in (
        (lambda: power_law_fit(x, [1.0, 2.0]), "2 rows for 3 x"),
        (lambda: power_law_fit(x, [1.0, -2.0, 3.0]), "holds -2"),
        (lambda: power_law_fit(x, [1.0, np.nan, 3.0]), "`y` holds nan"),
        (lambda: power_law_fit([1.0, 1.0, 2.0], x), "2 different `x`"),
        (lambda: power_law_fit(x, np.ones((3, 2)), window=(2.5, 9)), "1 different `x`"),
        (lambda: power_law_fit(x, x, num_resamples=1), "`num_resamples` is 1"),
        (lambda: power_law_fit(np.ones((2, 2)), x), "`x` has shape"),
        (lambda: crossing([1.0, 3.0, 2.0], x, 2.0), "`x` does not increase"),
        (lambda: crossing(x, x[:2], 2.0), "2 values for 3 x"),
        (lambda: crossing(x, x, 0.0), "`level` is 0"),
        (lambda: crossover(x, x, 1.0), "`factor` is 1"),
        (lambda: crossover(x, x, plateau=3), "`plateau` is 3 of 3"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
