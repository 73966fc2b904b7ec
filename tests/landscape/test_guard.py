"""An evaluation leaves everything as found."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sharpscope import Hessian, Objective
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Restless(nn.Module):
    """Everything a forward pass may leave behind: buffers, counters, caches, random numbers."""

    def __init__(self):
        super().__init__()
        self.linear1, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.drop, self.linear2 = nn.Dropout(0.2), nn.Linear(8, 3)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.cache = x.detach()
        self.seen += 1
        return self.linear2(self.drop(torch.tanh(self.norm(self.linear1(x)))))


def snapshot(model):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "identities": [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "calls": model.calls,
        "cached": "cache" in model.__dict__,
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "rng": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "switches": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cudnn.enabled,
        ),
    }


def assert_same(a, b):
    assert a["state"].keys() == b["state"].keys()
    for name in a["state"]:
        assert torch.equal(a["state"][name], b["state"][name]), name
    for g, h in zip(a["grads"], b["grads"], strict=True):
        assert (g is None) == (h is None)
        assert g is None or torch.equal(g, h)
    assert torch.equal(a["rng"][0], b["rng"][0])
    assert (a["rng"][1] == b["rng"][1]).all()
    assert a["rng"][2] == b["rng"][2]
    for key in ("flags", "identities", "modes", "calls", "cached", "hooks", "switches"):
        assert a[key] == b[key], key


@pytest.fixture
def restless():
    torch.manual_seed(3)
    model = Restless()
    x, y = torch.randn(30, 5), torch.randint(0, 3, (30,))
    F.cross_entropy(model(x), y).backward()
    model.norm.eval()  # a mixture of modes, as fine-tuning has it
    model.linear1.bias.grad = None
    del model.cache
    return model, (x, y)


CALLS = {
    "loss": lambda objective: objective.loss(),
    "gradient": lambda objective: objective.gradient(),
    "unused": lambda objective: objective.unused,
    **{
        engine: lambda objective, engine=engine: (
            Hessian(objective, engine=engine) @ torch.ones(objective.num_parameters)
        )
        for engine in ("auto", "double-backward", "forward-over-reverse", "finite-difference")
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_changes(restless, call):
    model, data = restless
    before = snapshot(model)
    CALLS[call](Objective.supervised(model, nn.CrossEntropyLoss(), data))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
def test_same_numbers_inside_any_context(restless, context):
    model, data = restless
    make = lambda data: Objective.supervised(model, nn.CrossEntropyLoss(), data)
    expected = Hessian(make(data)) @ torch.ones(make(data).num_parameters)
    manager = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }[context]
    with manager():
        before = snapshot(model)
        # Data made under inference_mode cannot be saved for a backward pass as it is.
        objective = make(tuple(t.clone() for t in data))
        product = Hessian(objective) @ torch.ones(objective.num_parameters)
        assert_same(before, snapshot(model))
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-7)


def test_an_exception_in_the_middle_leaves_everything_as_found(restless):
    model, (x, y) = restless

    class Trouble(Exception):
        pass

    calls = []

    def loss(module, batch):
        value = F.cross_entropy(module(batch[0]), batch[1])
        calls.append(1)
        if len(calls) > 30:
            raise Trouble
        return value

    objective = Objective(model, loss, [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
    operator = Hessian(objective, engine="forward-over-reverse")
    before = snapshot(model)
    with pytest.raises(Trouble):
        operator @ torch.ones(objective.num_parameters, 80)
    assert_same(before, snapshot(model))


def test_hooks_on_parameters_do_not_fire(restless):
    model, data = restless
    fired = []
    for p in model.parameters():
        p.register_hook(lambda g: fired.append(1))
        p.register_post_accumulate_grad_hook(lambda p: fired.append(2))
    Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data)) @ torch.ones(
        sum(p.numel() for p in model.parameters())
    )
    assert not fired


def test_an_lstm_keeps_its_own_weights():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    expected = model(x)[0]
    loss = lambda model, batch: model(batch)[0].square().mean()
    Hessian(Objective(model, loss, x)) @ torch.ones(sum(p.numel() for p in model.parameters()))
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    assert torch.equal(model(x)[0], expected)


def test_a_loader_draws_the_same_batches_with_and_without_us(restless):
    model, (x, y) = restless
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, generator=generator)
    state, own = torch.get_rng_state(), generator.get_state()
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), loader)
    objective.loss(), objective.gradient()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(own, generator.get_state())
