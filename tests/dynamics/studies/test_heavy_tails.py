"""The parts of the study of heavy tails, shortened, and how their numbers are judged."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.stable import stable_abs_mean, stable_ou_scale
from sharpscope.dynamics.studies import heavy_tail_experiments as experiments
from sharpscope.dynamics.studies import heavy_tail_stability as stability
from sharpscope.dynamics.studies import heavy_tails


def test_the_inverted_characteristic_function():
    for x in (0.5, 3.0, 20.0):
        assert experiments.absolute_share(1.0, x) == pytest.approx(2 / math.pi * math.atan(x), abs=1e-6)
        assert experiments.absolute_share(2.0, x) == pytest.approx(math.erf(x / 2), abs=1e-9)
    assert experiments.absolute_median(1.0) == pytest.approx(1, abs=1e-5)
    stats = pytest.importorskip("scipy.stats")
    assert experiments.absolute_share(1.5, 2.0) == pytest.approx(1 - 2 * stats.levy_stable.cdf(-2.0, 1.5, 0), abs=1e-6)


def test_kestens_exponent():
    """E(1 − ηx²)^κ of normal x: 1 − 2η + 3η² at κ = 2, 1 − 4η + 18η² − 60η³ + 105η⁴ at κ = 4."""
    assert experiments.kesten_index(2 / 3) == pytest.approx(2, abs=1e-6)
    [rate] = [r.real for r in np.roots([105, -60, 18, -4]) if abs(r.imag) < 1e-12]
    assert experiments.kesten_index(rate) == pytest.approx(4, abs=1e-5)


def test_samplers_are_judged_in_standard_errors(monkeypatch):
    found = experiments.samplers(2.0, 20000, 0)
    assert max(map(abs, found["line"] + found["directions"])) < 4
    assert found["kolmogorov"] < 1.95
    real = experiments.stable
    monkeypatch.setattr(experiments, "stable", lambda *args, **options: 1.1 * real(*args, **options))
    wrong = experiments.samplers(2.0, 20000, 0)
    assert max(map(abs, wrong["line"])) > 4
    assert wrong["kolmogorov"] > 1.95


def test_the_stationary_law_is_told_from_that_of_the_equation():
    run = experiments.stationary(1.6, 1.0, 0.2, 100_000, 30, 0)
    assert run["measured"] == pytest.approx(run["expected"], abs=0.006)
    assert abs(run["measured"] - run["of the equation"]) > 0.012


def test_scale_differences_are_those_of_the_exact_chains():
    factors = (0.05 / 1.05, 0.05)
    [found] = experiments.scale_differences([1.6], 20000, 3, 0)
    first, second = (stable_ou_scale(1.6, 1.0, lr=x) / x ** (1 / 1.6) for x in factors)  # in units of σ η^(1/α)
    assert found == pytest.approx((first - second) * stable_abs_mean(1.6), rel=0.06)


def test_the_derivative_of_the_scale():
    step = 1e-4
    slope = (stable_ou_scale(1.5, 200 - step) - stable_ou_scale(1.5, 200 + step)) / (2 * step)
    assert experiments.predicted_difference(1.5, 200.0) == pytest.approx(slope * stable_abs_mean(1.5), rel=1e-6)


def test_units_of_a_curvature():
    """Differences that are exact for a = 200 come out as g of that curvature, up to the finite differences."""
    exact = [
        (stable_ou_scale(x, 200.0) - stable_ou_scale(x, 210.0))
        / (stability.CONTRACTION / 210) ** (1 / x)
        * stable_abs_mean(x)
        for x in stability.GRID
    ]
    found = stability._per_curvature(exact, 200.0)
    assert found == pytest.approx([experiments.predicted_difference(x, 200.0) for x in stability.GRID], rel=0.05)
    where, ratio = stability._minimum(stability.GRID, found)
    assert where == pytest.approx(1.483, abs=0.035)
    assert ratio == pytest.approx(1.112, abs=0.01)


def test_neighbouring_chains():
    """Example r of chain r is the one that is replaced: the first step parts them by η/n times its gradient."""
    settings = {"ridge": 0.5, "lr": 0.2, "alpha": 1.5, "sigma": 0.1, "chains": 2, "seed": 0}
    run = experiments.logistic_stability(num=20, windows=1, **settings)
    doubled = experiments.logistic_stability(num=40, windows=1, **settings)
    images, digits = experiments.digit_examples(1797, seed=0)
    margins = (2.0 * (digits % 2) - 1).unsqueeze(1) * images
    first = 0.2 / 20 * 0.5 * (margins[:2] - margins[1000:1002]).norm(dim=1).mean()  # slope of softplus at 0
    assert run["time"][:2] == pytest.approx([0.2, 0.4])
    single = experiments.logistic_stability(num=20, windows=1, **{**settings, "ridge": 25.0})  # measured at every step
    assert single["distance"][0] == pytest.approx(float(first), rel=1e-6)
    assert 1.5 < run["windows"][0] / doubled["windows"][0] < 2.5


def test_tail_indices():
    assert experiments.linear_model_noise(4000, 63, 0)["estimate"] == pytest.approx(2, abs=0.1)
    torch.manual_seed(0)
    heavy = experiments.multiplicative_noise(1.0, 10000, 100, 200, 0)
    assert heavy["estimate"] == pytest.approx(experiments.kesten_index(1.0), abs=0.15)
    found = experiments.stable_estimates(1.5, 4000, 63, [0, 1])
    assert all(len(values) == 2 for values in found.values())
    assert all(
        low < middle < high for low, middle, high in zip(found["low"], found["logmoment"], found["high"], strict=True)
    )


class Kept:
    """A laboratory that returns what it is told."""

    quick = False

    def __init__(self, answer):
        self.answer = answer

    def part(self, name, compute, **settings):
        return self.answer(name, settings)


@pytest.mark.parametrize(
    ("power", "growth", "verdicts"), [(1.0, 0.0, [True, True]), (0.8, 0.0, [False, True]), (1.0, 0.08, [True, False])]
)
def test_stability_is_judged_by_its_power_and_its_growth(power, growth, verdicts):
    def answer(name, settings):
        windows = [settings["num"] ** -power * (1 + growth * i) for i in range(9)]
        return {"time": [1.0], "distance": [1.0], "windows": windows}

    claims, panels = stability.stability_claims(Kept(answer), [0, 1])
    assert [claim.holds for claim in claims] == verdicts
    assert len(panels) == 2


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_the_shape_is_judged_by_its_minimum(tilt):
    exact = [
        (stable_ou_scale(x, 200.0) - stable_ou_scale(x, 210.0))
        / (stability.CONTRACTION / 210) ** (1 / x)
        * stable_abs_mean(x)
        * math.exp(-tilt * x)  # puts the minimum at α = 2
        for x in stability.GRID
    ]
    claims, _ = stability.shape_claims(Kept(lambda name, settings: [0.15] * 4 if name == "shift" else exact), [0])
    assert [claim.holds for claim in claims] == [tilt == 0, tilt == 0, True, True, True]


@pytest.mark.parametrize("error", [0.0, 0.11])
def test_one_estimate_that_is_off_fails_the_claim(error):
    def answer(name, settings):
        if name.startswith("estimates"):
            alpha, found = settings["alpha"], [settings["alpha"]] * 19
            last = alpha + (error if alpha == 1.8 else 0.0)
            return {"logmoment": [*found, last], "low": [*found, last], "high": [*found, last], "hill": [2.0] * 20}
        return {"estimate": 2 + 2 * error, "hill": 2.0, "low": 1.0, "high": 3.0, "lowest": 1.9, "highest": 2.1}

    claims, _ = heavy_tails.estimator_claims(Kept(answer), [0, 1])
    assert [claim.holds for claim in claims] == [error == 0, error == 0, False, None, None]
