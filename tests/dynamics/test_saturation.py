"""The steepest drop of curves with a known one."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.saturation import steepest_drop

GRID = 2.0 ** np.arange(-1, 3.01, 0.125)


def fermi(c, at, width=0.2):
    return 1 / (1 + np.exp((c - at) / width))


@pytest.mark.parametrize("at", [1.5, 2.0, 3.0])
def test_a_step_is_found(at):
    found = steepest_drop(GRID, [fermi(GRID, at)])
    assert found.c == pytest.approx(at, rel=0.1)
    assert found.low == found.high == found.c
    # The derivative of the step is −1 / (4 width) in the middle; the parabola is as wide as half of it.
    assert -1.3 < found.slope < -0.7


def test_the_derivative_is_with_respect_to_c():
    """log c falls everywhere alike in log c; in c it falls fastest at the smallest."""
    found = steepest_drop(GRID, [-np.log(GRID)])
    assert found.c == GRID[0]
    assert found.slope == pytest.approx(-1 / GRID[0])
    assert steepest_drop(GRID, [-(GRID**2)]).c == GRID[-1]


def test_the_interval_covers_the_seeds():
    random = np.random.default_rng(0)
    rows = [fermi(GRID, at) + 0.01 * random.standard_normal(len(GRID)) for at in (1.6, 2.0, 2.4, 2.8)]
    found = steepest_drop(GRID, rows)
    assert 1.5 <= found.low < found.c < found.high <= 3.0
    assert found == steepest_drop(GRID, rows)


def test_noise_on_single_points_does_not_decide():
    random = np.random.default_rng(1)
    rows = fermi(GRID, 2.0) + 0.03 * random.standard_normal((8, len(GRID)))
    assert steepest_drop(GRID, rows).c == pytest.approx(2.0, rel=0.15)


def test_a_rising_curve_has_no_drop():
    found = steepest_drop(GRID, [GRID])
    assert math.isnan(found.c)
    assert found.slope > 0


@pytest.mark.parametrize(
    ("c", "ratios", "window", "message"),
    [
        (GRID, [[1.0]], 5, r"shape \(1, 1\) or holds NaN; give a finite number for each of 33 c"),
        (GRID, [[math.nan] * len(GRID)], 5, r"shape \(1, 33\) or holds NaN"),
        (GRID, [GRID], 4, "`window` is 4"),
        (GRID[:4], [GRID[:4]], 5, "`window` is 5 for 4 values"),
        (GRID[::-1], [GRID], 5, "positive and ascend"),
    ],
)
def test_curves_without_an_answer_are_refused(c, ratios, window, message):
    with pytest.raises(ValueError, match=message):
        steepest_drop(c, ratios, window=window)
