"""Where AdamW in four bits diverges on a quadratic."""

import pytest
import torch
from sharpscope.dynamics.optimizers.adamw4bit import AdamW4bit
from sharpscope.dynamics.optimizers.moment_codecs import SignedFourBit, Uncompressed
from torch import nn


def drawn(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grows(lr, curvature, decay, codec, beta=0.9, steps=800):
    """Whether x grows on a quadratic of 128 eigenvalues up to `curvature`, with P frozen at 1."""
    x = nn.Parameter(1e-8 * drawn((128,)))
    h = torch.linspace(0.01, 1, 128, dtype=torch.float64) * curvature
    tiny = 1e-9
    optimizer = AdamW4bit([x], lr=lr, betas=(beta, 1 - tiny), eps=0.0, weight_decay=decay, min_size=0, codec=codec)
    start = 1_000_000  # steps, so that no bias correction moves any more
    corrected = 1 - (1 - tiny) ** start
    state = optimizer.state[x]
    state["step"] = torch.tensor(float(start))
    state["v_values"] = torch.full_like(x, corrected, requires_grad=False)
    state.update({f"m_{key}": part for key, part in codec[0].encode(torch.zeros_like(h), step=1, id=0).items()})
    for _ in range(steps):
        x.grad = h * x.detach()
        optimizer.step()
        if float(x.detach().abs().max()) > 1e-2:
            return True
    return float(x.detach().abs().max()) > 1e-7


def onset(curvature, decay, codec, bisections=15):
    low, high = 0.0, 256.0
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle, curvature, decay, codec) else (middle, high)
    return low


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_the_threshold_is_where_a_quadratic_diverges(decay):
    curvature = 0.5
    lr = onset(curvature, decay, (Uncompressed(), Uncompressed()))
    optimizer = AdamW4bit([nn.Parameter(torch.ones(2))], lr=lr, weight_decay=decay)
    assert optimizer.stability_threshold() == pytest.approx(curvature, rel=2e-3)


def test_codes_of_the_first_moment_bring_divergence_forward_by_three_percent():
    # A largest entry of a block that is negative decodes to 0.8875 of itself. Where m changes its sign at each step,
    # β₁ = 0.9 then acts as (0.9 + 0.79875)/2 in 1 + β₁, to first order.
    expected = (1 + (0.9 + 0.9 * 0.8875) / 2) / 1.9
    exact = 2 * 1.9 / (0.1 * 0.5)
    found = onset(0.5, 0.0, (SignedFourBit(), Uncompressed()), bisections=10)  # to 0.25
    assert found / exact == pytest.approx(expected, abs=0.01)


def test_there_is_no_threshold_without_steps():
    p = nn.Parameter(torch.ones(2))
    assert AdamW4bit([p], lr=0.0).stability_threshold() is None
    assert AdamW4bit([p], lr=1.0, weight_decay=2.5).stability_threshold() is None
