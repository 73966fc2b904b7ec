"""SignRound step by step beside autograd, and what its docstring promises."""

import math

import pytest
import torch
from sharpscope.dynamics.optimizers.sign_rounding import SignRound
from sharpscope.dynamics.optimizers.weight_grid import WeightGrid


def task(columns=20, rows=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    X = torch.randn(64, columns, generator=gen, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=gen, dtype=torch.float64
    )
    W = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    return X, W


def output_loss(X, W, quantized, factor=1.0):
    return factor * (X @ (quantized - W).T).square().mean()


def descended(X, W, steps, factor=1.0, **options):
    p = torch.nn.Parameter(W.clone())
    optimizer = SignRound([p], **options)
    optimizer.round_to_nearest()
    path = [p.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        output_loss(X, W, p, factor).backward()
        optimizer.step()
        path.append(p.detach().clone())
    return optimizer, p, path


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_makes_the_steps_of_autograd_through_the_rounding(bits, symmetric, clip):
    X, W = task()
    options = {"bits": bits, "group_size": 8, "symmetric": symmetric, "clip": clip, "iterations": 40}
    _, _, path = descended(X, W, 50, **options)
    grid = WeightGrid(bits, 8, symmetric)
    V = torch.zeros_like(W).requires_grad_()
    a, b = (torch.ones(6, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    for k in range(51):
        quantized = grid.fake_quantize(W, V, a, b)
        torch.testing.assert_close(path[k], quantized.detach(), rtol=0, atol=0)
        slopes = torch.autograd.grad(output_loss(X, W, quantized), [V, a, b])
        rate = max(0.0, 1 - k / 40) / 40
        with torch.no_grad():
            V -= rate * torch.sign(slopes[0])
            if clip:
                a.sub_(rate * torch.sign(slopes[1])).clamp_(0, 1)
                b.sub_(rate * torch.sign(slopes[2])).clamp_(0, 1)
    assert not torch.equal(path[0], path[-1])
    assert torch.equal(path[40], path[50])


@pytest.mark.parametrize("iterations", [1, 7, 200])
def test_offsets_cannot_travel_further_than_the_sum_of_the_rates(iterations):
    """Reached where the gradient never changes its sign."""
    p = torch.nn.Parameter(torch.full((1, 4), 0.25, dtype=torch.float64))
    p.data[0, 0], p.data[0, 1] = -1.0, 1.0
    optimizer = SignRound([p], bits=4, iterations=iterations, clip=False)
    for _ in range(iterations + 5):
        p.grad = torch.ones_like(p)
        optimizer.step()
    bound = (iterations + 1) / (2 * iterations)
    inner = optimizer.state[p]["offset"][0, 2:].abs()
    torch.testing.assert_close(inner, torch.full((2,), bound, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (200 + 1) / (2 * 200) == 0.5025


@pytest.mark.parametrize("factor", [1024.0, 1e-6, 3.7])
def test_the_scale_of_the_loss_does_not_matter(factor):
    X, W = task()
    optimizer, p, _ = descended(X, W, 60, bits=3, iterations=60)
    other, q, _ = descended(X, W, 60, factor, bits=3, iterations=60)
    for name in ("offset", "min_scale", "max_scale"):
        assert torch.equal(optimizer.state[p][name], other.state[q][name])


def test_the_first_step_rounds_to_nearest_and_uses_no_gradient():
    _, W = task()
    p, bias = torch.nn.Parameter(W.clone()), torch.nn.Parameter(W[0].clone())
    optimizer = SignRound([p, bias], bits=3, group_size=8)
    assert optimizer.param_groups[0]["lr"] == 1 / 200
    p.grad, bias.grad = torch.ones_like(p), torch.ones_like(bias)
    optimizer.step()
    ones = torch.ones(6, 3, dtype=torch.float64)
    assert torch.equal(p.detach(), WeightGrid(3, 8).fake_quantize(W, torch.zeros_like(W), ones, ones))
    assert torch.equal(bias.detach(), W[0])
    assert torch.equal(optimizer.state[p]["weights"], W)
    assert bias not in optimizer.state
    optimizer.round_to_nearest()
    assert float(optimizer.state[p]["step"]) == 1


def test_dead_columns_and_padding_stay():
    X, W = task()
    X[:, 3] = 0
    optimizer, p, path = descended(X, W, 100, bits=2, group_size=8, clip=False, iterations=100)
    assert bool((optimizer.state[p]["offset"][:, 3] == 0).all())
    assert torch.equal(path[-1][:, 3], path[0][:, 3])
    assert optimizer.state[p]["offset"].shape == W.shape


def test_it_lowers_the_output_error():
    """For correlated inputs; for nearly singular ones the last step can be worse than rounding to nearest."""
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(16, 64, generator=gen, dtype=torch.float64)
    mix = torch.eye(64, dtype=torch.float64) + torch.randn(64, 64, generator=gen, dtype=torch.float64) / 8
    X = torch.randn(512, 64, generator=gen, dtype=torch.float64) @ mix
    X += 2 * torch.randn(512, 1, generator=gen, dtype=torch.float64)
    _, _, path = descended(X, W, 200, bits=3, group_size=32)
    losses = [float(output_loss(X, W, w)) for w in path]
    assert losses[-1] < 0.8 * losses[0]
    assert min(losses) < 0.6 * losses[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_preconditioner_gives_the_straight_through_step(symmetric):
    X, W = task()
    optimizer, p, _ = descended(X, W, 30, bits=3, group_size=8, symmetric=symmetric, clip=False)
    output_loss(X, W, p).backward()
    P = optimizer.preconditioner(p, p.grad)
    before = optimizer.state[p]["offset"].clone()
    grid = WeightGrid(3, 8, symmetric)
    ones = torch.ones(6, 3, dtype=torch.float64)
    s = grid.flat(grid.scales(W, ones, ones).step.unsqueeze(-1).expand(6, 3, 8), 20)
    expected = optimizer.param_groups[0]["lr"] * (1 - 30 / 200) * p.grad / P
    optimizer.step()
    torch.testing.assert_close(s * (before - optimizer.state[p]["offset"]), expected, rtol=1e-9, atol=1e-15)


def test_the_preconditioner_before_any_step():
    _, W = task()
    p, bias = torch.nn.Parameter(W.clone()), torch.nn.Parameter(W[0].clone())
    optimizer = SignRound([p, bias], bits=3)
    with pytest.raises(ValueError, match="has not made a step"):
        optimizer.preconditioner(p)
    P = optimizer.preconditioner(p, torch.ones_like(p))
    assert torch.equal(p.detach(), W)
    assert p not in optimizer.state
    assert bool((P > 0).all())
    assert bool(torch.isinf(optimizer.preconditioner(bias)).all())
    assert optimizer.stability_threshold() is None


def test_weights_that_float16_scales_cannot_hold_are_refused():
    p = torch.nn.Parameter(torch.full((2, 4), 1e6))
    with pytest.raises(ValueError, match="use 'float32'"):
        SignRound([p], bits=2).round_to_nearest()
    SignRound([p], bits=2, scale_dtype="float32").round_to_nearest()
    torch.testing.assert_close(p.detach(), torch.full((2, 4), 1e6))
    p.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        SignRound([p], bits=2, scale_dtype="float32").round_to_nearest()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, r"`bits` is 5; it must be one of \(2, 3, 4, 8\)"),
        ({"group_size": 0}, "`group_size` is 0"),
        ({"group_size": 2.5}, "`group_size` is 2.5; it must be a whole number >= 1, or -1 for whole rows"),
        ({"iterations": 0}, "`iterations` is 0"),
        ({"symmetric": 1}, "`symmetric` is 1; it must be True or False"),
        ({"clip": "no"}, "`clip` is 'no'"),
        ({"scale_dtype": "float8"}, "`scale_dtype` is 'float8'; it must be one of 'float16', 'float32'"),
        ({"lr": -1.0}, "`lr` is -1"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        SignRound([torch.nn.Parameter(torch.ones(2, 2))], **options)


def test_what_is_not_rounded_has_no_codes():
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="is not rounded"):
        SignRound([p]).quantized(p)
