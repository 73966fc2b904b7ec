"""Every kernel once on small inputs: what tools that slow a GPU down a hundredfold can run."""

import pytest
import torch
from sharpscope.kernels import adamw4_state, adamw4_step, dequantize, tridiagonal_quadrature
from sharpscope.kernels.batched_lanczos import batched_lanczos

pytestmark = pytest.mark.gpu

HOW = {"nearest": {}, "stochastic": {"rounding": "stochastic", "seed": 3, "step": 4}}


@pytest.mark.parametrize("rounding", HOW)
@pytest.mark.parametrize(
    ("map", "scale"),
    [("de", "block128"), ("linear", "block128"), ("square", "block128"), ("linear", "rank1"), ("square", "rank1")],
)
def test_codec(device, encode, defined, moments, assert_same_bits, map, scale, rounding):
    for shape in ((1, 1), (3, 43), (16, 16), (9, 129), (31, 33)):
        x = moments(shape, map, 7)
        x.view(-1)[x.numel() // 2] = torch.nan
        packed = encode(x.to(device), map, scale, **HOW[rounding])
        codes, scales, bad, _ = defined(x, map, scale, **HOW[rounding])
        assert_same_bits(packed.codes, codes)
        for got, true in zip(packed.scales, scales, strict=True):
            assert_same_bits(got, true)
        assert packed.bad.item() == bad.item()
        assert dequantize(packed).isnan().any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("map", ["linear", "square"])
def test_adamw4(device, defined_step, state_to, assert_same_states, map, rounding):
    shapes = [(1,), (129,), (5, 77), (33, 31), (2, 256), (640,)]
    rng = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        params = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
        states = [
            adamw4_state(p, map=map, scale="rank1" if i % 2 else "block128", id=i) for i, p in enumerate(params * 2)
        ]
        params = params + [p.clone() for p in params]
        others, other_states = [p.to(device) for p in params], [state_to(state, device) for state in states]
        for t in (1, 2):
            grads = [torch.randn(p.shape, generator=rng).to(dtype) for p in params]
            grads[1][100] = torch.nan
            defined_step(params, grads, states, lr=1e-2, step=t, rounding=rounding)
            adamw4_step(others, [g.to(device) for g in grads], other_states, lr=1e-2, step=t, rounding=rounding)
        assert_same_states(others, other_states, params, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_and_quadrature(device, dtype):
    lengths = [1, 5, 33, 300, 1500]
    values = torch.linspace(1, 2, sum(lengths), dtype=dtype)
    there = values.to(device)
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    runs = batched_lanczos(lambda v: there * v, offsets, 9, dtype=dtype, device=device)
    assert runs.steps.tolist() == [1, 5, 9, 9, 9]
    nodes, weights = tridiagonal_quadrature(runs.alpha, runs.beta, runs.steps)
    means = (nodes * weights).sum(1).cpu()  # signs of equal size: the first moment is the mean of the values
    true = torch.stack([part.double().mean() for part in values.split(lengths)])
    torch.testing.assert_close(means, true, rtol=1e-5, atol=0)
