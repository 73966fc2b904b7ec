"""Sign methods: their limits, invariances, what they leave alone, and why they have no threshold."""

import math

import numpy as np
import pytest
import torch
from given_gradients import noise, run
from sharpscope.dynamics.optimizers import NoPreconditionerError
from sharpscope.dynamics.optimizers.sign import SignSGD, sign_step, theoretical_rates


def test_a_step_moves_every_coordinate_by_the_learning_rate_and_zeros_not_at_all():
    p = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    sign_step(p, torch.tensor([1e-300, -5.0, 0.0, -0.0], dtype=torch.float64), 0.5)
    assert p.tolist() == [0.5, 2.5, 3.0, 4.0]


def test_a_nan_is_seen_in_the_weights():
    p = torch.zeros(3)
    sign_step(p, torch.tensor([math.nan, math.inf, -math.inf]), 0.5)
    assert math.isnan(p[0])
    assert p[1:].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.RMSprop])
def test_adam_and_rmsprop_without_memory_are_signsgd(other):
    gradients = noise()
    memory = {"betas": (0.0, 0.0)} if other is torch.optim.Adam else {"alpha": 0.0}
    theirs = run(other, gradients, lr=0.01, eps=0.0, **memory)
    torch.testing.assert_close(run(SignSGD, gradients, lr=0.01), theirs, rtol=0, atol=1e-14)


def test_signum_is_the_sign_of_the_heavy_ball_buffer():
    """The average and the sum of past gradients differ by a factor."""
    gradients = noise()
    buffer, w = np.zeros(40), np.linspace(-1, 1, 40)
    for g in gradients.numpy():
        buffer = 0.9 * buffer + g
        w = w - 0.01 * np.sign(buffer)
    mine = run(SignSGD, gradients, lr=0.01, momentum=0.9)[-1]
    np.testing.assert_allclose(mine.numpy(), w, rtol=0, atol=1e-14)


def test_positive_factors_of_the_gradient_change_nothing():
    gradients = noise()
    factors = torch.logspace(-6, 6, 40, dtype=torch.float64)
    for momentum in (0.0, 0.9):
        plain = run(SignSGD, gradients, lr=0.01, momentum=momentum)
        assert torch.equal(run(SignSGD, gradients * factors, lr=0.01, momentum=momentum), plain)


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 1e3, 1e9])
def test_a_quadratic_ends_in_a_two_cycle_at_every_sharpness(sharpness):
    """So there is no onset of divergence, and no threshold."""
    lr = 0.02
    p = torch.nn.Parameter(torch.tensor([0.313, -0.271], dtype=torch.float64))
    optimizer = SignSGD([p], lr=lr)
    path = []
    for _ in range(60):
        p.grad = sharpness * p.detach()
        optimizer.step()
        path.append(p.detach().clone())
    assert optimizer.stability_threshold() is None
    torch.testing.assert_close(path[-1], path[-3], rtol=0, atol=1e-15)
    assert bool((path[-1].abs() <= lr).all())
    assert bool((torch.maximum(path[-1].abs(), path[-2].abs()) >= lr / 2 - 1e-15).all())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_preconditioner_turns_the_direction_into_its_sign(momentum):
    p = torch.nn.Parameter(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    optimizer = SignSGD([p], lr=0.1, momentum=momentum)
    m = torch.zeros(6, dtype=torch.float64)
    for t in range(3):
        g = noise(1, 6, seed=t)[0]
        g[0] = 0.0
        before = p.detach().clone()
        m = momentum * m + (1 - momentum) * g
        P = optimizer.preconditioner(p, g)
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 0.1 * m / P, rtol=0, atol=1e-15)
        assert math.isinf(P[0])
        if momentum:
            torch.testing.assert_close(optimizer.preconditioner(p), P, rtol=1e-14, atol=0)


def test_the_preconditioner_needs_a_gradient():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = SignSGD([p], lr=0.1)
    with pytest.raises(ValueError, match="has not made a step"):
        optimizer.preconditioner(p)
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(NoPreconditionerError, match="SignSGD keeps no copy of the last gradient"):
        optimizer.preconditioner(p)
    with pytest.raises(ValueError, match="is no parameter of this SignSGD"):
        optimizer.preconditioner(torch.ones(3), torch.ones(3))


def test_averages_of_half_precision_weights_are_float32():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SignSGD([p], lr=2.0**-6, momentum=0.99)
    p.grad = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    for _ in range(200):
        optimizer.step()
    kept = optimizer.state[p]["momentum"]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, p.grad.float() * (1 - 0.99**200), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, "`momentum` is 1; it must be finite and >= 0 and < 1"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        SignSGD([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, **options})


def test_theoretical_rates():
    assert theoretical_rates(16, 1) == pytest.approx((1 / 8, 3 / 4))
    assert theoretical_rates(128, 2) == pytest.approx((1 / 32, 15 / 16))
    with pytest.raises(ValueError, match="`order` is 3"):
        theoretical_rates(100, 3)
    with pytest.raises(ValueError, match="steps"):
        theoretical_rates(1, 1)
