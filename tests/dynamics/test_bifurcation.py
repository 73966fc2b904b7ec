"""Periods, doublings and Lyapunov exponents of the logistic map, whose values are known."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.bifurcation import bifurcation, detect_period, late_orbit, lyapunov_exponent, onset


def logistic(r, x=0.3):
    while True:
        yield x
        x = r * x * (1 - x)


def test_periods_of_series():
    t = np.arange(40)
    assert detect_period(np.ones(40)) == 1
    assert detect_period((-1.0) ** t) == 2
    assert detect_period(np.sin(2 * np.pi * t / 5)) == 5
    assert detect_period(np.sin(t)) is None
    # Up to half of the length, and as exact as asked for.
    assert detect_period(np.tile(np.arange(7.0), 2)) == 7
    assert detect_period(np.arange(7.0)) is None
    wobble = (-1.0) ** t + 1e-4 * np.sin(t)
    assert detect_period(wobble, 1e-6) is None
    assert detect_period(wobble, 1e-3) == 2


@pytest.mark.parametrize("series", [[1.0], [], [1.0, math.nan, 1.0], np.ones((3, 3))])
def test_a_series_without_a_period_to_find_is_refused(series):
    with pytest.raises(ValueError, match="`series`"):
        detect_period(series)


def test_the_diagram_of_the_logistic_map():
    found = bifurcation(logistic, [2.8, 3.2, 3.5, 3.7, 4.5], burn_in=2000, keep=32)
    assert found.periods == (1, 2, 4, None, None)
    assert found.diverged == (False, False, False, False, True)
    assert found.orbits[0] == pytest.approx(1 - 1 / 2.8)
    x, y = found.points()
    assert len(x) == len(y) == 4 * 32
    assert set(x) == {2.8, 3.2, 3.5, 3.7}


def test_an_observable_is_asked_for_late_states_only():
    asked = []
    orbit = late_orbit(range(100), burn_in=90, keep=5, observable=lambda s: asked.append(s) or s)
    assert orbit.tolist() == asked == [90, 91, 92, 93, 94]
    assert len(late_orbit(range(3), burn_in=5, keep=2)) == 0
    assert late_orbit([1.0, 2.0, math.inf, 3.0], burn_in=0, keep=4).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="`keep` is 0"):
        late_orbit([1.0], burn_in=0, keep=0)


def test_the_doublings_of_the_logistic_map():
    def period(r):
        return detect_period(late_orbit(logistic(r), burn_in=20_000, keep=32), 1e-5)

    for p, low, high, exact in ((1, 2.9, 3.1, 3.0), (2, 3.4, 3.5, 1 + math.sqrt(6))):
        a, b = onset(lambda r, p=p: period(r) != p, low, high, width=1e-3)
        assert b - a <= 1e-3
        assert a - 1e-3 <= exact <= b + 1e-3
    with pytest.raises(ValueError, match="widen"):
        onset(lambda r: r > 5, 0.0, 1.0, width=0.1)
    with pytest.raises(ValueError, match="widen"):
        onset(lambda r: True, 0.0, 1.0, width=0.1)


def test_lyapunov_exponents_that_are_known():
    slope = lambda r: lambda x: r * (1 - 2 * x)
    # r = 4 is conjugate to the tent map.
    chaotic = lyapunov_exponent(logistic(4.0, 0.3141), slope(4.0), burn_in=100, steps=20_000)
    assert chaotic == pytest.approx(math.log(2), abs=0.02)
    fixed = lyapunov_exponent(logistic(2.8), slope(2.8), burn_in=500, steps=100)
    assert fixed == pytest.approx(math.log(abs(2 - 2.8)), abs=1e-9)
    # The larger of the eigenvalues of a constant matrix, whatever the first vector.
    matrix = np.array([[2.0, 1.0], [0.0, 0.5]])
    linear = lyapunov_exponent(range(1000), lambda s: matrix, burn_in=100, steps=500)
    assert linear == pytest.approx(math.log(2), abs=1e-9)
    # Three in turn, whose product depends on their order.
    A, B, C = np.array([[1.0, 3.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [2.0, 1.0]]), np.array([[2.0, 0.0], [0.0, 0.3]])
    radius = np.abs(np.linalg.eigvals(C @ B @ A)).max()
    assert abs(np.log(radius / np.abs(np.linalg.eigvals(A @ B @ C)).max())) > 0.05
    turn = lyapunov_exponent(range(1000), lambda s: (A, B, C)[s % 3], burn_in=99, steps=600)
    assert turn == pytest.approx(math.log(radius) / 3, abs=1e-9)
    assert lyapunov_exponent([1, 2], lambda s: 0.0, burn_in=0, steps=2) == -math.inf
    with pytest.raises(ValueError, match="`burn_in` = 5"):
        lyapunov_exponent(range(5), lambda s: 1.0, burn_in=5, steps=5)
