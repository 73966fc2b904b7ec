"""The claims on SGD noise: cheap ones measured, the others put before data that must fulfil or break them."""

import math
import re

import numpy as np
import pytest
from sharpscope.dynamics.power_law import power_law_fit
from sharpscope.dynamics.studies import noise_network as network
from sharpscope.dynamics.studies import noise_perceptron as perceptron
from sharpscope.dynamics.studies.laboratory import Laboratory
from sharpscope.dynamics.studies.result import StudyResult
from sharpscope.dynamics.studies.scaled_model import parity_runs


@pytest.mark.parametrize("part", ["_collapse", "_plateau"])
def test_cheap_claims_on_the_perceptron(part):
    claims, panel = getattr(perceptron, part)(Laboratory(quick=True))
    assert all(claim.holds for claim in claims), [claim.measured for claim in claims]
    assert panel.x_log
    assert panel.y_log


def law(exponent, spread=0.05, repeats=8):
    noise = np.exp(spread * np.random.default_rng(0).standard_normal((len(perceptron.SIZES), repeats)))
    return (np.array(perceptron.SIZES) ** exponent)[:, None] * noise


@pytest.mark.parametrize(("exponent", "holds"), [(0.9, True), (0.7, False), (1.2, False)])
def test_slopes_outside_the_tolerance_do_not_hold(exponent, holds):
    table = np.stack([law(exponent)] * 3)
    fit = perceptron._pooled({(0, t): table * t for t in perceptron.TEMPERATURES}, 0, 0)
    assert fit.exponent == pytest.approx(exponent, abs=0.05)
    assert perceptron._slope("", fit, 1.0, (0.8, 1.05), 8).holds == holds


@pytest.mark.parametrize(("ratio", "holds"), [(4.0, True), (1.0, False), (16.0, False)])
def test_what_is_not_linear_in_T_does_not_hold(ratio, holds):
    table = np.stack([law(1.0)] * 3)
    claims = perceptron._linearity({(0, 1.0): table, (0, 4.0): ratio * table}, 0)
    assert [claim.holds for claim in claims] == [holds, holds]


@pytest.mark.parametrize(("level", "exponent", "holds"), [(1.0, 0.0, True), (0.5, 0.0, False), (1.0, 0.3, False)])
def test_a_noise_that_is_off_or_grows_does_not_hold(level, exponent, holds):
    noise = level * math.sqrt(perceptron.DIM) / 2 * law(exponent, 0.01) / 128**exponent
    grid = {(0, t): np.stack([noise * t] * 3) for t in perceptron.TEMPERATURES}
    assert perceptron._noise(grid, 0).holds == holds


@pytest.fixture
def laboratory(monkeypatch):
    """Runs whose weights move by 0.2 (1 + T √P) / max(α, 1); nothing is trained. Some of them do not end."""

    def runs(alphas, temperatures, num_examples, *, seed, **_):
        return [
            [
                {
                    "change": scale(alpha) * (1 + t * num_examples**0.5) * (1 + 0.01 * seed),
                    "error": 0.1,
                    "time": t,
                    "fitted": len(alphas) == 1 or alpha < 50 or t > 0.03,
                }
                for alpha in alphas
            ]
            for t in temperatures
        ]

    monkeypatch.setattr(network, "parity_runs", runs)
    return Laboratory(quick=False)


def scale(alpha):
    return 0.2 / max(alpha, 1.0)


def test_claims_on_the_network_follow_the_data(laboratory):
    def first(alphas):
        return np.array([[scale(alpha), 1.01 * scale(alpha)] for alpha in alphas])

    claims, _ = network._regimes(laboratory, 2, 512, first(network.ALPHAS), 0.03, network.ALPHAS)
    # Where the weights stop depending on α, the claim of the paper's diagram holds and ours does not.
    assert [claim.holds for claim in claims][1:] == [True, False]
    claims, panel = network._noise(laboratory, 3)
    assert [claim.holds for claim in claims][:3] == [True, True, True]
    sizes = np.array(network.SIZES)
    expected = power_law_fit(sizes, sizes**-0.5 + 0.02).exponent  # from 1 + T √P = 2 (1 + 0.01 √P)
    measured = re.search(r"P\^\((\S+) ", claims[1].measured)
    assert float(measured[1]) == pytest.approx(expected, abs=0.03)
    assert len(panel.lines) == len(network.SIZES)


def test_the_diagram_has_empty_cells_where_nothing_was_fitted(laboratory):
    found = network._runs(laboratory, "map", 3, network.ALPHAS, network.TEMPERATURES, 512)
    assert found["change"].shape == (5, 9, 3)
    assert np.isnan(found["change"][0, -1]).all()
    heat = network._heat("", network.ALPHAS, network.TEMPERATURES, found["change"].mean(-1), "", log=True).heat
    assert heat.values[0][-1] is None
    assert heat.values[1][-1] == pytest.approx(0.002 * (1 + 0.1 * 512**0.5) * 1.01)
    result = StudyResult("", "", "", "", [], [], True, 0.0)
    assert StudyResult.from_json(result.to_json()) == result


def runs_that_end(ended, change=None):
    """`parity_runs` whose weights move by 1 + T and which end where `ended(T, seed)`."""

    def runs(alphas, temperatures, num_examples, *, seed, **_):
        found = {"error": 0.1, "time": 1.0}
        moved = change or (lambda t: 0.2 * (1 + t))
        return [
            [{**found, "change": moved(t) / max(alpha, 1), "fitted": ended(t, seed)} for alpha in alphas]
            for t in temperatures
        ]

    return runs


def numbers_of(panel):
    return [y for line in panel.lines for y in line.y]


@pytest.mark.parametrize("ended", [lambda t, seed: seed > 0, lambda t, seed: False])
def test_a_network_that_never_fits_breaks_its_claims_and_not_the_study(monkeypatch, ended):
    monkeypatch.setattr(network, "parity_runs", runs_that_end(ended))
    claims, panels = network.network_claims(Laboratory(quick=False))
    judged = [claim for claim in claims if claim.holds is not None]
    assert len(judged) == 7
    assert not any(claim.holds for claim in judged)
    assert all("never" in claim.measured for claim in judged)
    assert all(np.isfinite(numbers_of(panel)).all() for panel in panels)


def test_a_temperature_that_is_never_reached_breaks_its_claim(monkeypatch):
    """The weights hardly move with T, so that neither T_c is on the grid."""
    monkeypatch.setattr(network, "parity_runs", runs_that_end(lambda t, seed: True, lambda t: 0.2 + 0.001 * t))
    claims, _ = network._noise(Laboratory(quick=False), 3)
    assert [claim.holds for claim in claims] == [True, False, False, None]
    assert all("never reached" in claim.measured for claim in claims[1:3])


@pytest.mark.parametrize("missing", [(0, 0), (-1, -1), (0, -1)])
def test_a_cell_that_did_not_end_breaks_the_claim_on_the_diagram(missing):
    change = np.full((2, 2, 3), 1.0)
    change[0, -1] = 0.01
    table = {"change": change, "error": np.full((2, 2, 3), 0.1)}
    assert network._diagram(table, (0.1, 10.0), (0.1, 1.0))[0][0].holds
    change[missing] = math.nan
    table["error"][missing] = math.nan
    claims, _ = network._diagram(table, (0.1, 10.0), (0.1, 1.0))
    assert claims[0].holds is False
    assert "never reached" in claims[0].measured


@pytest.mark.parametrize("fitted", [False, True])
def test_a_perceptron_that_never_gets_there_breaks_its_claims_and_not_the_study(monkeypatch, fitted):
    """Runs that do not end, and runs that end at the same small weights whatever T."""

    def runs(settings):
        return [{"signal": 0.1, "noise": 0.1, "time": 1.0, "fitted": fitted} for _ in settings]

    monkeypatch.setattr(perceptron, "perceptron_runs", runs)
    claims, panels = perceptron.perceptron_claims(Laboratory(quick=True))
    found = {claim.statement: claim for claim in claims}
    flat = "Perceptron: for T far below the margin κ the noise does not matter"  # which it does not
    assert [claim.statement for claim in claims if claim.holds] == ([flat] if fitted else [])
    for chi in perceptron.CHIS:
        claim = found[f"Perceptron: the T at which ‖w‖ leaves a fixed size falls as P^(−γ/δ), χ = {chi}"]
        assert claim.holds is False
        assert "never reached" in claim.measured
    assert "never reached" in found["Perceptron: the collapse on T ends near B* = P^(1/(1+χ)) = 16"].measured
    assert "never reached" in found["Perceptron: the noise takes over where T passes κ"].measured
    assert all(np.isfinite(numbers_of(panel)).all() for panel in panels)


def test_real_runs_have_the_shape_of_the_diagram():
    settings = {"width": 16, "batch_size": 4, "num_test": 50, "seed": 0, "max_updates": 500}
    rows = parity_runs([10.0, 100.0], [0.3, 1.0], 24, **settings)
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][0]["change"] > rows[0][1]["change"]
    assert set(rows[0][0]) == {"fitted", "time", "updates", "change", "error"}
