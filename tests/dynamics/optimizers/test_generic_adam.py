"""Generic Adam: its limits, its schedules, its weights, its threshold."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.convergence_condition import second_moment_weights
from sharpscope.dynamics.optimizers.generic_adam import GenericAdam
from sharpscope.dynamics.optimizers.schedules import (
    CorrectedTheta,
    MomentumCorrection,
    PaperTheta,
    PolynomialTheta,
    PowerSchedule,
    practical,
    schedule_of,
)
from torch import nn

SCHEDULES = [
    PowerSchedule(0.5),
    PaperTheta(0.25),
    PaperTheta(1.0, base=0.01),
    PolynomialTheta(1.0, c=5.0, start=20),
    CorrectedTheta(0.999),
    MomentumCorrection(0.9),
]


def parameter():
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def gradient(t):
    return torch.sin(torch.arange(1.0, 4.0, dtype=torch.float64) * (t + 1)) + 0.3


def test_a_constant_theta_is_adam_without_correction():
    mine, theirs = parameter(), parameter()
    ours = GenericAdam([mine], lr=0.01, theta=0.95, beta=0.8, v0=0.0, eps=0.0, lr_schedule="s=0.5")
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=0.0, foreach=False)
    for t in range(1, 201):
        mine.grad, theirs.grad = gradient(t), gradient(t)
        adam.param_groups[0]["lr"] = 0.01 * t**-0.5 * (1 - 0.8**t) / math.sqrt(1 - 0.95**t)
        ours.step()
        adam.step()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_one_minus_one_over_t_forgets_the_start_and_takes_the_mean():
    p = parameter()
    optimizer = GenericAdam([p], theta="r=1", v0=7.0)
    squares = []
    for t in range(50):
        p.grad = gradient(t)
        squares.append(p.grad.square())
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], torch.stack(squares).mean(0), rtol=1e-12, atol=0)


def test_the_corrected_theta_keeps_adams_corrected_second_moment():
    p, q = parameter(), parameter()
    ours = GenericAdam([p], theta=CorrectedTheta(0.999))
    adam = torch.optim.Adam([q], betas=(0.9, 0.999), foreach=False)
    for t in range(1, 300):
        p.grad, q.grad = gradient(t), gradient(t)
        ours.step()
        adam.step()
        corrected = adam.state[q]["exp_avg_sq"] / (1 - 0.999**t)
        torch.testing.assert_close(ours.state[p]["exp_avg_sq"], corrected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("theta", ["r=0.5", "theta_r=1.0,c=3.0,start=9", 0.97])
def test_the_second_moment_is_the_weighted_sum_of_squares(theta):
    T, p = 60, parameter()
    optimizer = GenericAdam([p], theta=theta, v0=2.0)
    squares = []
    for t in range(T):
        p.grad = gradient(t)
        squares.append(p.grad.square().numpy().copy())
        optimizer.step()
    weights, rest = second_moment_weights(theta, T)
    assert weights.sum() + rest == pytest.approx(1.0, abs=1e-14)
    expected = weights @ np.array(squares) + rest * 2.0
    np.testing.assert_allclose(optimizer.state[p]["exp_avg_sq"].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_is_its_text(schedule):
    again = schedule_of(str(schedule))
    assert again == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    t = np.arange(1.0, 500.0)
    np.testing.assert_array_equal(again.values(t), [schedule(int(k)) for k in t])


def test_schedules_follow_their_formulas():
    for t in (1, 2, 10, 1000):
        assert PowerSchedule(0.5)(t) == pytest.approx(1 / math.sqrt(t))
        assert PaperTheta(0.25)(t) == pytest.approx(1 - (0.001 + 0.999 * 0.25) / t**0.25)
        assert PolynomialTheta(0.5, c=0.3, start=7)(t) == pytest.approx(1 - 0.3 / max(t, 7) ** 0.5)
        assert MomentumCorrection(0.9)(t) == pytest.approx(1 / (1 - 0.9**t))
        assert CorrectedTheta(0.99)(t) == pytest.approx(0.99 * (1 - 0.99 ** (t - 1)) / (1 - 0.99**t), abs=1e-14)
    assert PaperTheta(0)(17) == pytest.approx(0.999)
    assert practical(400, 4.0, a=2.0, batch_size=16) == pytest.approx({"lr": 0.4, "theta": 0.99})


def test_any_function_of_the_step_number_is_a_schedule():
    p, q = parameter(), parameter()
    by_function = GenericAdam([p], theta=lambda t: 1 - 0.5 / t, lr_schedule=lambda t: t**-0.25)
    by_text = GenericAdam([q], theta="theta_r=1.0,c=0.5", lr_schedule="s=0.25")
    for t in range(20):
        p.grad, q.grad = gradient(t), gradient(t)
        by_function.step()
        by_text.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_schedules_survive_saving_with_weights_only_and_stand_in_options_as_text():
    p = parameter()
    optimizer = GenericAdam([p], theta=PolynomialTheta(1.0, c=5.0, start=20), lr_schedule=PowerSchedule(0.5))
    p.grad = gradient(0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = GenericAdam([parameter()], theta=0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["theta"] == "theta_r=1.0,c=5.0,start=20"
    assert copy.deepcopy(optimizer).param_groups[0]["lr_schedule"] == "s=0.5"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"theta": 1.0}, "theta"),
        ({"theta": "q=0.5"}, "names no schedule"),
        ({"theta": "r=often"}, "'often' is no number"),
        ({"theta": "r=0.5,speed=2"}, "has no 'speed'"),
        ({"theta": "r=2"}, "`r` is 2"),
        ({"theta": None}, "theta"),
        ({"beta": -0.1}, "beta"),
        ({"v0": -1.0}, "v0"),
        ({"lr_schedule": "s=-1"}, "`s` is -1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        GenericAdam([parameter()], **options)


def test_a_schedule_that_leaves_its_range_is_caught_at_that_step():
    p = parameter()
    optimizer = GenericAdam([p], theta=lambda t: 0.5 * t)
    p.grad = gradient(0)
    optimizer.step()
    with pytest.raises(ValueError, match="at step 2 the schedules give"):
        optimizer.step()


def test_its_preconditioner_is_what_the_step_divides_by():
    p = parameter()
    optimizer = GenericAdam([p], lr=0.1, theta="r=0.5", lr_schedule="s=0.5", weight_decay=0.2)
    for t in range(5):
        p.grad, before = gradient(t), p.detach().clone()
        P = optimizer.preconditioner(p, p.grad)
        optimizer.step()
        torch.testing.assert_close(optimizer.preconditioner(p), P, rtol=1e-12, atol=0)
        moved = (before - p.detach()) * P / (0.1 * (t + 1) ** -0.5)
        torch.testing.assert_close(moved, optimizer.state[p]["exp_avg"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("beta", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.6, 0.7)])
def test_its_threshold_is_the_onset_of_divergence(beta, decay):
    curvature = torch.tensor([0.3, 2.5, 1.1], dtype=torch.float64)

    def grows(lr):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = GenericAdam([p], lr=lr, theta=1 - 1e-15, beta=beta, v0=4.0, eps=0.5, weight_decay=decay)
        for _ in range(2000):
            p.grad = 2.5 * curvature * p.detach() - decay * p.detach()  # P (h − λ/P): P is 2 + 0.5
            optimizer.step()
            if float(p.detach().abs().max()) > 1e3:
                return True
        return float(p.detach().abs().max()) > 1

    low, high = 0.0, 1000.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    optimizer = GenericAdam([parameter()], lr=low, beta=beta, weight_decay=decay)
    assert optimizer.stability_threshold() == pytest.approx(2.5, rel=3e-3)
    assert optimizer.coupled_weight_decay(optimizer.param_groups[0]) == decay


def test_the_threshold_is_that_of_the_next_step_and_unknown_where_steps_differ():
    p, q = parameter(), parameter()
    optimizer = GenericAdam([p, q], lr=0.1, beta=0.5, lr_schedule="s=0.5")
    assert optimizer.stability_threshold() == pytest.approx(2 * 1.5 / (0.5 * 0.1))
    p.grad = gradient(0)
    optimizer.step()
    assert optimizer.stability_threshold() is None
    optimizer.param_groups[0]["lr_schedule"] = 1.0
    assert optimizer.stability_threshold() == pytest.approx(60)
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.stability_threshold() is None
