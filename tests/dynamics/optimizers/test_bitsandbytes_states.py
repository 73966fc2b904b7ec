"""What is read of bitsandbytes' optimizers is what their next step divides by."""

import pytest
import torch
from sharpscope.dynamics.optimizers.bitsandbytes_states import adapt, second_moment
from torch import nn

bitsandbytes = pytest.importorskip("bitsandbytes")
NAMES = ["Adam", "AdamW", "Adam8bit", "AdamW8bit"]


def stepped(name, steps=3, **options):
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((65, 77), (30,))]
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    optimizer = getattr(bitsandbytes.optim, name)(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        optimizer.step()
    return optimizer, params


def first_moment(state):
    kept = state["state1"]
    if kept.dtype != torch.uint8:
        return kept
    scales = state["absmax1"].repeat_interleave(256)[: kept.numel()].view(kept.shape)
    return state["qmap1"][kept.long()] * scales


@pytest.mark.parametrize("name", NAMES)
def test_the_preconditioner_is_what_the_next_step_divides_by(name):
    optimizer, params = stepped(name)
    assert (optimizer.state[params[0]]["state2"].dtype == torch.uint8) == name.endswith("8bit")
    geometry = adapt(optimizer)
    assert geometry.coupled_weight_decay(optimizer.param_groups[0]) == 0
    expected = []
    for p in params:
        m = 0.9 * first_moment(optimizer.state[p]) + 0.1 * p.grad
        expected.append((1 - 1e-2 * 0.1) * p.detach() - 1e-2 * m / geometry.preconditioner(p, p.grad))
    optimizer.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=2e-6)


def test_the_preconditioner_of_the_last_step_needs_one():
    optimizer, params = stepped("AdamW8bit", steps=0)
    with pytest.raises(ValueError, match="has not made a step"):
        adapt(optimizer).preconditioner(params[0])
    optimizer, params = stepped("AdamW8bit")
    v = second_moment(optimizer, params[0])
    expected = (1 - 0.9**3) * ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    torch.testing.assert_close(adapt(optimizer).preconditioner(params[0]), expected)


def test_decoding_agrees_with_the_library():
    optimizer, params = stepped("AdamW8bit")
    state = optimizer.state[params[0]]
    theirs = bitsandbytes.functional.dequantize_blockwise(
        state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
    )
    assert torch.equal(second_moment(optimizer, params[0]), theirs)


def test_the_threshold_is_that_of_adamw():
    optimizer, _ = stepped("AdamW8bit")
    expected = (2 - 1e-2 * 0.1) * 1.9 / (0.1 * 1e-2)
    assert adapt(optimizer).threshold_of_group(optimizer.param_groups[0]) == pytest.approx(expected)


def test_others_are_unknown():
    params = [nn.Parameter(torch.ones(2))]
    assert adapt(bitsandbytes.optim.Lion(params)) is None
    assert adapt(bitsandbytes.optim.LAMB(params)) is None
    assert adapt(torch.optim.AdamW(params)) is None
