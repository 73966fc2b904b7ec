"""Gradient transport: where the weights are, what the momentum then is."""

import pytest
import torch
from given_gradients import noise, run
from sharpscope.dynamics.optimizers.sign import SignSGD
from sharpscope.dynamics.optimizers.sign_momentum2 import SignMomentum2


def quadratic(n=8, seed=0):
    A = noise(n, n, seed)
    return A @ A.T / n + torch.eye(n, dtype=torch.float64), noise(1, n, seed + 1)[0]


def weights_of(optimizer, p):
    return optimizer.state[p]["weights"] if p in optimizer.state else p.detach().clone()


def test_on_a_quadratic_the_momentum_is_the_gradient_at_the_weights():
    """m_t = g(w_t) − θ^(t+1) g(w_0): linear gradients are transported without error."""
    H, b = quadratic()
    p = torch.nn.Parameter(noise(1, 8, seed=2)[0])
    start = H @ p.detach() - b
    optimizer = SignMomentum2([p], lr=0.01, momentum=0.9)
    for t in range(100):
        w = weights_of(optimizer, p).clone()
        p.grad = H @ p.detach() - b
        optimizer.step()
        expected = H @ w - b - 0.9 ** (t + 1) * start
        torch.testing.assert_close(optimizer.state[p]["momentum"], expected, rtol=0, atol=1e-12)


def test_the_parameters_are_the_lookahead_of_the_weights():
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = SignMomentum2([p], lr=0.1, momentum=0.75, weight_decay=0.5)
    for g in noise(6, 5):
        before = weights_of(optimizer, p).clone()
        p.grad = g
        optimizer.step()
        after = optimizer.state[p]["weights"]
        u = torch.sign(optimizer.state[p]["momentum"])
        torch.testing.assert_close(after, 0.95 * before - 0.1 * u, rtol=0, atol=1e-15)
        torch.testing.assert_close(p.detach(), after + 3 * (after - before), rtol=0, atol=1e-14)


def test_swapping_shows_the_weights_and_goes_back_exactly():
    p, still = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(2))
    optimizer = SignMomentum2([p, still], lr=0.1)
    for g in noise(3, 5).float():
        p.grad = g
        optimizer.step()
    ahead, w = p.detach().clone(), optimizer.state[p]["weights"].clone()
    with optimizer.swap_to_output():
        assert torch.equal(p.detach(), w)
        assert not torch.equal(w, ahead)
        with optimizer.swap_to_output():
            assert torch.equal(p.detach(), w)
        with pytest.raises(RuntimeError, match="leave swap_to_output"):
            optimizer.step()
    assert torch.equal(p.detach(), ahead)
    assert torch.equal(still.detach(), torch.ones(2))
    optimizer.step()


def test_the_lookahead_is_back_after_an_error():
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = SignMomentum2([p], lr=0.1)
    p.grad = torch.ones(5)
    optimizer.step()
    ahead = p.detach().clone()
    with pytest.raises(KeyError):
        with optimizer.swap_to_output():
            raise KeyError
    assert torch.equal(p.detach(), ahead)
    optimizer.step()


def test_without_momentum_it_is_signsgd():
    gradients = noise()
    assert torch.equal(run(SignMomentum2, gradients, lr=0.01, momentum=0.0), run(SignSGD, gradients, lr=0.01))


def test_momentum_can_be_raised_over_time():
    H, b = quadratic()
    p = torch.nn.Parameter(noise(1, 8, seed=2)[0])
    optimizer = SignMomentum2([p], lr=0.01, momentum=0.0)
    for t in range(200):
        optimizer.param_groups[0]["momentum"] = min(0.95, t / 100)
        p.grad = H @ p.detach() - b
        optimizer.step()
    best = torch.linalg.solve(H, b)
    start = noise(1, 8, seed=2)[0]
    with optimizer.swap_to_output():
        assert float((p.detach() - best).norm()) < 0.2 * float((start - best).norm())


def test_half_precision_parameters_have_float32_weights_behind_them():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SignMomentum2([p], lr=1e-4, momentum=0.5)
    p.grad = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        optimizer.step()
    torch.testing.assert_close(
        optimizer.state[p]["weights"], torch.full((4,), 0.99), rtol=0, atol=6e-6
    )  # 100 roundings


def test_the_preconditioner_turns_the_momentum_into_its_sign():
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = SignMomentum2([p], lr=0.1)
    with pytest.raises(ValueError, match="has not made a step"):
        optimizer.preconditioner(p)
    for g in noise(3, 6):
        g[1] = 0
        P = optimizer.preconditioner(p, g)
        p.grad = g
        optimizer.step()
        assert torch.equal(optimizer.preconditioner(p), P)
        m = optimizer.state[p]["momentum"]
        torch.testing.assert_close(m / P, torch.sign(m), rtol=0, atol=1e-15)
    assert optimizer.stability_threshold() is None


def test_momentum_is_checked():
    with pytest.raises(ValueError, match="momentum"):
        SignMomentum2([torch.nn.Parameter(torch.ones(1))], momentum=1.0)
