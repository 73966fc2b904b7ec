"""The claims on accelerated SGD that are cheap to check, and the experiments behind them."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.studies import accelerated_sgd as study
from sharpscope.dynamics.studies.accelerated_experiments import digits_run, growth, modes, recursions, simulated
from sharpscope.dynamics.studies.laboratory import Laboratory


@pytest.mark.parametrize("part", ["_modes", "_recursions", "_second_moments"])
def test_claims_that_need_no_training(part):
    found = getattr(study, part)(Laboratory(quick=True))
    claims = found[0] if isinstance(found, tuple) else found if isinstance(found, list) else [found]
    assert claims
    assert all(claim.holds for claim in claims), [claim.measured for claim in claims]


def test_modes_of_the_reference_rule():
    found = modes()
    c, delta, q = found["form"]
    assert (c, q) == pytest.approx((0.98660, 0.10844), abs=5e-6)
    assert found["faster"] == list(range(3, 13))
    assert math.prod(found["range"]) == pytest.approx(((q - c * delta - c * (q - delta)) / q**2) ** 2, rel=1e-10)


def test_iterates_of_the_two_writings():
    found = recursions(seed=7, steps=50)
    assert 0 <= found["torch"] < 1e-12
    assert 0 <= found["reduced"] < 1e-12


def test_the_second_moments_grow_before_the_mean():
    found = growth([1.0, 8.0, 1000.0])
    assert [radius < 1 for radius in found["second"]] == [True, False, False]
    assert [radius < 1 for radius in found["mean"]] == [True, True, False]


def test_simulated_risks_are_near_the_exact_ones():
    rows = simulated(seed=11, runs=500, steps=30)
    assert [row["case"] for row in rows][:3] == ["head ASGD", "head ASGD averaged", "head SGD"]
    assert len(rows) == 12
    assert all(abs(row["sampled"] - row["exact"]) < 4.5 * row["error"] for row in rows)


def test_the_claims_on_the_risk():
    claims, panels = study._risks(Laboratory(quick=True))
    verdicts = [claim.holds for claim in claims]
    # In the smallest directions ASGD has not gained yet: that claim does not hold, as its note says.
    assert verdicts == [True, True, True, True, True, False, None]
    assert [panel.title for panel in panels][-1] == "Error along one eigendirection"


class Kept:
    """A laboratory whose parts return what it is told."""

    quick = True

    def __init__(self, value):
        self.value = value

    def part(self, name, compute, **settings):
        return self.value


def test_risks_that_never_cross_are_claims_that_do_not_hold():
    curve = np.linspace(1, 0.1, study.STEPS + 1)
    risks = {
        f"{case}-{name}": {"curve": (curve * (2 if name == "ASGD" else 1)).tolist(), "average": 1.0}
        for case in ("head", "tail", "variance")
        for name in study.RULES
    }
    ratios = [2.0] * len(study.SPECTRUM)
    claims, _ = study._risks(Kept({**risks, "early": ratios, "ratios": ratios}))
    assert claims[2].holds is False
    assert claims[2].measured == "2.000; never ahead in 500 steps"
    assert claims[5].holds is False
    assert claims[5].note.startswith("not as claimed for k = 3-60, ratios 2 to 2")
    small = np.where(study.SPECTRUM < 0.131, 0.5, 2.0).tolist()
    claims, _ = study._risks(Kept({**risks, "early": small, "ratios": ratios}))
    assert claims[5].holds
    assert not claims[5].note


def test_no_direction_in_which_asgd_is_faster_is_shown():
    claims, _ = study._modes(Kept({**modes(), "faster": []}))
    assert claims[2].holds is False
    assert "faster for k = none" in claims[2].measured


def test_runs_of_truths():
    assert study._ranges(np.array([True, True, False, True])) == "1-2, 4"
    assert study._ranges(np.array([False])) == "none"


def test_the_network_is_trained():
    found = digits_run("ASGD", 0.1, seed=0, steps=40, every=20)
    assert found["step"] == [0, 20, 40]
    assert found["loss"][-1] < 0.8 * found["loss"][0]
    assert all(value > 0 for value in found["sharpness"])
    assert found["threshold"] == pytest.approx(19.4, rel=0.01)
