"""Spacings of measurements against the arithmetic of shares, in made-up seconds."""

import itertools
import math

import pytest
from sharpscope.dynamics.cadence import RESERVE, Cadence, _factor, _level


def cadence_with(costs, periods=None, limit=0.1):
    cadence = Cadence(periods or dict.fromkeys(costs, 1), limit)
    for name, cost in costs.items():
        for _ in range(3):
            cadence.add_cost(name, cost)
    return cadence


def test_factors_are_few_and_close():
    found = [_factor(ratio) for ratio in range(1, 41)]
    assert sorted(set(found)) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40]
    assert all(factor >= ratio for ratio, factor in zip(range(1, 41), found, strict=True))
    large = sorted({_factor(1.01**k) for k in range(300, 2000)})
    assert all(b <= 1.34 * a for a, b in itertools.pairwise(large))
    assert _factor(0.0) == _factor(1.0) == 1
    assert _factor(99.9) == 100
    assert _factor(100.1) == 120


def test_the_level_is_the_water_filling():
    assert _level([1.0, 2.0, 3.0], 6.0) == math.inf
    for loads, allowance in itertools.product([[1.0, 2.0, 30.0], [5.0, 5.0], [0.0, 7.0]], [0.5, 2.5, 6.0]):
        level = _level(loads, allowance)
        assert sum(min(load, level) for load in loads) == pytest.approx(allowance)


def test_what_is_cheap_keeps_its_period_and_the_rest_fits():
    costs, training = {"loss": 0.001, "sharpness": 2.0, "density": 30.0}, 1.0
    cadence = cadence_with(costs, {"loss": 1, "sharpness": 10, "density": 100})
    changed = cadence.settle(training)
    assert changed == {name: cadence.spacings[name] for name in ("sharpness", "density")}
    assert cadence.spacings["loss"] == 1
    load = sum(cost / cadence.spacings[name] for name, cost in costs.items())
    assert load / (load + training) <= 0.1 * (1 - RESERVE) + 1e-12
    # The expensive two share alike, but for rounding.
    shares = [costs[name] / cadence.spacings[name] for name in ("sharpness", "density")]
    assert 1 / 1.5 < shares[0] / shares[1] < 1.5


def test_spacings_settle():
    """A cost that wavers by a tenth about any level moves a spacing once, not to and fro."""
    for level in (0.7, 1.0, 1.3, 2.1, 3.3, 7.9):
        cadence, changes = Cadence({"a": 1}, 0.1), 0
        for step in range(200):
            cadence.add_cost("a", level * (1.1 if step % 2 else 0.9))
            changes += bool(cadence.settle(1.0))
        assert changes <= 2
        # A single expensive one among them does not move it further than a step of the scale.
        before = cadence.spacings["a"]
        cadence.add_cost("a", 4 * level)
        cadence.settle(1.0)
        assert cadence.spacings["a"] <= 1.34 * before


def test_spacings_become_short_again_when_measurements_become_cheap():
    cadence = cadence_with({"a": 8.0})
    cadence.settle(1.0)
    assert cadence.spacings["a"] == 80
    for _ in range(100):
        cadence.add_cost("a", 0.01)
        cadence.settle(1.0)
    assert cadence.spacings["a"] == 1


def test_the_first_cost_is_forgotten_when_the_second_is_known():
    cadence = Cadence({"a": 1}, 0.1)
    cadence.add_cost("a", 100.0)
    assert cadence.settle(1.0) == {}
    assert not cadence.affordable("a", 0.0, 50.0)
    cadence.add_cost("a", 1.0)
    assert cadence.state_dict()["costs"] == {"a": 1.0}
    cadence.add_cost("a", 2.0)
    assert cadence.state_dict()["costs"] == {"a": 1.5}


def test_without_a_limit_everything_keeps_its_period():
    cadence = cadence_with({"a": 1e6}, {"a": 3}, limit=None)
    assert cadence.settle(1e-6) == {}
    assert cadence.affordable("a", 1e6, 1.0)
    assert [step for step in range(9) if cadence.is_due("a", step)] == [0, 3, 6]


def test_state_of_another_set_of_measurements():
    state = cadence_with({"a": 8.0, "gone": 1.0}).state_dict()
    cadence = Cadence({"a": 1, "new": 2}, 0.1)
    cadence.load_state_dict(state)
    assert cadence.spacings == {"a": 1, "new": 2}
    assert cadence.was_measured("a")
    assert not cadence.was_measured("new")
    assert "gone" not in cadence.state_dict()["costs"]
