import copy
import inspect

import pytest
import torch
from sharpscope.dynamics.optimizers.choice import (
    make_optimizer,
    optimizer_class,
    optimizer_names,
)
from sharpscope.dynamics.optimizers.closures import needs_closure
from sharpscope.dynamics.optimizers.combined import CombinedOptimizer
from torch import nn

TORCH = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
)


def make_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    x, y = torch.randn(20, 4), torch.randn(20, 2)

    def loss():
        model.zero_grad()
        value = (model(x) - y).square().mean()
        value.backward()
        return value

    return model, loss


def step(optimizer, loss):
    if needs_closure(optimizer):
        optimizer.step(loss)
    else:
        loss()
        optimizer.step()


def test_every_optimizer_of_torch_is_there():
    assert set(TORCH) <= set(optimizer_names())


@pytest.mark.parametrize("name", TORCH)
def test_it_descends_and_its_state_survives_saving(name):
    model, loss = make_problem()
    optimizer = make_optimizer(name.lower(), model, {"lr": 0.01})
    before = float(loss().detach())
    for _ in range(10):
        step(optimizer, loss)
    assert float(loss().detach()) < before

    twin, twin_loss = make_problem()
    twin.load_state_dict(model.state_dict())
    again = make_optimizer(name, twin, {"lr": 0.01})
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(optimizer, loss)
        step(again, twin_loss)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_only_a_line_search_needs_a_closure():
    model, _ = make_problem()
    assert [name for name in TORCH if needs_closure(make_optimizer(name, model, {}))] == ["LBFGS"]


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model, loss = make_problem()
    optimizer = make_optimizer("Muon", model, {"lr": 0.02})
    assert isinstance(optimizer, CombinedOptimizer)
    assert [p.ndim for group in optimizer.param_groups for p in group["params"]] == [2, 2, 1, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.001]
    calls = []
    assert optimizer.step(lambda: calls.append(1) or loss()) is not None
    assert calls == [1]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    matrix = nn.Linear(3, 3, bias=False)
    assert isinstance(make_optimizer("muon", matrix, {}), torch.optim.Muon)


def test_frozen_parameters_are_left_out():
    model, _ = make_problem()
    model[0].weight.requires_grad_(False)
    optimizer = make_optimizer("SGD", model, {})
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_unknown_names_and_options_list_the_near_ones():
    with pytest.raises(ValueError, match="`optimizer` is 'AdmaW'; near it: 'adamw'.*all: .*SGD"):
        optimizer_class("AdmaW")
    model, _ = make_problem()
    with pytest.raises(ValueError, match=r"'beta', which Adam does not take \(near: 'betas'"):
        make_optimizer("Adam", model, {"beta": 0.9})
    with pytest.raises(ValueError, match="Adam refuses .*betas"):
        make_optimizer("Adam", model, {"betas": [0.9]})
    with pytest.raises(ValueError, match="sparse gradients only"):
        optimizer_class("sparseadam")
