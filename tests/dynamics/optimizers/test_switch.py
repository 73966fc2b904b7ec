"""Optimizers that take over: the steps are those of each, momentum goes on or begins anew."""

import copy

import pytest
import torch
from sharpscope.dynamics.optimizers.sam import SAM
from sharpscope.dynamics.optimizers.switch import SwitchSchedule
from torch import nn


def start(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(4, 3, generator=gen)), nn.Parameter(torch.randn(5, generator=gen))]


def train(optimizer, params, steps):
    def closure():
        optimizer.zero_grad()
        loss = sum((p.square() + torch.cos(3 * p)).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(steps):
        assert optimizer.step(closure) is not None
    return [p.detach().clone() for p in params]


def sgd(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("shared", [True, False], ids=["one base", "two bases"])
def test_carried_momentum_is_sam_switched_on(shared):
    params = start()
    sam = SAM(sgd(params), rho=0.3, enabled=False)
    train(sam, params, 10)
    sam.enabled = True
    expected = train(sam, params, 10)
    params = start()
    early = sgd(params)
    late = SAM(early if shared else sgd(params), rho=0.3)
    switch = SwitchSchedule([(0, early), (10, late)], carry_momentum=True)
    assert switch.active is early
    train(switch, params, 10)
    assert switch.active is late
    buffers = [early.state[p]["momentum_buffer"].clone() for p in params]
    assert same(train(switch, params, 10), expected)
    untouched = same([early.state[p]["momentum_buffer"] for p in params], buffers)
    assert untouched != shared


@pytest.mark.parametrize("shared", [True, False], ids=["one base", "two bases"])
def test_momentum_begins_anew(shared):
    params = start()
    train(sgd(params), params, 10)
    train(SAM(sgd(params), rho=0.3), params, 5)
    expected = train(sgd(params), params, 5)
    params = start()
    early = sgd(params)
    late = SAM(early if shared else sgd(params), rho=0.3)
    switch = SwitchSchedule([(0, early), (10, late), (15, early)], carry_momentum=False)
    assert same(train(switch, params, 20), expected)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("saved_at", [4, 10, 13])
def test_a_saved_run_goes_on_bit_for_bit(carry, saved_at):
    def made(params):
        return SwitchSchedule([(0, sgd(params)), (10, SAM(sgd(params), rho=0.3))], carry_momentum=carry)

    params = start()
    expected = train(made(params), params, 20)
    params = start()
    first = made(params)
    train(first, params, saved_at)
    saved = copy.deepcopy(first.state_dict())
    again = made(params)
    again.load_state_dict(saved)
    assert same(train(again, params, 20 - saved_at), expected)


def test_the_threshold_is_that_of_the_active_one():
    params = start()
    switch = SwitchSchedule([(0, sgd(params)), (1, torch.optim.Adam(params, lr=0.1))], carry_momentum=False)
    assert switch.stability_threshold() == pytest.approx(2 * 1.9 / 0.02)
    assert switch.param_groups[0]["lr"] == 0.02
    train(switch, params, 1)
    assert switch.stability_threshold() == pytest.approx(380)
    assert switch.param_groups[0]["lr"] == 0.1
    assert switch.coupled_weight_decay(switch.param_groups[0]) == 0
    assert switch.preconditioner(params[0], torch.ones(4, 3)).shape == (4, 3)


def test_misuse_is_refused():
    params = start()
    for starts in ([1, 2], [0, 0], [0, 5, 3], [0, 1.5]):
        with pytest.raises(ValueError, match="0 and then increasing"):
            SwitchSchedule([(t, sgd(params)) for t in starts], carry_momentum=False)
    with pytest.raises(ValueError, match="different parameters"):
        SwitchSchedule([(0, sgd(params)), (3, sgd(start()))], carry_momentum=False)
    with pytest.raises(ValueError, match="Adam and SGD"):
        SwitchSchedule([(0, sgd(params)), (3, torch.optim.Adam(params))], carry_momentum=True)
    with pytest.raises(TypeError, match="pairs"):
        SwitchSchedule([], carry_momentum=True)
