"""The parts of the study of SAM late in training: linear maps, copies of networks, late phases, attacks, verdicts."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers import SAM, SwitchSchedule
from sharpscope.dynamics.studies import late_training, sam_late_claims, sam_stability_claims
from sharpscope.dynamics.studies.adversarial import pgd_attack
from sharpscope.dynamics.studies.claim_numbers import listed, paired, with_spread
from sharpscope.dynamics.studies.late_training import LOSSES, STEPS_PER_EPOCH, DigitsTraining
from sharpscope.dynamics.studies.sam_escape import (
    Copies,
    Minimum,
    full_batch_run,
    leading_moment,
    lyapunov_exponent,
    output_of,
    radius,
    rho_with_threshold,
)
from sharpscope.dynamics.studies.sam_linear import closed_forms, mean_square_curve, operator_check
from torch import nn

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def minimum():
    return Minimum(0, 0.3)


# --- linear maps ----------------------------------------------------------------------------------------------------


def test_second_moments_are_those_of_the_dense_operator():
    random = torch.Generator().manual_seed(0)
    g = torch.randn(5, 3, generator=random, dtype=DOUBLE)
    lr, rho = 0.1, 0.2
    maps = [torch.eye(3, dtype=DOUBLE) - lr * (1 + rho * float(x @ x)) * torch.outer(x, x) for x in g]
    dense = sum(torch.kron(J, J) for J in maps) / 5
    X = torch.eye(3, dtype=DOUBLE)
    found = mean_square_curve(g, lr, rho, 3, X)
    assert torch.allclose(found[3].reshape(-1), torch.linalg.matrix_power(dense, 3) @ X.reshape(-1))
    # The whole space is spanned, so the radius is that of the dense operator.
    assert radius(g, lr, rho) == pytest.approx(float(torch.linalg.eigvalsh(dense).abs().max()), rel=1e-8)


def test_the_operator_check_has_its_order():
    found = operator_check(3, runs=20_000)
    assert found["sgd"] < 1 < found["sam"]
    assert bool(np.all(np.diff(found["thresholds"]) < 0))
    for simulated, exact, error in zip(found["simulated"], found["exact"], found["error"], strict=False):
        assert abs(simulated - exact) < 4 * error
    assert found["exact"][-1] == pytest.approx(found["sam"], rel=1e-6)


def test_closed_forms_of_one_dimension():
    found = closed_forms()
    assert found["curvature"] == pytest.approx(5.4031242374328485, abs=1e-10)
    assert found["curvature_formula"] == pytest.approx(5.4031242374328485, abs=1e-12)
    assert found["amplitude"] == pytest.approx(1 / 6, abs=1e-10)
    assert found["period"] < 1e-10


def test_the_lyapunov_exponent_of_one_example_is_the_log_of_its_factor():
    g = torch.tensor([[1.5]], dtype=DOUBLE)
    expected = math.log(abs(1 - 0.8 * (1 + 0.3 * 2.25) * 2.25))
    assert lyapunov_exponent(g, 0.8, 0.3, steps=50, runs=2) == pytest.approx([expected] * 2, rel=1e-12)
    # Orthogonal examples: each coordinate is shrunk or grown in half of the steps, so the larger exponent wins.
    two = torch.diag(torch.tensor([1.0, 0.1], dtype=DOUBLE))
    rates = lyapunov_exponent(two, 0.5, 0.0, steps=4000, runs=4)
    assert rates == pytest.approx([0.5 * math.log(1 - 0.005)] * 4, rel=0.1)


# --- copies and minima ----------------------------------------------------------------------------------------------


def test_sam_on_copies_is_sam_on_each():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    starts = torch.randn(3, 21, dtype=DOUBLE)
    copies = Copies(network, starts)
    x, y = torch.randn(3, 2, 3, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    output = output_of(network)

    def step(parameters, loss):
        sam = SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.3, normalize=False)

        def closure():
            sam.zero_grad()
            value = loss()
            value.backward()
            return value

        sam.step(closure)

    step(copies.parameters(), lambda: (copies(x) - y).square().mean(1).sum())
    for r in range(3):
        one = nn.Parameter(starts[r].clone())
        step([one], lambda one=one, r=r: (output(one, x[r]) - y[r]).square().mean())
        assert torch.allclose(copies.weights[r], one, rtol=1e-10)
    nn.utils.vector_to_parameters(copies.weights.detach()[1], network.parameters())
    assert torch.allclose(network(x[0]).squeeze(-1), copies(x[0])[1])


def test_the_minimum_fits_every_example_and_sgd_stays(minimum):
    assert float(minimum.losses(minimum.theta.unsqueeze(0))) < 1e-25
    jacobian = minimum.jacobian(minimum.theta)
    nn.utils.vector_to_parameters(minimum.theta, minimum.network.parameters())
    minimum.network.zero_grad()
    minimum.network(minimum.inputs[2:3]).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in minimum.network.parameters()])
    assert torch.allclose(jacobian[2], gradient)
    assert radius(jacobian, minimum.lr) < 1


def test_rho_has_the_threshold_asked_for(minimum):
    jacobian = minimum.jacobian(minimum.theta)
    rho = rho_with_threshold(jacobian, 0.2)
    assert radius(jacobian, 0.2 * 0.999, rho) < 1 < radius(jacobian, 0.2 * 1.001, rho)
    with pytest.raises(ValueError, match="SGD is stable only below"):
        rho_with_threshold(jacobian, 10.0)


def test_the_leading_moment_grows_by_the_radius_at_once(minimum):
    jacobian = minimum.jacobian(minimum.theta)
    rho = rho_with_threshold(jacobian, 0.25)
    root = leading_moment(jacobian, 0.3, rho)
    basis, factors = torch.linalg.qr(jacobian.T)
    moment = basis.T @ root @ root.T @ basis
    assert float(moment.trace()) == pytest.approx(1.0)
    after = mean_square_curve(factors.T, 0.3, rho, 1, moment)[1]
    assert torch.allclose(after, radius(jacobian, 0.3, rho) * moment, atol=1e-7)


def test_full_batch_sam_escapes_at_the_predicted_rate():
    found = full_batch_run(0, 0.3, 1.1, 5)
    assert found["predicted"] == pytest.approx(1.2**2)  # 1 - 2 * 1.1 squared
    assert found["growth"] == pytest.approx([found["predicted"]] * 5, rel=1e-5)


# --- late phases ----------------------------------------------------------------------------------------------------


def test_a_late_phase_is_that_of_a_switch_schedule():
    run, other = (DigitsTraining(0, LOSSES["cross-entropy"]) for _ in range(2))
    run.train([0])
    run.train([1], sam=True)
    sgd = torch.optim.SGD(other.model.parameters(), lr=late_training.LR)
    schedule = SwitchSchedule([(0, sgd), (STEPS_PER_EPOCH, SAM(sgd, rho=late_training.RHO))], carry_momentum=True)
    for step in range(2 * STEPS_PER_EPOCH):
        inputs, targets = other.batch(step)

        def closure(inputs=inputs, targets=targets):
            schedule.zero_grad()
            loss = other.loss(other.model(inputs), targets)
            loss.backward()
            return loss

        schedule.step(closure)
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_epoch_has_18_full_batches_without_repetition():
    run = DigitsTraining(3, LOSSES["squares"])
    seen = torch.cat([run.batch(STEPS_PER_EPOCH + step)[0] for step in range(STEPS_PER_EPOCH)])
    assert len(seen) == len(torch.unique(seen, dim=0)) == 576
    assert not torch.equal(run.batch(0)[0], run.batch(STEPS_PER_EPOCH)[0])
    test = {tuple(row.tolist()) for row in run.test[0]}
    assert not any(tuple(row.tolist()) in test for row in run.inputs)


def test_late_runs_share_the_run_before_the_switch():
    found = late_training.late_run(0, "cross-entropy", epochs=4, late=[0, 1, 4], reverse=1)
    assert set(found) == {"0", "1", "4", "reverse"}
    run = DigitsTraining(0, LOSSES["cross-entropy"])
    run.train(range(3))
    assert found["1"]["switch_loss"] == run.objective().loss()
    start = run.weights()
    run.train([3], sam=True)
    assert found["1"]["loss"] == run.objective().loss()
    assert found["1"]["segment"] >= max(found["1"]["loss"], found["1"]["switch_loss"])
    run.model.load_state_dict(start)
    run.train([3])
    assert found["0"]["loss"] == found["0"]["across"] == run.objective().loss()
    assert found["0"]["error"] == run.error(*run.test)


def test_the_switch_is_watched_from_both_sides():
    found = late_training.switch_run(0, "squares", epochs=2, before=1, after=5, every=6)
    assert found["step"][0] == -STEPS_PER_EPOCH
    assert [t for t in found["step"] if 0 <= t <= 60] == list(range(61))
    assert found["sgd_step"] == [t for t in found["step"] if t >= 0]
    assert found["sgd_loss"][0] == found["loss"][found["step"].index(0)]
    assert found["sharp_step"][:2] == [0, 36]


# --- attacks --------------------------------------------------------------------------------------------------------


def test_an_attack_on_a_linear_model_goes_to_the_corner_of_the_box():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    x = 0.3 + 0.4 * torch.rand(5, 6)
    found = pgd_attack(model, lambda out, _: out.sum(), x, x, radius=0.1, step=0.05, num_steps=2)
    assert torch.allclose(found, x + 0.1 * model.weight.detach().sign())
    assert model.weight.grad is None
    near = torch.full((1, 6), 0.98)
    edged = pgd_attack(model, lambda out, _: out.sum(), near, near, radius=0.1, step=0.1)
    expected = torch.where(model.weight.detach() > 0, 1.0, 0.88)
    assert torch.allclose(edged, expected)


def test_a_random_start_is_within_the_box_and_another_one():
    model, x = nn.Linear(4, 1), torch.full((100, 4), 0.02)
    random = torch.Generator().manual_seed(0)
    options = {"radius": 0.1, "step": 0.05, "num_steps": 0}
    found = pgd_attack(model, lambda out, _: out.sum(), x, x, **options, random_start=random)
    assert bool((found >= 0).all())
    assert bool(((found - x).abs() <= 0.1 + 1e-7).all())
    assert float(found.std()) > 0.02
    assert torch.equal(pgd_attack(model, lambda out, _: out.sum(), x, x, **options), x)


def test_adversarial_training_makes_robust():
    found = late_training.adversarial_run(0, epochs=12, late=[0, 6, 12])
    assert found["6"]["robust"] < found["0"]["robust"] - 5
    assert found["0"]["error"] < found["0"]["robust"]


# --- verdicts -------------------------------------------------------------------------------------------------------


def late_parts(sharpness, **others):
    base = {"plain": 1.0, "loss": 0.5, "switch_loss": 0.5, "error": 2.0, "segment": 0.5, "across": 0.5}
    return [{name: {**base, "sharpness": value, **others.get(name, {})} for name, value in sharpness.items()}]


def test_verdicts_on_sharpness_and_its_gap():
    good = late_parts({"0": 2.0, "10": 1.5, "100": 1.1, "200": 1.0, "reverse": 1.2})
    strict, ten, hundred = sam_late_claims.sharpness_claims("cross-entropy", good, whole=True)
    assert (strict.holds, ten.holds, hundred.holds) == (True, True, True)
    assert sam_late_claims.gap_closed(good, 10) == (0.5, [0.5])
    bad = late_parts({"0": 2.0, "10": 1.7, "100": 1.75, "200": 1.0, "reverse": 1.8})
    strict, ten, hundred = sam_late_claims.sharpness_claims("cross-entropy", bad, whole=True)
    assert (strict.holds, ten.holds, hundred.holds) == (False, False, False)
    back, stays = (sam_late_claims.reverse_claim(runs, 40, whole=True) for runs in (bad, good))
    assert (back.holds, stays.holds) == (True, False)
    # What the reference run found is told only where it is alike.
    assert ".786" not in back.note
    assert "720 steps of SGD, which end at 6 %" in stays.note
    short = sam_late_claims.reverse_claim(good, 5, whole=False)
    assert short.holds is None
    assert "in the last 5 epochs" in short.statement


def test_sgd_alone_is_compared_with_the_reference_in_numbers():
    runs = late_parts({"0": 2.53, "10": 1.5, "200": 1.0, "reverse": 1.2})
    note = sam_late_claims.sharpness_claims("cross-entropy", runs, whole=True)[0].note
    assert "2.00 times the figure of the reference" in note


def test_the_connection_of_sgd_and_late_sam_is_judged_without_sam_throughout():
    names = {"0": 1.0, "10": 1.0, "200": 1.0, "reverse": 1.0}
    flat = late_parts(names, **{"10": {"across": 0.51, "loss": 0.505}, "200": {"across": 0.6}})
    high = late_parts(names, **{"10": {"across": 0.53, "loss": 0.505}})
    found = sam_late_claims.connection_claim("squares", flat, whole=True)
    assert found.holds
    assert found.measured == "10 epochs: 1.0099; SAM throughout: 1.2000"
    assert not sam_late_claims.connection_claim("squares", high, whole=True).holds
    assert sam_late_claims.connection_claim("squares", high, whole=False).holds is None


def test_verdicts_on_the_valley_and_the_phases():
    names = {"0": 1.0, "10": 1.0, "200": 1.0, "reverse": 1.0}
    flat = late_parts(names, **{"10": {"segment": 0.51, "switch_loss": 0.505}})
    high = late_parts(names, **{"10": {"segment": 0.53, "switch_loss": 0.505}})
    assert sam_late_claims.valley_claim("squares", flat, whole=True).holds
    assert not sam_late_claims.valley_claim("squares", high, whole=True).holds
    run = {"step": [-6, 0, 30, 70, 100], "loss": [1.2, 1.0, 1.1, 1.3, 0.5], "sgd_step": [0, 6], "sgd_loss": [1.0, 0.9]}
    assert sam_late_claims.phases_claim("squares", [run], whole=True).holds
    for loss in ([1.2, 1.0, 0.9, 1.3, 0.5], [1.2, 1.0, 1.1, 1.3, 1.05]):
        assert not sam_late_claims.phases_claim("squares", [{**run, "loss": loss}], whole=True).holds
    noisy = sam_late_claims.phases_claim("squares", [{**run, "sgd_loss": [1.0, 1.1]}, run], whole=True)
    assert not noisy.holds
    assert "in 1 of 2 seeds" in noisy.note


def test_the_typical_slope_is_read_where_growth_is_exponential():
    steps = list(range(0, 400, 2))
    loss = [[min(1e-14 * math.exp(0.1 * t), 1e-3), min(1e-13 * math.exp(0.1 * t), 1e-3)] for t in steps]
    run = {"long_step": steps, "long_loss": loss}
    assert sam_stability_claims.typical_slope(run) == pytest.approx(0.1)
    blocks = [[1e-14 * 1.2**t * (1 + 0.01 * (-1) ** b) for b in range(10)] for t in range(6)]
    common = {"sgd": 0.99, "lyapunov": [0.05], **run, "loss": blocks}
    full = [{"growth": [1.44], "predicted": 1.44}]

    def holds(**changed):
        return [claim.holds for claim in sam_stability_claims.escape_claims([{**common, "sam": 1.2, **changed}], full)]

    assert holds(
        loss=[[x * (1 + 1e-3 * t * (-1) ** b) for b, x in enumerate(row)] for t, row in enumerate(blocks)]
    ) == [
        True,
        True,
        True,
    ]
    noisy = [[x * (1 + 1e-3 * t * (-1) ** b) for b, x in enumerate(row)] for t, row in enumerate(blocks)]
    assert holds(loss=noisy, sam=1.25)[0] is False
    assert holds(loss=noisy, lyapunov=[0.06])[1] is False


def test_numbers_as_claims_show_them():
    assert listed([1.23456, None]) == "1.23, never"
    assert paired([1.0], [0.1], ".1f") == "1.0 ± 0.1"
    assert with_spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert with_spread([1.0], ".1f") == "1.0"
