"""The parts of the study of the UV model on short runs, and how its claims are judged."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.studies import uv_experiments as uv
from sharpscope.dynamics.studies import uv_model as module
from sharpscope.dynamics.studies import uv_real_nets as nets
from sharpscope.dynamics.studies import uv_route as route
from sharpscope.dynamics.studies.laboratory import Laboratory


def test_the_closed_forms_hold_along_a_run_and_far_from_it():
    found = uv.closure(seed=3, Y=1.1, steps=12)
    assert max(found["map"], found["trace"], found["sharpness"]) < 1e-12
    assert found["residual"] > 0.9  # a run that starts at the minimum would show nothing
    assert uv.far_from_minimum(seed=3, points=4) < 1e-12


def test_the_tracker_sees_both_signs_of_the_residual():
    found = uv.tracked(seed=0, Y=1.15, burn_in=60, steps=4)
    assert max(found["search"], found["tracker"]) < 1e-10
    assert found["above"] == found["below"] == 2
    negative = uv.far_negative(seed=0)
    assert negative["lowest"] < -0.99 * negative["exact"]
    assert negative["found"] == pytest.approx(negative["exact"], rel=1e-9)


def test_the_largest_eigenvalue_is_taken_where_the_lowest_is_larger_in_magnitude():
    found = uv.far_negative(seed=1)
    assert -found["shifted_lowest"] > 2 * found["shifted_exact"] > 0
    assert found["shifted_search"] == pytest.approx(found["shifted_exact"], rel=1e-9)
    assert found["shifted_tracker"] == pytest.approx(found["shifted_exact"], rel=1e-9)
    assert module._largest([found]).holds
    assert not module._largest([{**found, "shifted_search": found["shifted_lowest"]}]).holds
    assert not module._largest([{**found, "shifted_tracker": found["shifted_lowest"]}]).holds
    assert not module._largest([{**found, "found": found["lowest"]}]).holds
    assert not module._largest([{**found, "shifted_lowest": -0.5 * found["shifted_exact"]}]).holds


def test_the_sign_rules_have_no_exception():
    assert uv.signs(num=300, seed=5) == {"wrong": 0, "silent": 0, "flow": 0, "num": 300}


def test_doublings_are_where_the_multiplier_says():
    exact = uv.exact_doublings()
    assert exact == pytest.approx((1.0, math.sqrt(5) - 1, 1.28803, 1.29923), abs=1e-5)
    for (low, high), value in zip(uv.doublings(burn_in=20_000, width=2e-4), exact, strict=True):
        assert low - 3e-4 < value < high + 3e-4
    assert uv.ratios([0.0, 4.0, 5.0, 5.5]) == [4.0, 2.0]


def test_what_is_bounded():
    shares = uv.bounded([0.9, 1.5, 2.5], 0.2, starts=50, steps=500, seed=0)
    assert shares == [1.0, 1.0, 0.0]


def test_the_late_orbit_is_the_closed_one():
    (found,) = uv.attractor(1.1, [0], burn_in=2000, keep=200)
    assert found["period"] == 2
    assert found["F"] == pytest.approx([0.72984, 1.37016], abs=1e-5)
    assert found["unbalance"] < 1e-9


def test_the_diagram_has_one_dot_below_and_two_above():
    found = uv.diagram([0.9, 1.1, 2.3], burn_in=1000, keep=32)
    assert found["x"] == [0.9, 1.1, 1.1]
    assert found["periods"] == (1, 2, None)
    # The slower of two directions: along the manifold log|9 − 2 (1 + Y)²| / 2, towards it 2 log|1 + D| on average.
    along, towards = math.log(abs(9 - 2 * 2.1**2)) / 2, math.log(abs(3 - 2 * 1.1))
    assert along < towards
    assert found["exponents"][1] == pytest.approx(towards, abs=1e-6)
    assert found["exponents"][2] is None


def test_fixed_points_are_judged_by_residual_and_multiplier():
    found = uv.fixed_points([0.5, 1.1])
    assert module._fixed_points(found).holds
    moved = [{**found[0], "residual": 1e-3}, *found[1:]]
    assert not module._fixed_points(moved).holds
    unstable = [{**found[0], "moduli": [1.2, 0.1]}, *found[1:]]
    assert not module._fixed_points(unstable).holds
    stable = [found[0], {**found[1], "moduli": [0.9, 0.1]}, *found[2:]]
    assert not module._fixed_points(stable).holds


def test_exact_claims_hold_in_the_short_version():
    claims = module._exact(Laboratory(quick=True))
    assert [claim.holds for claim in claims] == [True] * 6


def test_power_of_period_two():
    t = np.arange(48)
    alternating = 2.0 + 0.3 * (-1.0) ** t + 0.01 * t
    assert nets.power_of_period_two(alternating) > 0.95
    assert nets.power_of_period_two(2.0 + 0.3 * np.sin(2 * np.pi * t / 12)) < 0.01
    assert nets.power_of_period_two(alternating + 0.5 * np.sin(2 * np.pi * t / 4)) < 0.5
    assert nets.power_of_period_two(0.5 * t) < 0.5


@pytest.mark.parametrize(("task", "lr"), [("label", 0.05), ("classes", 0.7), ("autoencoder", 0.7)])
def test_nets_train_and_their_runs_depend_on_their_arguments_only(task, lr):
    first, again, other = (nets.Net(task, seed).train(lr, 30) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first[-1] < first[0]
    assert all(p.abs().max() > 0 for p in nets.Net(task, 0).model.parameters())


def test_a_rate_far_too_large_diverges_and_the_search_ends_below_it():
    assert nets.late("label", 0, 5.0, burn_in=200, keep=4) == {"lr": 5.0, "fate": "diverged"}
    found = nets.largest_convergent("label", 0, steps=120, start=0.02, factor=2.0)
    assert found in (0.02, 0.04, 0.08, 0.16, 0.32)
    losses = nets.Net("label", 0).train(found, 120)
    assert (np.diff(losses[60:]) <= 0).all()
    with pytest.raises(ValueError, match="`start` is 5"):
        nets.largest_convergent("label", 0, steps=120, start=5.0, factor=2.0)


def test_late_records_of_a_short_run():
    run = nets.late("label", 0, 0.05, burn_in=20, keep=8)
    assert run["fate"] == "trains"
    assert len(run["edge"]) == len(run["loss"]) == 9
    assert run["mean"] == pytest.approx(np.mean(run["edge"]))


def test_ten_outputs_are_reported_whatever_becomes_of_them():
    trained = {"fate": "trains", "mean": 2.01, "projection": 1.0, "alternating": 0.5}
    claim = route._classes([trained, {"fate": "diverged"}], [1.0, 1.1])
    assert claim.holds is None
    assert claim.measured.startswith("2.0100, 100 %, 50 %; diverged")


def run(lr, share, period=None):
    return {"lr": lr, "fate": "trains", "period_two": share, "period": period, "mean": 2.2}


@pytest.mark.parametrize(
    ("runs", "holds"),
    [
        ([run(2.5, 0.9), run(1.5, 0.1)], True),
        ([run(2.5, 0.4)], False),
        ([run(2.5, 0.9, period=2)], False),
        ([run(1.5, 0.9)], False),
        ([{"lr": 2.5, "fate": "dead"}], False),
    ],
)
def test_the_claim_about_autoencoders_is_judged_at_its_rate(runs, holds):
    assert route._alternates(runs, [1.0]) is holds
