"""What is read of torchao's optimizers is what their next step divides by."""

import pytest
import torch
from sharpscope.dynamics.optimizers.adamw4bit import AdamW4bit
from sharpscope.dynamics.optimizers.base import tensor_bytes
from sharpscope.dynamics.optimizers.torchao_states import adapt, second_moment
from torch import nn

torchao = pytest.importorskip("torchao.optim")
NAMES = ["AdamW4bit", "AdamW8bit", "AdamWFp8", "Adam4bit", "Adam8bit"]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def stepped(name, steps=3, shapes=((64, 128), (30,)), **options):
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]
    optimizer = getattr(torchao, name)(params, lr=1e-2, weight_decay=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_preconditioner_is_what_the_next_step_divides_by(name, amsgrad):
    # Without compilation torchao cannot take the maximum of codes.
    optimizer, params = stepped(name, shapes=[(30,)], amsgrad=True) if amsgrad else stepped(name)
    geometry = adapt(optimizer)
    decay = geometry.coupled_weight_decay(optimizer.param_groups[0])
    assert decay == (0.0 if "AdamW" in name else pytest.approx(0.1))
    expected = []
    for p in params:
        g = p.grad + decay * p.detach()
        m = 0.9 * second_moment(optimizer, p, "exp_avg") + 0.1 * g
        shrink = 1 - 1e-2 * 0.1 if decay == 0 else 1.0
        expected.append(shrink * p.detach() - 1e-2 * m / geometry.preconditioner(p, p.grad))
    optimizer.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6)


def test_the_preconditioner_of_the_last_step_needs_one():
    optimizer, params = stepped("AdamW4bit", steps=0)
    with pytest.raises(ValueError, match="has not made a step"):
        adapt(optimizer).preconditioner(params[0])
    optimizer, params = stepped("AdamW4bit")
    v = second_moment(optimizer, params[0])
    expected = (1 - 0.9**3) * ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    torch.testing.assert_close(adapt(optimizer).preconditioner(params[0]), expected)


def test_the_threshold_is_that_of_adam():
    for name, decay in (("AdamW4bit", 0.1), ("Adam4bit", 0.0)):
        optimizer, _ = stepped(name)
        expected = (2 - 1e-2 * decay) * 1.9 / (0.1 * 1e-2)
        assert adapt(optimizer).threshold_of_group(optimizer.param_groups[0]) == pytest.approx(expected, rel=1e-6)


def test_others_are_unknown():
    assert adapt(torch.optim.AdamW([nn.Parameter(torch.ones(2))])) is None
    assert adapt(AdamW4bit([nn.Parameter(torch.ones(2))])) is None


def test_bytes_are_those_of_codes_scales_and_tables():
    optimizer, _ = stepped("AdamW4bit")
    found = tensor_bytes(optimizer.state.values())
    # Two moments with a table of 16 values each, the small tensor as it is, two counts.
    assert found == 2 * (8192 // 2 + 4 * 64 + 4 * 16) + 2 * 4 * 30 + 2 * 4
