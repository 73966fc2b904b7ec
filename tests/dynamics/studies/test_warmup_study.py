"""The parts of the study of warmup on short runs, and how its claims are judged."""

import math

import pytest
from sharpscope.dynamics.studies import warmup as module
from sharpscope.dynamics.studies import warmup_mechanisms as mechanisms
from sharpscope.dynamics.studies import warmup_runs as runs
from sharpscope.dynamics.studies import warmup_training as training
from sharpscope.dynamics.studies.laboratory import Laboratory


class Told:
    """A laboratory that returns what it is told, by the first word of the part's name."""

    quick = True

    def __init__(self, **values):
        self.values = values

    def part(self, name, compute, **settings):
        value = self.values[name.split("-")[0]]
        return value(name, **settings) if callable(value) else value


def test_the_first_step_of_adam_and_gi_adam():
    found = runs.first_step(seed=4)
    assert found["parameters"] == 1032
    assert found["gi"] / found["adam"] == pytest.approx(math.sqrt(0.001), rel=5e-3)
    assert max(found["adam_error"], found["gi_error"], found["P_error"]) < 1e-9


def test_exact_claims_hold():
    claims = module._exact(Laboratory(quick=True))
    assert [claim.holds for claim in claims] == [True, None, True, True]


def test_the_companion_matrix_crosses_the_unit_circle_at_the_threshold():
    for beta in (0.0, 0.5, 0.9):
        assert runs.companion_radius(1 - 1e-5, beta) < 1 < runs.companion_radius(1 + 1e-5, beta)


def test_the_bracket_of_a_parabola():
    for curvature in (0.5, 200.0):
        found = runs.parabola(curvature, 0.1)
        assert found["low"] < found["lr"] <= found["high"]


@pytest.mark.parametrize("init", [0.0, 0.3, 0.9, 1.5])
def test_the_step_at_which_the_target_is_reached(init):
    assert abs(runs.reached(1.0, init, 50) - max(1, 50 * (1 - min(1.0, init)))) <= 1


def test_a_run_without_warmup_diverges_where_a_warmed_one_trains():
    rate = 64 / runs.initial(0, zero_output=False)["sharpness"]
    assert runs.warmed(0, rate, 1, 20)["diverged"]
    warmed = runs.warmed(0, rate, 64, 20, measure_every=10)
    assert not warmed["diverged"]
    assert warmed["loss"][-1] < warmed["loss"][0]
    assert len(warmed["loss"]) == 21
    assert warmed["step"] == [0, 10, 20]
    assert warmed["threshold"] == pytest.approx([2 * 64 / rate, 2 * 64 / (11 * rate), 2 * 64 / (21 * rate)])
    assert warmed["sharpness"][-1] * rate == pytest.approx(warmed["edge"], rel=0.05)


def test_zero_output_starts_at_zero():
    net = runs.Net(0, zero_output=True)
    assert net.loss() == pytest.approx(0.05, rel=1e-12)  # half the mean square of one-hot targets
    assert net.backward() == net.loss()


def test_standard_weights_flatten_in_the_first_step():
    found = runs.natural(0, share=0.5, steps=2, every=1, zero_output=False)
    assert found["second"] < found["first"]
    assert found["sharpness"][0] == pytest.approx(found["first"], rel=1e-2)
    assert found["sharpness"][1] == pytest.approx(found["second"], rel=1e-2)


def test_adam_and_gi_adam_start_alike_and_depend_on_their_arguments_only():
    first, again = (runs.adaptive("Adam", 0, 1e-3, 3, activation="tanh", measure_every=3) for _ in range(2))
    gi = runs.adaptive("GI-Adam", 0, 1e-3, 3, activation="tanh")
    assert first == again
    assert first["loss"][0] == gi["loss"][0]
    assert first["loss"][1] != gi["loss"][1]
    assert first["step"] == [0, 3]
    assert first["threshold"] == pytest.approx(38e3)


def adaptive(largest, final, initial=1.0):
    return {"loss": [initial, largest, final], "accuracy": 0.5}


@pytest.mark.parametrize(
    ("adam", "gi", "holds"),
    [
        (
            {0.032: (50, 1), 0.128: (1e5, 0.05), 1.25e-4: (1, 0.02)},
            {0.032: (1, 0.1), 0.128: (1, 0.001), 1.25e-4: (1, 0.09)},
            3,
        ),
        (
            {0.032: (9, 1), 0.128: (1e5, 0.05), 1.25e-4: (1, 0.09)},
            {0.032: (1, 0.1), 0.128: (1, 0.04), 1.25e-4: (1, 0.02)},
            0,
        ),
        (
            {0.032: (50, 1), 0.128: (1e5, 0.05), 1.25e-4: (1, 0.09)},
            {0.032: (1.1, 1), 0.128: (1, 0.04), 1.25e-4: (1, 0.02)},
            0,
        ),
    ],
)
def test_the_claims_about_failure(adam, gi, holds):
    def told(name, *, method, lr, **_):
        return adaptive(*(adam if method == "Adam" else gi)[lr])

    claims, panel = training.failure(Told(**{"Adam": told, "GI": told}))
    assert [claim.holds for claim in claims] == [bool(holds)] * 3
    assert [line.label for line in panel.lines] == ["Adam", "GI-Adam"]


def boundary_rows(diverges, edge=2.0):
    def told(name, *, warmup_steps, shares, **_):
        return [
            {"c": c, "diverged": diverges(warmup_steps, c), "edge": edge, "final": 1e-3 if c > 8 else 1e-2}
            for c in shares
        ]

    return Told(boundary=told, initial={"sharpness": 30.0})


def test_the_claims_about_the_boundary():
    claims, panel = training.boundary(boundary_rows(lambda T, c: T == 1 and c >= 16))
    assert [claim.holds for claim in claims] == [None, True, True, True, True]
    assert panel.heat.values[0] == [1e-2, None]
    claims, _ = training.boundary(boundary_rows(lambda T, c: T == 16 and c >= 16, edge=2.5))
    assert [claim.holds for claim in claims] == [None, False, False, False, True]
    claims, _ = training.boundary(boundary_rows(lambda T, c: c >= 16))
    assert [claim.holds for claim in claims] == [None, True, False, False, False]


def trending(growth, first_step):
    return {
        "loss": [1.0, 0.9, 0.8],
        "step": [0, 1, 2],
        "sharpness": [10.0, 10.0 * growth, 10.0 * growth**2],
        "threshold": [100.0] * 3,
        "first": 10.0,
        "second": 10.0 * first_step,
    }


@pytest.mark.parametrize(
    ("standard", "zero", "holds"),
    [
        (trending(0.8, 0.9), trending(1.2, 0.999), True),
        (trending(0.8, 1.1), trending(1.2, 0.999), False),
        (trending(0.8, 0.9), trending(1.0, 1.0), False),
        (trending(1.2, 0.9), trending(1.2, 1.0), False),
    ],
)
def test_the_claim_about_natural_trends(standard, zero, holds):
    lab = Told(natural=lambda name, *, zero_output, **_: zero if zero_output else standard)
    assert mechanisms._natural(lab).holds is holds


@pytest.mark.parametrize(("first_step", "lowered"), [(0.999, "1 of 1"), (1.02, "0 of 1")])
def test_the_note_on_the_first_step_from_zero_output_is_counted(first_step, lowered):
    zero, standard = trending(1.2, first_step), trending(0.8, 0.9)
    lab = Told(natural=lambda name, *, zero_output, **_: zero if zero_output else standard)
    assert f"in {lowered} at 0.5 of 2/λ_0" in mechanisms._natural(lab).note


def searched(lr, converged=True):
    return {"lr": lr, "along_gradient": 1.0, "sharpest": 0.9, "converged": converged, "passes": 20}


def test_the_claim_about_the_search():
    lab = Told(search=searched(1.02), parabola=runs.parabola(2.0, 0.1))
    first, second, parabola = module._search(lab)
    assert first.holds
    assert second.holds
    assert parabola.holds
    assert "parabola" not in first.note
    off = module._search(Told(search=searched(1.5), parabola=runs.parabola(2.0, 0.1)))[0]
    assert not off.holds
    assert "1 of 1 searches ended within δ, 1 of them outside" in off.note
    unfinished = module._search(Told(search=searched(1.5, converged=False), parabola=runs.parabola(2.0, 0.1)))[0]
    assert "0 of 1 searches ended within δ, 0 of them outside" in unfinished.note


def test_a_search_that_spends_its_budget_does_not_hold():
    assert module._budget({"a": [searched(1.0)], "b": [searched(1.2)]}).holds
    claim = module._budget({"a": [searched(1.0)], "b": [searched(1.0), searched(1.2, converged=False)]})
    assert not claim.holds
    assert claim.measured == "2 of 3 searches; passes: a 20; b 20, 20 (unfinished)"


def shot(num, near=None):
    """A run of `num` catapults; `near` of its records are at the threshold, after a first one at which it crosses."""
    loss, sharpness = [1.0], [10.0]
    for _ in range(num):
        loss += [2 * loss[-1], 0.9 * loss[-1]]
        sharpness += [sharpness[-1], 0.5 * sharpness[-1]]
    steps = list(range(len(loss)))
    threshold = [11.0] * len(loss)
    if near is not None:
        threshold = [value if i < near else 0.1 * value for i, value in enumerate(sharpness)]
    return {"loss": loss, "step": steps, "sharpness": sharpness, "threshold": threshold, "diverged": False}


@pytest.mark.parametrize(
    ("standard", "zero", "verdicts"),
    [
        (shot(1, near=1), shot(3, near=5), [True, True, True]),
        (shot(0, near=1), shot(3, near=5), [False, False, True]),
        (shot(2, near=2), shot(2, near=4), [True, True, False]),
        (shot(1, near=3), shot(3, near=2), [True, False, True]),
        (shot(1), shot(1), [True, False, False]),
    ],
)
def test_the_claims_about_catapults(standard, zero, verdicts):
    claims = mechanisms._catapults({"standard": [standard], "zero output": [zero]}, steps=8)
    assert [claim.holds for claim in claims] == verdicts
