"""GI-Adam: its first step, its equivalence with a warmed-up Adam, its threshold, its random variant."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.gi_adam import GIAdam
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.preconditioned import PreconditionedOperator
from sharpscope.landscape.objective import Objective
from torch import nn


def one_parameter(values=(1.0, -2.0, 0.5)):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def flat_preconditioner(optimizer, model):
    return torch.cat([optimizer.preconditioner(p, p.grad).flatten() for p in model.parameters()])


def test_it_divides_the_first_preconditioned_sharpness_by_the_warmup_factor(mlp):
    model, data = mlp
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    hessian = Hessian(objective)
    sharpness = {}
    for name, optimizer in (
        ("gi", GIAdam(model.parameters())),
        ("adam", GIAdam(model.parameters(), v0_scale=0.0)),
    ):
        P = flat_preconditioner(optimizer, model)
        if name == "adam":
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            torch.testing.assert_close(P, 0.1 * (gradient.abs() + 1e-8), rtol=1e-10, atol=0)
        pairs = top_eigenvalues(PreconditionedOperator(hessian, P), tol=1e-6)
        root = P.rsqrt()
        dense = torch.linalg.eigvalsh(root[:, None] * hessian.dense() * root[None, :])[-1]
        assert float(pairs.values[0]) == pytest.approx(float(dense), rel=1e-5)
        sharpness[name] = float(dense)
    # eps stands beside |g|/√(1 − β₂) in one and |g| in the other, so the ratio is not exact.
    assert sharpness["gi"] / sharpness["adam"] == pytest.approx(math.sqrt(1 - 0.999), rel=5e-3)


def test_with_gradients_of_one_size_it_is_adam_with_a_warmup():
    mine, theirs = one_parameter(), one_parameter()
    size = torch.tensor([0.3, 2.0, 1e-2], dtype=torch.float64)
    ours = GIAdam([mine], lr=0.01, eps=0.0)
    adam = torch.optim.Adam([theirs], lr=0.01, eps=0.0, foreach=False)
    signs = torch.Generator().manual_seed(0)
    for t in range(1, 201):
        sign = torch.randint(0, 2, (3,), generator=signs) * 2 - 1
        mine.grad, theirs.grad = sign * size, sign * size
        adam.param_groups[0]["lr"] = 0.01 * math.sqrt(1 - 0.999**t)
        ours.step()
        adam.step()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_scale_zero_is_adamw_and_an_own_gradient_may_start_it():
    mine, theirs = one_parameter(), one_parameter()
    ours = GIAdam([mine], v0_scale=0.0, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], weight_decay=0.1, foreach=False)
    for t in range(20):
        mine.grad = theirs.grad = torch.sin(torch.arange(3.0, dtype=torch.float64) + t)
        ours.step()
        adamw.step()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="20 steps"):
        ours.initialise()

    started = GIAdam([mine], v0_scale=3.0)
    mine.grad = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    started.initialise()
    mine.grad = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    started.step()
    expected = 0.999 * 3.0 * torch.tensor([1.0, 4.0, 9.0]).double() + 0.001 * mine.grad.square()
    torch.testing.assert_close(started.state[mine]["exp_avg_sq"], expected)


def test_the_random_start_has_the_size_of_the_gradient_and_no_memory_of_its_direction():
    p = nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    p.grad = torch.linspace(0, 1, 4000, dtype=torch.float64)
    starts = []
    for seed in (0, 0, 1):
        optimizer = GIAdam([p], v0="random", seed=seed)
        before = optimizer.preconditioner(p, p.grad)
        optimizer.initialise()
        v = optimizer.state[p]["exp_avg_sq"].clone()
        assert float(v.sum()) == pytest.approx(float(p.grad.square().sum()), rel=1e-12)
        assert abs(float(torch.corrcoef(torch.stack([v, p.grad.square()]))[0, 1])) < 4 / math.sqrt(4000)
        torch.testing.assert_close(optimizer.preconditioner(p, p.grad), before, rtol=0, atol=0)
        starts.append(v)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def onset(make, curvature):
    """Learning rate above which x ← step(P H x) grows, by bisection; `make(p, lr)` gives the optimizer and its P."""

    def grows(lr):
        p = nn.Parameter(torch.ones(len(curvature), dtype=torch.float64))
        optimizer, P = make(p, lr)
        for _ in range(2000):
            p.grad = curvature * P * p.detach()
            optimizer.step()
            if float(p.detach().abs().max()) > 1e3:
                return True
        return float(p.detach().abs().max()) > 1

    low, high = 0.0, 1e-2
    while not grows(high):
        low, high = high, 2 * high
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return (low + high) / 2


@pytest.mark.parametrize(("beta1", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.5), (0.5, 2.0)])
def test_its_threshold_is_the_onset_of_divergence(beta1, decay):
    curvature = torch.tensor(np.random.default_rng(1).uniform(0.2, 3.0, 5))

    def make(p, lr):
        # So late that both corrections are 1, with β₂ so near 1 that the second moment stays where it is put.
        optimizer = GIAdam([p], lr=lr, betas=(beta1, 1 - 1e-15), eps=0.0, weight_decay=decay)
        v = torch.linspace(0.5, 2.0, 5, dtype=torch.float64).square()
        optimizer.state[p] = {"step": torch.tensor(1e17), "exp_avg": torch.zeros_like(p), "exp_avg_sq": v}
        return optimizer, optimizer.preconditioner(p)

    lr = onset(make, curvature)
    optimizer, _ = make(nn.Parameter(torch.ones(5, dtype=torch.float64)), lr)
    assert optimizer.stability_threshold() == pytest.approx(float(curvature.max()), rel=5e-3)


@pytest.mark.parametrize("side", [-1e-6, 1e-6])
def test_its_threshold_is_where_the_companion_matrix_leaves_the_unit_circle(side):
    p = one_parameter()
    for lr, beta, decay in ((0.1, 0.9, 0.0), (0.02, 0.5, 0.3), (1.5, 0.0, 0.1)):
        optimizer = GIAdam([p], lr=lr, betas=(beta, 0.999), weight_decay=decay)
        threshold = optimizer.stability_threshold()
        assert threshold == pytest.approx((2 - lr * decay) * (1 + beta) / ((1 - beta) * lr))
        h = threshold * (1 + side)
        # (x, m) -> m' = β m + (1 − β) h x, x' = (1 − ηλ) x − η m'
        step = np.array([[1 - lr * decay - lr * (1 - beta) * h, -lr * beta], [(1 - beta) * h, beta]])
        radius = np.abs(np.linalg.eigvals(step)).max()
        assert (radius > 1) == (side > 0)


def test_options_are_checked_and_errors_say_what_to_do():
    p = one_parameter()
    for option, value in (("betas", (0.9, 1.0)), ("eps", -1.0), ("v0", "zero"), ("v0_scale", -0.1), ("seed", 0.5)):
        with pytest.raises((ValueError, TypeError), match=option):
            GIAdam([p], **{option: value})
    with pytest.raises(ValueError, match="gradient"):
        GIAdam([p]).preconditioner(p)
    with pytest.raises(ValueError, match="no parameter of this GIAdam"):
        GIAdam([p]).preconditioner(one_parameter())


def test_moments_of_half_precision_weights_are_float32():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    p.grad = torch.full((4,), 0.25, dtype=torch.bfloat16)
    optimizer = GIAdam([p], lr=0.1)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    assert p.dtype == torch.bfloat16
    assert optimizer.state_bytes() == 4 * 8 + 4
