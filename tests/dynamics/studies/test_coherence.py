"""Parts of the study against closed forms and against SGD step by step; its claims on made-up numbers."""

import math

import pytest
import torch
from sharpscope.dynamics.studies import coherence as study
from sharpscope.dynamics.studies.coherence_claims import (
    boundary_claims,
    largest,
    net_claim,
    restart_claim,
    theorem1_boundary,
    theorem2_boundary,
    typical_boundary,
)
from sharpscope.dynamics.studies.coherence_family import diverged, drawn, family, shared_axis, typical_exponents
from sharpscope.dynamics.studies.coherence_networks import optimum
from sharpscope.dynamics.studies.laboratory import Laboratory
from sharpscope.hessian.mean_square import MeanSquareStability


@pytest.mark.parametrize("sampling", ["bernoulli", "without_replacement"])
def test_the_simulation_is_sgd_on_the_family(sampling):
    """Every run of σ = 3 step by step with matrices, from the same draws."""
    lr, size, copies, runs, steps, seed = 0.5, 20, 3, 4, 12, 7
    found = diverged(lr, size, sampling, copies, runs, steps, seed)
    random = torch.Generator().manual_seed(1000 * seed + size)
    members = drawn((runs, steps, 100), size, sampling, random)
    start = torch.randn(runs, 100, generator=random, dtype=torch.float64)
    factors = family(copies)
    H = factors @ factors.mT
    ends, ever = [], []
    for run in range(runs):
        w = torch.cat([start[run, :1], start[run, copies:]])
        begin, seen = float(w @ w), False
        for step in range(steps):
            w = w - lr / size * H[members[run, step]].sum(0) @ w
            seen = seen or float(w @ w) > 1000 * begin
        ends.append(float(w @ w) > 1000 * begin)
        ever.append(seen)
    assert found["end"][copies - 1] == sum(ends) / runs
    assert found["ever"][copies - 1] == sum(ever) / runs
    assert len(found["end"]) == copies


def test_draws_of_both_kinds():
    random = torch.Generator().manual_seed(0)
    exact = drawn((50, 30), 4, "without_replacement", random)
    assert bool((exact.sum(1) == 4).all())
    free = drawn((4000, 30), 4, "bernoulli", random).sum(1).double()
    assert float(free.mean()) == pytest.approx(4, abs=0.15)
    assert float(free.var()) == pytest.approx(4 * 26 / 30, rel=0.15)


def test_boundaries_agree_with_the_library():
    for size in (2, 5, 10):
        for lr in (0.5, 0.8):
            copies = theorem2_boundary(lr, size)
            axis = MeanSquareStability(
                torch.full((100, 1, 1), 1.0) * torch.arange(100).lt(10).reshape(-1, 1, 1) * 20**0.5
            )
            exact = 2 * 10 / (2 * (10 + 100 / size - 1))
            assert axis.threshold(size) == pytest.approx(exact, rel=1e-5)
            # The boundary in σ and the threshold in η are one curve.
            assert lr == pytest.approx(2 * copies / (2 * (copies + 100 / size - 1)), rel=1e-12)
    assert theorem1_boundary(0.5, 2) == pytest.approx(7.0)
    assert shared_axis([(5, 2, 0.5)])["radius"] < 1e-12


def test_typical_exponent_of_single_draws():
    """One copy, B of 100 drawn at random: log|1 − ηm/B| with probability B / 100, on every axis alike."""
    [found] = typical_exponents(0.3, 10, "bernoulli", 1)
    assert found == pytest.approx(0.1 * math.log(abs(1 - 0.3 * 200 / 10)), rel=1e-12)
    assert typical_boundary(0.5, 5, "bernoulli") == 11.5


def test_largest_takes_a_majority():
    assert largest([{"end": [1.0, 0.5, 0.6, 0.0]}, {"end": [0.0, 0.0]}]) == [3, 0]


def test_boundary_claims_can_fail():
    good = {kind: [[50, 28, 11, 5, 2, 1]] for kind in ("bernoulli", "without_replacement")}
    assert [claim.holds for claim in boundary_claims(good)] == [True] * 5
    mean_square = {kind: [[50, 49, 19, 9, 4, 1]] for kind in good}
    assert [claim.holds for claim in boundary_claims(mean_square)] == [False, False, True, True, False]
    too_small = {kind: [[9, 6, 3, 2, 1, 0]] for kind in good}
    assert [claim.holds for claim in boundary_claims(too_small)][2] is False


def net(order, restarts=(0.5, 2.0)):
    thresholds = {kind: [order] for kind in ("bernoulli", "without_replacement")}
    runs = {
        share: {"mean": [1.0, end], "error": [0.0, 0.1], "predicted": [1.0, end]}
        for share, end in zip(("0.7", "1.3"), restarts, strict=True)
    }
    return {
        **{key: 1.0 for key in ("loss", "sigma", "lambda1", "max_lambda1", "gradient")},
        "thresholds": thresholds,
        "restarts": runs,
    }


@pytest.mark.parametrize(
    ("order", "holds"),
    [([0.5, 0.8, 0.9, 1.0], True), ([0.1, 0.8, 0.9, 1.0], False), ([0.5, 0.95, 0.9, 1.0], False)],
)
def test_net_claims_can_fail(order, holds):
    assert net_claim("logistic", [net(order)]).holds is holds


@pytest.mark.parametrize(("ends", "holds"), [((0.5, 2.0), True), ((1.5, 2.0), False), ((0.5, 0.9), False)])
def test_restart_claims_can_fail(ends, holds):
    assert restart_claim([net([0.5, 0.8, 0.9, 1.0], ends)]).holds is holds


def test_an_optimum_and_sgd_from_it():
    found = optimum("squared error", 0, [1, 4], 8)
    assert found["loss"] <= 4e-9
    exact, *_, descent = found["thresholds"]["without_replacement"][0]
    assert exact < descent == pytest.approx(2 / found["lambda1"])
    for run in found["restarts"].values():
        assert len(run["mean"]) == 21
        assert run["predicted"][0] == pytest.approx(run["mean"][0], rel=0.6)
    below, above = (found["restarts"][share]["predicted"][-1] for share in ("0.7", "1.3"))
    assert below < found["restarts"]["0.7"]["predicted"][0] < above


class Trained(Laboratory):
    """A laboratory that takes the networks as made up."""

    def part(self, name, compute, **settings):
        return net([0.5, 0.8, 1.0, 1.0]) if compute is optimum else super().part(name, compute, **settings)


def test_the_short_version_has_every_claim_and_panel(monkeypatch):
    monkeypatch.setattr(study, "STEPS", 100)
    result = study.STUDY.run(Trained(quick=True))
    assert len(result.claims) == 16
    assert all(claim.source and claim.measured for claim in result.claims)
    heat = result.panels[0].heat
    assert heat is not None
    assert [heat.values[0][0], heat.values[-1][-1]] == [1.0, 0.0]
    assert len(result.panels) == 3
