"""The claims on sign methods that are cheap to check, and the experiments behind them."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.studies import sign_methods as study
from sharpscope.dynamics.studies.laboratory import Laboratory
from sharpscope.dynamics.studies.sign_experiments import (
    digits_run,
    exact_statements,
    mean_gradient_norm,
    quadratic_run,
    skewed_runs,
)


def test_exact_statements_are_exact():
    found = exact_statements()
    assert found["identity"] <= 1e-12
    assert found["transport"] <= 1e-12
    assert found["parity"] in (None, 0.0)


@pytest.mark.parametrize("part", ["_exactness", "_drift", "_cycle"])
def test_claims_of_the_short_version(part):
    found = getattr(study, part)(Laboratory(quick=True))
    claims = found if isinstance(found, list) else found[0]
    assert claims
    assert all(claim.holds for claim in claims if claim.holds is not None), [claim.measured for claim in claims]


def test_momentum_and_transport_accelerate():
    sign, signum, transport, lion = (np.array(mean_gradient_norm(m, 1000, 2)) for m in study.METHODS)
    assert bool((sign > signum).all())
    assert bool((signum > transport).all())
    assert bool((lion < signum).all())
    assert len(set(transport.tolist())) == 2


def test_the_slope_is_that_of_a_power_law():
    lengths = [100, 1000, 10000]
    norms = np.array([[T**-0.25, 3 * T**-0.27] for T in lengths])
    mean, error = study.slope(lengths, norms)
    assert mean == pytest.approx(-0.26)
    assert error == pytest.approx(0.01)


def test_a_skewed_slope_is_climbed_without_momentum_and_descended_with_it():
    up, down = (np.array(skewed_runs(beta, 4000, 16)) for beta in (0.0, 0.99))
    assert up.shape == down.shape == (101, 16)
    assert up[-1].mean() == pytest.approx(2.0, rel=0.1)
    assert bool((down[-1] < -3).all())


def test_the_cycle_depends_on_the_basis():
    straight = quadratic_run(None, 200)
    assert straight["period2"]
    assert straight["late"] <= 0.5 * study.STEP**2 * sum(study.QUADRATIC)
    assert straight["largest"] <= study.STEP
    assert max(quadratic_run(seed, 200)["largest"] for seed in range(3)) > study.STEP


@pytest.mark.parametrize("name", ["Lion", "AdamW"])
def test_digits_are_learned(name):
    lr = 1e-3 if name == "Lion" else 1e-2
    found = digits_run(name, {"lr": lr, "weight_decay": 0.0}, seed=0, steps=60, select=True)
    assert found["accuracy"] > 75
    assert math.isfinite(found["rms"])
    if name == "Lion":
        assert found["rms"] < 1e-4
