"""Catapults and mechanisms on curves made by hand, and on a model whose catapult is exact."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.catapults import catapults, warmup_mechanism
from sharpscope.dynamics.uv_model import uv_map, uv_sharpness

#        0    1    2    3    4    5    6    7    8
LOSS = [1.0, 0.8, 0.7, 1.4, 2.1, 0.9, 0.6, 0.5, 0.4]
HIGH = [9.0, 10., 11., 12., 8.0, 4.0, 3.0, 3.5, 4.0]  # fmt: skip


def test_a_catapult_is_found_with_its_ends():
    (event,) = catapults(LOSS, HIGH)
    assert (event.start, event.peak, event.end, event.returned) == (2, 4, 6, True)
    assert event.loss_rise == pytest.approx(3.0)
    assert event.sharpness_drop == pytest.approx(3.0 / 12.0)


def test_the_drop_is_what_comes_after_the_peak():
    (event,) = catapults(LOSS, [1.0, 1.0, 1.0, 12.0, 12.0, 6.0, 5.0, 5.0, 5.0])
    assert event.sharpness_drop == pytest.approx(5.0 / 12.0)


def test_loss_and_sharpness_must_both_move():
    assert catapults(LOSS, [5.0] * 9) == ()
    assert catapults(sorted(LOSS, reverse=True), HIGH) == ()
    assert catapults(LOSS, HIGH, rise=3.1) == ()
    assert catapults(LOSS, HIGH, drop=0.2) == ()
    assert len(catapults(LOSS, HIGH, rise=2.9, drop=0.3)) == 1


def test_several_events_and_one_that_does_not_return():
    loss = [1.0, 2.0, 0.9, 0.8, 1.6, 0.7, 5.0, 6.0]
    sharp = [4.0, 4.0, 3.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    first, second, third = catapults(loss, sharp)
    assert [(e.start, e.peak, e.end, e.returned) for e in (first, second, third)] == [
        (0, 1, 2, True),
        (3, 4, 5, True),
        (5, 7, 7, False),
    ]


def test_ripples_within_one_rise_are_one_event():
    loss = [1.0, 3.0, 2.0, 3.5, 1.5, 0.9]
    assert len(catapults(loss, [4.0, 4.0, 3.0, 3.0, 2.0, 2.0])) == 1


def test_a_catapult_of_the_uv_model():
    # A minimum with ηλ = 3 in reach of a flat one: it shoots up, and lands at a sharpness below 2.
    F, L, Y, path = 0.21, 3.0, 0.2, []
    for _ in range(80):
        path.append((0.5 * (F - Y) ** 2, float(uv_sharpness(F, L, Y))))
        F, L = uv_map(F, L, Y)
    loss, sharpness = zip(*path, strict=True)
    (event,) = catapults(loss, sharpness)
    assert event.start == 0
    assert event.loss_rise > 100
    assert sharpness[event.end] < 2 < sharpness[0]
    assert warmup_mechanism(loss, sharpness, 2.0).label is None  # above its threshold from the start


@pytest.mark.parametrize(("growth", "label"), [(1.02, "C1"), (0.98, "C2"), (1.0, "C3"), (1.002, "C3"), (0.998, "C3")])
def test_the_label_is_that_of_the_natural_evolution(growth, label):
    t = np.arange(40)
    sharpness = 5.0 * growth**t
    found = warmup_mechanism(1.0 / (1 + t), sharpness, 1000.0)
    assert found.label == label
    assert found.natural == 40
    assert found.catapults == ()
    assert found.edge_share == 0.0
    if label != "C3":
        assert abs(found.change - 1) > 0.1
        assert abs(found.change - 1) < 0.13  # the first record beyond the tolerance decides


def test_what_comes_first_decides_and_only_before_the_threshold():
    loss = np.linspace(1.0, 0.5, 6)
    assert warmup_mechanism(loss, [10, 8, 6, 9, 14, 20], 100.0).label == "C2"
    assert warmup_mechanism(loss, [10, 12, 6, 5, 4, 3], 100.0).label == "C1"
    # The threshold comes down to a sharpness that stands still: what happens after that is not natural.
    met = warmup_mechanism(loss, [10, 10, 10, 20, 3, 3], [math.inf, 30, 11, 9, 8, 7])
    assert (met.label, met.natural) == ("C3", 3)
    # After the crossing at record 3 no record is within 30 % of it.
    assert met.edge_share == 0.0
    cycle = warmup_mechanism(loss, [10, 10, 10, 10, 7, 9], [math.inf, 30, 11, 9, 8, 7])
    assert cycle.edge_share == 1.0


def test_a_catapult_ends_the_natural_evolution():
    found = warmup_mechanism(LOSS, HIGH, 100.0, tol=0.5)
    assert found.natural == 3
    assert found.label == "C3"


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`loss` has shape"):
        catapults([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="`sharpness` is nan at record 1"):
        catapults([1.0, 2.0], [1.0, math.nan])
    for option in ({"rise": 1.0}, {"drop": 0.0}, {"drop": 1.2}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}`"):
            catapults(LOSS, HIGH, **option)
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`threshold`"):
            warmup_mechanism(LOSS, HIGH, threshold)
    with pytest.raises(ValueError, match="`tol`"):
        warmup_mechanism(LOSS, HIGH, 10.0, tol=0.0)
