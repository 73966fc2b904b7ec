"""Training at a scale α until every example is fitted."""

import copy
import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.studies.scaled_model import KernelNetwork, parity_run, train_until_fitted
from sharpscope.dynamics.studies.until_fitted import next_update


def test_the_tangent_kernel_does_not_depend_on_the_width():
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def kernel(width):
        found = []
        for seed in range(400 // width + 1):
            model = KernelNetwork(5, width, seed=seed, dtype=torch.float64)
            rows = [torch.autograd.grad(model(x)[i], list(model.parameters())) for i in range(2)]
            flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            found.append(flat @ flat.T)
        return torch.stack(found).mean(0)

    # x·x'/d times the share of common half-spaces, plus E relu relu.
    a, b = x / math.sqrt(5)
    angle = math.acos(float(a @ b / a.norm() / b.norm()))
    cross = float(a @ b) * (math.pi - angle) / (2 * math.pi)
    cross += float(a.norm() * b.norm()) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    expected = torch.tensor([[float(a @ a), cross], [cross, float(b @ b)]])
    for width in (20, 4000):
        torch.testing.assert_close(kernel(width).float(), expected, rtol=0.25 if width == 20 else 0.06, atol=0.05)


def test_it_is_sgd_on_the_scaled_hinge_loss():
    """Every step from autograd of (1/α) mean max(0, 1 − y α (f − f_0)) with η = T B, over the batches it met."""
    alpha, temperature, batch_size, seed = 3.0, 0.05, 4, 5
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.where(x[:, 0] > 0, 1.0, -1.0).double()
    model = KernelNetwork(6, 30, depth=2, seed=0, dtype=torch.float64)
    other, frozen = copy.deepcopy(model), copy.deepcopy(model)
    options = {"alpha": alpha, "temperature": temperature, "batch_size": batch_size}
    found = train_until_fitted(model, x, y, **options, seed=seed, max_updates=40)
    assert not found["fitted"]
    random, optimizer = np.random.default_rng(seed), torch.optim.SGD(other.parameters(), lr=temperature * batch_size)
    steps = 0
    for _ in range(found["updates"]):
        losses = (1 - y * alpha * (other(x) - frozen(x).detach())).relu() / alpha
        waited, chosen = next_update(random, np.flatnonzero(losses.detach().numpy() > 0), len(y), batch_size)
        steps += waited
        optimizer.zero_grad()
        # The rest of the batch has no gradient; the mean is over the whole of it.
        (losses[torch.from_numpy(chosen)].sum() / batch_size).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert found["time"] == pytest.approx(temperature * batch_size * steps, rel=1e-12)
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    start = torch.nn.utils.parameters_to_vector(frozen.parameters()).detach()
    assert found["change"] == pytest.approx(float((moved - start).norm() / start.norm()), rel=1e-10)


def test_it_ends_when_the_loss_is_zero():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.where(x[:, 0] > 0, 1.0, -1.0).double()
    model = KernelNetwork(6, 64, seed=0, dtype=torch.float64)
    start = model(x).detach()
    options = {"alpha": 2.0, "temperature": 0.02, "batch_size": 2, "seed": 0, "max_updates": 20000}
    found = train_until_fitted(model, x, y, **options)
    assert found["fitted"]
    assert bool((2.0 * y * (model(x).detach() - start) >= 1).all())
    again = train_until_fitted(KernelNetwork(6, 64, seed=0, dtype=torch.float64), x, y, **options)
    assert again == found


def test_what_explodes_is_not_fitted():
    x, y = torch.ones(4, 3), torch.tensor([1.0, -1.0, 1.0, -1.0])
    model = KernelNetwork(3, 8, seed=0)
    options = {"alpha": 1.0, "temperature": 1e30, "batch_size": 2, "seed": 0, "max_updates": 100}
    found = train_until_fitted(model, x, y, **options)
    assert not found["fitted"]
    assert found["updates"] < 100


def test_lazy_training_is_linear_in_the_margin():
    settings = {"width": 64, "batch_size": 4, "num_test": 300, "seed": 0, "max_updates": 2000}
    small, large = (parity_run(alpha, 3 / alpha, 32, **settings) for alpha in (1e3, 4e3))
    assert small["fitted"]
    assert large["fitted"]
    assert small["change"] / large["change"] == pytest.approx(4, rel=0.1)
    assert small["time"] / large["time"] == pytest.approx(4, rel=0.5)
    assert 0 < small["error"] < 0.5
