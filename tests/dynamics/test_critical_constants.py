"""The definitions on curves whose constants are known, and the learning rate on a quadratic."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.critical_constants import EarlyRun, critical_constants, learning_rate_from_c
from sharpscope.landscape import Objective

FALLING = [1.0, 0.8, 0.6, 0.5]
BUMP = [1.0, 1.5, 0.6, 0.5]
LATE = [1.0, 0.8, 0.6, 1.2]


def runs(loss_from=2.0, sharp_from=4.0, barrier_from=5.0, diverged_from=7.0, grid=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)):
    return [
        EarlyRun(
            c,
            BUMP if c >= loss_from else FALLING,
            LATE if c >= sharp_from else FALLING,
            c >= diverged_from,
            BUMP if c >= barrier_from else FALLING,
        )
        for c in grid
    ]


def constants(found):
    return found.c_loss, found.c_sharp, found.c_barrier, found.c_max


def test_each_constant_is_where_its_curve_changes():
    found = critical_constants(runs(), steps=3)
    assert constants(found) == (2.0, 4.0, 5.0, 6.0)
    assert found.has_barrier
    assert found.bracket("c_loss") == (1.0, 2.0)
    assert found.bracket("c_sharp") == (3.0, 4.0)
    assert found.bracket("c_barrier") == (4.0, 5.0)
    assert found.bracket("c_max") == (6.0, 7.0)


def test_the_order_of_the_runs_is_free():
    assert constants(critical_constants(runs()[::-1], steps=3)) == (2.0, 4.0, 5.0, 6.0)


def test_only_the_first_steps_count():
    """LATE rises at its third step, FALLING and BUMP do not rise there."""
    assert critical_constants(runs(), steps=2).c_sharp is None
    assert critical_constants(runs(), steps=2).c_loss == 2.0


def test_a_rise_within_the_tolerance_is_none():
    grid = [EarlyRun(c, [2.0, 2.0 * (1 + c * 1e-3)]) for c in (0.5, 0.99, 1.01, 2.0)]
    assert critical_constants(grid, steps=1).c_loss == 1.01
    assert critical_constants(grid, steps=1, tolerance=0.0).c_loss == 0.5
    assert critical_constants(grid, steps=1, tolerance=1.0).c_loss is None


def test_without_a_barrier_c_barrier_is_c_max():
    found = critical_constants(runs(barrier_from=math.inf), steps=3)
    assert constants(found) == (2.0, 4.0, 6.0, 6.0)
    assert not found.has_barrier
    assert found.bracket("c_barrier") == (6.0, 7.0)


def test_a_barrier_on_the_way_to_divergence_is_none():
    assert critical_constants(runs(barrier_from=7.0), steps=3).c_barrier == 6.0


def test_what_the_grid_does_not_reach_is_none():
    found = critical_constants(runs(loss_from=9, sharp_from=9, barrier_from=9, diverged_from=9), steps=3)
    assert constants(found) == (None, None, None, None)
    assert found.bracket("c_max") == (7.0, math.inf)
    assert critical_constants(runs(loss_from=0.0), steps=3).bracket("c_loss") == (0.0, 1.0)


def test_c_max_is_below_the_first_divergence():
    """A run at a larger c may stay finite by chance."""
    some = runs(diverged_from=5.0)
    some[-1] = EarlyRun(7.0, FALLING, FALLING, False, FALLING)
    assert critical_constants(some, steps=3).c_max == 4.0


def test_a_run_that_overflows_rises():
    some = [
        EarlyRun(1.0, FALLING),
        EarlyRun(2.0, [1.0, math.inf], diverged=True),
        EarlyRun(3.0, [1, math.nan], None, True),
    ]
    assert critical_constants(some, steps=3).c_loss == 2.0
    assert critical_constants([some[0], some[2]], steps=3).c_loss == 3.0


def test_a_sharpness_that_was_not_measured_is_skipped():
    grid = [EarlyRun(1.0, FALLING, [1.0, math.nan, 0.9, 0.8]), EarlyRun(2.0, FALLING, [1.0, math.nan, math.nan, 1.1])]
    assert critical_constants(grid, steps=3).c_sharp == 2.0


def test_a_sharpness_known_at_the_start_only_is_missing():
    unknown = [1.0, math.nan, math.nan, math.nan, 5.0]
    some = runs()
    some[5] = EarlyRun(6.0, BUMP, unknown, False, BUMP)
    assert critical_constants(some, steps=3).c_sharp == 4.0
    some[2] = EarlyRun(3.0, BUMP, unknown, False, FALLING)
    with pytest.raises(ValueError, match="no sharpness at c = 3, below the first rise"):
        critical_constants(some, steps=3)


def test_a_run_that_diverged_before_its_sharpness_was_measured_has_no_say():
    some = [EarlyRun(1.0, FALLING, FALLING), EarlyRun(2.0, [1.0, math.inf], [1.0, math.nan], True)]
    found = critical_constants(some, steps=3)
    assert (found.c_sharp, found.bracket("c_sharp")) == (None, (1.0, math.inf))
    found = critical_constants([*some, EarlyRun(3.0, BUMP, BUMP)], steps=3)
    assert (found.c_sharp, found.bracket("c_sharp")) == (3.0, (1.0, 3.0))


@pytest.mark.parametrize("last", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_divergence(last):
    for loss in ([1.0, last, last, last], [1.0, last], [*FALLING, last]):
        found = critical_constants([EarlyRun(1.0, FALLING), EarlyRun(2.0, loss)], steps=3)
        assert found.c_max == 1.0
    with pytest.raises(ValueError, match="the smallest c = 1 diverges"):
        critical_constants([EarlyRun(1.0, [1.0, last])], steps=3)


def test_a_run_that_diverged_within_the_first_steps_has_risen():
    found = critical_constants([EarlyRun(1.0, FALLING), EarlyRun(2.0, [1.0, 0.9], diverged=True)], steps=3)
    assert (found.c_loss, found.c_max) == (2.0, 1.0)
    found = critical_constants([EarlyRun(1.0, FALLING), EarlyRun(2.0, FALLING, diverged=True)], steps=3)
    assert (found.c_loss, found.c_max) == (None, 1.0)


def test_sharpness_may_be_missing_above_c_sharp_only():
    some = runs()
    some[5] = EarlyRun(6.0, BUMP, None, False, BUMP)
    assert critical_constants(some, steps=3).c_sharp == 4.0
    some[2] = EarlyRun(3.0, BUMP, None, False, FALLING)
    with pytest.raises(ValueError, match="no sharpness at c = 3, below the first rise"):
        critical_constants(some, steps=3)
    some = runs()
    some[0] = EarlyRun(1.0, FALLING, FALLING)
    with pytest.raises(ValueError, match="no path at c = 1"):
        critical_constants(some, steps=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "`runs` is empty"),
        ([EarlyRun(1.0, FALLING), EarlyRun(1.0, BUMP)], "two runs at c = 1"),
        ([EarlyRun(-1.0, FALLING)], "c = -1.0; c = η λ_0 is positive"),
        ([EarlyRun(1.0, [0.0, 1, 1, 1])], "the first loss at c = 1 is 0.0"),
        ([EarlyRun(1.0, FALLING, [math.nan, 1, 1, 1])], "the first sharpness at c = 1 is nan"),
        ([EarlyRun(1.0, [1.0, 0.9])], "a loss after 1 steps only; give 3, or set `diverged`"),
        ([EarlyRun(1.0, FALLING, path=[])], "the path at c = 1 is empty"),
        ([EarlyRun(1.0, BUMP, diverged=True)], "the smallest c = 1 diverges; begin the grid lower"),
    ],
)
def test_scans_that_say_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        critical_constants(given, steps=3)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="`name` is 'c_min'"):
        critical_constants(runs(), steps=3).bracket("c_min")
    with pytest.raises(ValueError, match="`steps` is 0"):
        critical_constants(runs(), steps=0)
    with pytest.raises(ValueError, match="`steps` is 2.5"):
        critical_constants(runs(), steps=2.5)
    with pytest.raises(ValueError, match="`tolerance` is 'a'"):
        critical_constants(runs(), steps=2, tolerance="a")


def quadratic(*eigenvalues):
    theta = torch.ones(len(eigenvalues), dtype=torch.float64)
    weights = torch.tensor(eigenvalues, dtype=torch.float64)
    return Objective.from_closure(lambda theta: 0.5 * (weights * theta.square()).sum(), theta)


def test_the_learning_rate_is_c_over_the_largest_eigenvalue_not_the_largest_in_size():
    found = learning_rate_from_c(quadratic(-9.0, 1.0, 4.0), 2.0)
    assert found.sharpness == pytest.approx(4.0, rel=1e-3)
    assert found.lr == pytest.approx(0.5, rel=1e-3)
    assert abs(found.sharpness - 4.0) <= found.error + 1e-12


def test_learning_rates_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="`c` is 0"):
        learning_rate_from_c(quadratic(1.0, 2.0), 0)
    with pytest.raises(ValueError, match="is -1, so c / λ is no learning rate"):
        learning_rate_from_c(quadratic(-1.0, -2.0), 1.0)


@pytest.mark.parametrize("c", [1.9, 1.99, 2.01, 2.1])
def test_gradient_descent_on_a_quadratic_catapults_above_two(c):
    """L_t / L_0 = (1 − c)^(2t)."""
    losses = ((1 - c) ** (2 * np.arange(11))).tolist()
    found = critical_constants([EarlyRun(0.5, [0.5**t for t in range(11)]), EarlyRun(c, losses)])
    assert found.c_loss == (c if c > 2 else None)
