"""The exact risk of (accelerated) SGD on Gaussian least squares."""

import numpy as np
import pytest
import torch
from sharpscope.dynamics.linear_risk import linear_risk, sampled_linear_risk, second_moment_radius
from sharpscope.dynamics.optimizers.accelerated import AcceleratedSGD
from torch import nn

SPECTRUM = np.array([1.0, 0.5, 0.2, 0.05])
RULES = {
    "asgd": {"lr": 0.1, "gamma": 0.5, "beta": 0.05},
    "own alpha": {"lr": 0.1, "gamma": 0.3, "beta": 0.3, "alpha": 0.6},
    "sgd": {"lr": 0.15},
}
START = np.array([1.0, -2.0, 0.5, 3.0])


def whole_operator(spectrum, rule, batch_size):
    """On the second moment of all of (w, v), [4 d², 4 d²], and the noise's part for σ² = 1, from E xxᵀMxxᵀ in full."""
    d, H = len(spectrum), np.diag(spectrum)
    delta, beta = rule["lr"], rule.get("beta", 0.0)
    gamma, alpha = rule.get("gamma", delta), rule.get("alpha", 1 / (1 + beta))
    eye = np.eye(d)
    to_y = np.hstack([alpha * eye, (1 - alpha) * eye])
    still = np.vstack([to_y, beta * to_y + np.hstack([0 * eye, (1 - beta) * eye])])
    pull = np.vstack([delta * eye, gamma * eye])
    columns = []
    for i in range(4 * d * d):
        U = np.zeros(4 * d * d)
        U[i] = 1
        U = U.reshape(2 * d, 2 * d)
        Y = to_y @ U @ to_y.T
        # Isserlis: Σ_kl E[x_i x_k x_l x_j] Y_kl = (H Y H + H Yᵀ H + tr(HY) H)_ij
        fourth = H @ Y @ H + H @ Y.T @ H + np.trace(H @ Y) * H
        mean = pull @ H @ to_y
        image = still @ U @ still.T - mean @ U @ still.T - still @ U @ mean.T
        image += pull @ (fourth / batch_size + (1 - 1 / batch_size) * H @ Y @ H) @ pull.T
        columns.append(image.ravel())
    return np.stack(columns, axis=1), (pull @ H @ pull.T / batch_size).ravel()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_recursion_is_the_whole_second_moment_operator(rule, batch_size):
    operator, noise = whole_operator(SPECTRUM, rule, batch_size)
    d, steps, sigma2 = len(SPECTRUM), 30, 0.3
    both = np.tile(START, 2)
    bias, variance = np.outer(both, both).ravel(), np.zeros(4 * d * d)
    found = linear_risk(SPECTRUM, START, sigma2, steps, **rule, batch_size=batch_size)
    assert found.bias.shape == found.variance.shape == (steps + 1, d)
    for t in range(steps + 1):
        for ours, theirs in ((found.bias[t], bias), (found.variance[t], variance)):
            expected = 0.5 * SPECTRUM * np.diag(theirs.reshape(2 * d, 2 * d))[:d]
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-14)
        bias, variance = operator @ bias, operator @ variance + sigma2 * noise
    np.testing.assert_allclose(found.risk, found.bias.sum(1) + found.variance.sum(1), rtol=1e-14)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_tail_average_is_that_of_the_whole_operator(rule):
    """E w_s w_t between times by powers of the mean map, in full."""
    d, steps, first, sigma2 = len(SPECTRUM), 9, 4, 0.3
    operator, noise = whole_operator(SPECTRUM, rule, 1)
    mean = linear_map(SPECTRUM, rule)
    moment = np.outer(np.tile(START, 2), np.tile(START, 2)).ravel()
    moments = [moment]
    for _ in range(steps):
        moment = operator @ moment + sigma2 * noise
        moments.append(moment)
    moments = [m.reshape(2 * d, 2 * d) for m in moments]
    total = np.zeros((d, d))
    for s in range(first, steps + 1):
        for t in range(first, steps + 1):
            low = min(s, t)
            total += (np.linalg.matrix_power(mean, abs(t - s)) @ moments[low])[:d, :d]
    expected = 0.5 * SPECTRUM * np.diag(total) / (steps - first + 1) ** 2
    found = linear_risk(SPECTRUM, START, sigma2, steps, **rule, average_from=first)
    np.testing.assert_allclose(found.bias[-1] + found.variance[-1], expected, rtol=1e-10)
    plain = linear_risk(SPECTRUM, START, sigma2, steps, **rule)
    np.testing.assert_allclose(found.risk[: first + 1], plain.risk[: first + 1], rtol=1e-14)


def linear_map(spectrum, rule):
    """The mean map of (w, v), [2d, 2d], read off the optimizer."""
    d = len(spectrum)
    lr, beta = rule["lr"], rule.get("beta", 0.0)
    alpha, gamma = rule.get("alpha", 1 / (1 + beta)), rule.get("gamma", lr)
    columns = []
    for i in range(2 * d):
        w, v = np.eye(2 * d)[i][:d], np.eye(2 * d)[i][d:]
        p = nn.Parameter(torch.from_numpy(alpha * w + (1 - alpha) * v))
        optimizer = AcceleratedSGD([p], lr=lr, gamma=gamma, beta=beta, alpha=alpha)
        p.grad = torch.zeros_like(p)
        y = p.detach().clone()
        optimizer.step()  # makes the state
        with torch.no_grad():
            p.copy_(y)
        optimizer.state[p]["v"].copy_(torch.from_numpy(v))
        p.grad = torch.from_numpy(spectrum) * y
        optimizer.step()
        with optimizer.swap_to_output():
            columns.append(np.concatenate([p.detach().numpy().copy(), optimizer.state[p]["v"].numpy()]))
    return np.stack(columns, axis=1)


def test_sgd_from_rest_has_its_stationary_variance():
    """One direction: e <- (1 − 2δλ + 3δ²λ²) e + δ²σ²λ."""
    value, lr, sigma2 = 0.7, 0.1, 0.4
    found = linear_risk([value], [0.0], sigma2, 2000, lr=lr)
    limit = lr * sigma2 / (2 - 3 * lr * value)
    assert found.risk[-1] == pytest.approx(0.5 * value * limit, rel=1e-12)
    assert second_moment_radius([value], lr=lr) == pytest.approx(1 - 2 * lr * value + 3 * (lr * value) ** 2, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_radius_is_that_of_the_whole_operator(rule, batch_size):
    # SGD as β = 1 with equal steps, where v is w after one step.
    told = rule if "gamma" in rule else {**rule, "gamma": rule["lr"], "beta": 1.0}
    operator, _ = whole_operator(SPECTRUM, told, batch_size)
    expected = np.abs(np.linalg.eigvals(operator)).max()
    assert second_moment_radius(SPECTRUM, **rule, batch_size=batch_size) == pytest.approx(expected, rel=1e-10)


def test_the_risk_diverges_where_the_radius_says():
    for gamma, grows in ((0.5, False), (6.0, True)):
        rule = {"lr": 0.1, "gamma": gamma, "beta": 0.05}
        assert (second_moment_radius(SPECTRUM, **rule) > 1) == grows
        risk = linear_risk(SPECTRUM, START, 0.0, 400, **rule).risk
        assert (risk[-1] > risk[200]) == grows


@pytest.mark.parametrize("average_from", [None, 20])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_simulated_runs_agree(rule, average_from):
    options = {**rule, "average_from": average_from}
    exact = linear_risk(SPECTRUM, START, 0.5, 40, **options)
    sample = sampled_linear_risk(SPECTRUM, START, 0.5, 40, runs=8000, seed=1, **options)
    assert abs(sample.risk - exact.risk[-1]) < 4 * sample.error
    assert sample.error < 0.1 * sample.risk
    np.testing.assert_allclose(sample.directions.sum(), sample.risk, rtol=1e-12)


def test_misuse_is_refused():
    for change, words in (
        ({"eigenvalues": [1.0, -1.0]}, "`eigenvalues`"),
        ({"initial_error": [1.0]}, "`initial_error` has shape"),
        ({"noise_variance": -1.0}, "`noise_variance` is -1"),
        ({"steps": -1}, "`steps` is -1"),
        ({"lr": -0.1}, "`lr` is -0.1"),
        ({"gamma": -0.1}, "`gamma` is -0.1"),
        ({"alpha": 0.0}, "`alpha` is 0"),
        ({"beta": 2.0}, "`beta` is 2"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"average_from": 0}, "`average_from` is 0"),
    ):
        good = {"eigenvalues": [1.0, 0.5], "initial_error": [1.0, 1.0], "noise_variance": 0.0, "steps": 3, "lr": 0.1}
        with pytest.raises(ValueError, match=words):
            linear_risk(**{**good, **change})
