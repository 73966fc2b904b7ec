"""Rounding to a grid, against NumPy written group by group, and its derivative, against autograd."""

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.weight_grid import SMALLEST_SCALE, WeightGrid

BOTH = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def weights(rows=5, columns=21, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=gen, dtype=torch.float64) * torch.logspace(-1, 1, rows).unsqueeze(1)


def start(grid, W):
    groups = grid.grouped(W).shape[:2]
    return torch.zeros_like(W), torch.ones(groups, dtype=W.dtype), torch.ones(groups, dtype=W.dtype)


def learned(grid, W, seed=0):
    """Offsets and factors as after many steps; some codes are clipped."""
    gen = torch.Generator().manual_seed(seed)
    zeros, ones, _ = start(grid, W)
    V = torch.rand(zeros.shape, generator=gen, dtype=W.dtype) - 0.5
    return V, *(0.4 + 0.6 * torch.rand(ones.shape, generator=gen, dtype=W.dtype) for _ in range(2))


def by_hand(w, V, a, b, bits, symmetric):
    """One group as the paper writes it; w, V are arrays, a and b numbers."""
    lo, hi = min(0.0, w.min()) * a, max(0.0, w.max()) * b
    if symmetric:
        s = max(abs(lo), abs(hi)) / 2 ** (bits - 1) * (-1 if hi >= abs(lo) else 1)
        s = float(np.float16(s))
        codes = np.clip(np.round(w / s + V), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return s * codes
    s = float(np.float16((hi - lo) / (2**bits - 1)))
    z = np.round(-lo / s)
    return s * (np.clip(np.round(w / s + V) + z, 0, 2**bits - 1) - z)


@BOTH
@BITS
@pytest.mark.parametrize("group_size", [8, -1, 3])
def test_each_group_is_rounded_as_the_paper_writes(bits, symmetric, group_size):
    grid, W = WeightGrid(bits, group_size, symmetric), weights()
    for V, a, b in (start(grid, W), learned(grid, W)):
        found = grid.fake_quantize(W, V, a, b)
        size = 21 if group_size == -1 else group_size
        for r in range(5):
            for g, first in enumerate(range(0, 21, size)):
                cut = slice(first, first + size)
                w, v = W[r, cut].numpy(), V[r, cut].numpy()
                expected = by_hand(w, v, float(a[r, g]), float(b[r, g]), bits, symmetric)
                np.testing.assert_allclose(found[r, cut].numpy(), expected, rtol=0, atol=1e-14)


@BITS
def test_rounding_to_nearest_errs_by_half_a_step_at_most(bits):
    grid, W = WeightGrid(bits, 8, False, "float32"), weights(seed=4)
    V, a, b = start(grid, W)
    s = grid.scales(W, a, b).step
    error = grid.grouped((grid.fake_quantize(W, V, a, b) - W).abs()).amax(-1)
    inside = error <= 0.5 * s * (1 + 1e-6)
    # Where the zero point is rounded away from an end, a code at that end is clipped: at most one step.
    assert bool((error <= s * (1 + 1e-6)).all())
    assert float(inside.double().mean()) > 0.5


@BITS
@pytest.mark.parametrize("turn", [1, -1])
def test_the_larger_side_of_a_symmetric_group_is_exact(bits, turn):
    W = turn * torch.tensor([[0.5, -1.0, 0.3, 0.1]], dtype=torch.float64)
    grid = WeightGrid(bits, 4, True)
    V, a, b = start(grid, W)
    scales = grid.scales(W, a, b)
    assert float(scales.step.sign()) == turn
    assert float(grid.fake_quantize(W, V, a, b)[0, 1]) == float(W[0, 1])
    assert int(grid.codes(W, V, scales)[0, 1]) == 0


@BOTH
@BITS
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_the_closed_derivative_is_that_of_autograd(bits, symmetric, scale_dtype):
    grid, W = WeightGrid(bits, 8, symmetric, scale_dtype), weights()
    W[0] *= SMALLEST_SCALE[scale_dtype]  # a row whose steps are at the floor
    W[1, :8] = W[1, :8].abs()
    W[2, :8] = 0.0
    for seed in range(3):
        given = start(grid, W) if seed == 0 else learned(grid, W, seed)
        leaves = [x.clone().requires_grad_() for x in given]
        G = weights(seed=seed + 10)
        quantized = grid.fake_quantize(W, *leaves)
        expected = torch.autograd.grad((quantized * G).sum(), leaves)
        found = grid.derivative(G, W, *given)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
            assert float(theirs.abs().max()) > 0
        assert torch.equal(quantized.detach(), grid.fake_quantize(W, *given))


@BOTH
def test_offsets_feel_the_step_times_the_gradient_where_nothing_is_clipped(symmetric):
    grid, W = WeightGrid(3, 8, symmetric), weights()
    V, a, b = learned(grid, W, seed=5)
    G = weights(seed=6)
    scales = grid.scales(W, a, b)
    s, z = (grid.flat(x.unsqueeze(-1).expand(5, 3, 8), 21) for x in scales)
    raw = torch.round(W / s + V) + z
    inside = (raw >= 0) & (raw <= 7)
    assert 0.1 < float(inside.double().mean()) < 0.99
    found = grid.derivative(G, W, V, a, b).offset
    torch.testing.assert_close(found, torch.where(inside, s * G, 0.0), rtol=1e-14, atol=0)


@BOTH
def test_codes_scales_and_zero_points_say_the_same_as_the_weights(symmetric):
    grid, W = WeightGrid(4, 8, symmetric), weights()
    V, a, b = learned(grid, W)
    scales = grid.scales(W, a, b)
    q = grid.grouped(grid.codes(W, V, scales).double())
    assert torch.equal(
        grid.flat(scales.step.unsqueeze(-1) * (q - scales.zero.unsqueeze(-1)), 21), grid.fake_quantize(W, V, a, b)
    )
    assert torch.equal(scales.step.half().double(), scales.step)
    assert bool(((scales.zero >= 0) & (scales.zero <= 15)).all())


def test_zero_points_stay_among_the_codes_where_float16_rounds_a_tiny_step():
    W = -torch.logspace(-4, -2, 200, dtype=torch.float64).unsqueeze(1) * torch.ones(1, 4, dtype=torch.float64)
    grid = WeightGrid(8, 4)
    _, a, b = start(grid, W)
    zero = grid.scales(W, a, b).zero
    assert float(zero.max()) == 255
