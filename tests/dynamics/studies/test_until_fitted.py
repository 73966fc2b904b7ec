"""Jumping over batches without a gradient, and the perceptron trained with it."""

import math

import numpy as np
import pytest
from sharpscope.dynamics.studies.until_fitted import (
    depleted_gaussian,
    next_update,
    perceptron_run,
    stationary_noise,
)


@pytest.mark.parametrize(("num_unfitted", "batch_size"), [(1, 1), (3, 4), (10, 7), (12, 5)])
def test_the_next_update_is_that_of_plain_batches(num_unfitted, batch_size):
    """Batches waited for and hits in the batch, against draws of every batch."""
    num, trials, random = 12, 4000, np.random.default_rng(0)
    unfitted = np.arange(num)[:num_unfitted]
    waits, hits, firsts = [], [], []
    for _ in range(trials):
        steps, chosen = next_update(random, unfitted, num, batch_size)
        assert set(chosen) <= set(unfitted)
        waits.append(steps)
        hits.append(len(chosen))
        firsts.extend(chosen)
    some = 1 - (1 - num_unfitted / num) ** batch_size  # a batch has an unfitted example
    for found, mean in ((waits, 1 / some), (hits, batch_size * num_unfitted / num / some)):
        spread = np.std(found) / math.sqrt(trials)
        assert abs(np.mean(found) - mean) <= 4 * spread + 1e-12
    # The whole distribution of the hits: binomial, given that it is not zero.
    p = num_unfitted / num
    for k in range(1, batch_size + 1):
        expected = math.comb(batch_size, k) * p**k * (1 - p) ** (batch_size - k) / some
        error = math.sqrt(max(expected * (1 - expected), 1 / trials) / trials)
        assert abs(np.mean(np.array(hits) == k) - expected) <= 4 * error
    shares = np.bincount(firsts, minlength=num)[:num_unfitted] / len(firsts)
    assert np.abs(shares - 1 / num_unfitted).max() < 0.02


@pytest.mark.parametrize("chi", [0.0, 1.0, 2.5])
def test_the_density_near_the_boundary(chi):
    x, labels = depleted_gaussian(20000, 3, chi, np.random.default_rng(0))
    assert np.array_equal(np.sign(x[:, 0]), labels)
    # E|x|^k = 2^(k/2) Γ((χ+1+k)/2) / Γ((χ+1)/2)
    for k in (1, 2):
        expected = 2 ** (k / 2) * math.gamma((chi + 1 + k) / 2) / math.gamma((chi + 1) / 2)
        sample = abs(x[:, 0]) ** k
        assert abs(sample.mean() - expected) < 4 * sample.std() / math.sqrt(len(sample))
    assert abs(x[:, 1:].var() - 1) < 0.04
    assert abs(labels.mean()) < 0.03
    with pytest.raises(ValueError, match="`chi` is -1"):
        depleted_gaussian(5, 2, -1.0, np.random.default_rng(0))


def plain_sgd(num, temperature, batch_size, chi, margin, dim, seed):
    """Every batch drawn, every step made."""
    x, y = depleted_gaussian(num, dim, chi, np.random.default_rng([seed, num]))
    random = np.random.default_rng(10_000 + seed)
    w, steps = np.zeros(dim), 0
    while (y * (x @ w) / math.sqrt(dim) < margin).any():
        batch = random.integers(num, size=batch_size)
        unfitted = y[batch] * (x[batch] @ w) / math.sqrt(dim) < margin
        w = w + temperature * (unfitted * y[batch]) @ x[batch] / math.sqrt(dim)
        steps += 1
    return w[0], np.linalg.norm(w[1:]), temperature * batch_size * steps


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_perceptron_is_that_of_plain_sgd(batch_size):
    settings = {"batch_size": batch_size, "chi": 1.0, "margin": 0.05, "dim": 8}
    runs, options = range(120), (20, 0.3)
    ours = [perceptron_run(*options, **settings, seed=seed) for seed in runs]
    theirs = np.array([plain_sgd(*options, **settings, seed=seed) for seed in runs])
    for key, values in zip(("signal", "noise", "time"), theirs.T, strict=True):
        # The data of a seed are the same, so that the differences are of the batches alone.
        difference = np.log([run[key] for run in ours]) - np.log(values)
        assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(runs)), key
    assert all(run["fitted"] for run in ours)


def test_small_noise_is_the_gradient_flow():
    """Against full-batch gradient descent with tiny steps."""
    num, dim, margin = 30, 8, 0.05
    found = perceptron_run(num, 1e-5, batch_size=2, chi=1.0, margin=margin, dim=dim, seed=3)
    x, y = depleted_gaussian(num, dim, 1.0, np.random.default_rng([3, num]))
    towards, w, lr, time = y[:, None] * x / math.sqrt(dim), np.zeros(dim), 1e-3, 0.0
    while (unfitted := towards @ w < margin).any():
        w = w + lr * unfitted @ towards / num
        time += lr
    assert found["signal"] == pytest.approx(w[0], rel=0.02)
    assert found["noise"] == pytest.approx(np.linalg.norm(w[1:]), rel=0.05)
    assert found["time"] == pytest.approx(time, rel=0.1)


@pytest.mark.parametrize("chi", [0.0, 1.0, 2.5])
def test_the_noise_settles_where_the_signal_is_large(chi):
    """Chains of w_⊥ with fresh examples in the limit w_1 ≫ ‖w_⊥‖, where only those with r = |x_1| w_1/‖w_⊥‖ of order 1
    matter; their density is that of r^χ."""
    dim, chains, draws, random = 32, 150, 6000, np.random.default_rng(0)
    w = np.full((chains, dim - 1), stationary_noise(chi, dim) / math.sqrt(dim - 1))
    norms = []
    for _ in range(draws):
        x = random.standard_normal(w.shape)
        norm = np.linalg.norm(w, axis=1)
        r = 5 * random.random(chains) ** (1 / (1 + chi))
        unfitted = r * norm < -(x * w).sum(1)
        w[unfitted] += x[unfitted] / math.sqrt(dim)
        norms.append(norm)
    assert np.mean(norms[draws // 3 :]) == pytest.approx(stationary_noise(chi, dim), rel=0.02)


def test_it_gives_up():
    run = perceptron_run(50, 1.0, batch_size=2, chi=0.0, margin=0.01, dim=8, seed=0, max_updates=3)
    assert run["updates"] == 3
    assert not run["fitted"]
