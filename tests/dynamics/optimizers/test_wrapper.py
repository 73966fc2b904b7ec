"""Optimizers round others: one list of groups, the geometry of what is inside."""

import pytest
import torch
from sharpscope import Objective
from sharpscope.dynamics.optimizers import PSGD, SAM, LangevinSGD, SwitchSchedule, preconditioner_of
from sharpscope.dynamics.optimizers.combined import CombinedOptimizer
from torch import nn

SGD = torch.optim.SGD


def quiet(base):
    return LangevinSGD(base, temperature=0.0)


def flat(rho):
    return lambda base: SAM(base, rho=rho)


@pytest.mark.parametrize("wrap", [(quiet, flat(0.0)), (flat(0.0), quiet), (quiet, quiet, flat(0.0))])
def test_parameters_added_to_nested_ones_are_trained(wrap):
    first, later = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = SGD([first], lr=0.1)
    for one in wrap:
        optimizer = one(optimizer)
    optimizer.add_param_group({"params": [later]})
    first.grad, later.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert float(later.detach()) == float(first.detach()) == pytest.approx(0.9)


def test_groups_stay_shared_whoever_loads():
    p = nn.Parameter(torch.ones(1))
    base = SGD([p], lr=0.1)
    outer = SAM(quiet(base), rho=0.1)
    saved, plain = outer.state_dict(), SGD([nn.Parameter(torch.ones(1))], lr=0.1).state_dict()
    for load, state in ((outer.load_state_dict, saved), (base.load_state_dict, plain)):
        load(state)
        assert outer.param_groups is base.param_groups
        outer.param_groups[0]["lr"] = 0.0
        assert base.param_groups[0]["lr"] == 0.0
        assert outer.param_groups[0]["rho"] == 0.1  # also where the base's own state knew nothing of it


def test_a_schedule_of_optimizers_keeps_its_groups_after_loading():
    p = nn.Parameter(torch.ones(1))
    base = SGD([p], lr=0.1)
    schedule = SwitchSchedule([(0, SAM(base, rho=0.0)), (3, base)], carry_momentum=True)
    schedule.load_state_dict(schedule.state_dict())
    schedule.param_groups[0]["lr"] = 0.0
    p.grad = torch.ones(1)
    schedule.step()
    assert float(p.detach()) == 1.0


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,))
    x[:, 2] = 0.0  # whose weights never have a gradient
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))

    def backward():
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    return model, objective, backward


@pytest.mark.parametrize("kind", ["xmat", "lra", "kron"])
def test_the_matrix_inside_is_the_matrix_outside(problem, kind):
    model, objective, backward = problem
    base = PSGD(model.parameters(), kind=kind, mode="whiten", lr=0.01)
    for _ in range(3):
        backward()
        base.step()
    g = objective.gradient()
    inside = preconditioner_of(base, objective).inverse(g)
    outside = preconditioner_of(SAM(base, rho=0.0), objective).inverse(g)
    torch.testing.assert_close(outside, inside, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RAdam, torch.optim.Adadelta, torch.optim.Adagrad])
@pytest.mark.parametrize("which", ["next", "current"])
def test_what_does_not_move_inside_does_not_move_outside(problem, make, which):
    model, objective, backward = problem
    base = make(model.parameters(), lr=1e-3)
    wrapped = SAM(base, rho=0.0)
    for _ in range(7):
        backward()
        base.step()
    inside, outside = (preconditioner_of(o, objective, which=which) for o in (base, wrapped))
    assert outside.zero_share == inside.zero_share == pytest.approx(6 / 51)
    assert torch.equal(outside.moves, inside.moves)


def test_round_an_adaptive_optimizer_the_next_step_divides_by_the_gradient_uphill(problem):
    model, objective, backward = problem
    sam = SAM(torch.optim.Adam(model.parameters(), lr=1e-3), rho=0.3)
    P = preconditioner_of(sam, objective, idle="keep").diagonal
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    backward()
    sam.first_step()
    backward()
    uphill = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    sam.second_step()
    moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
    # At the first step m = (1 − β₁) g, and P holds both corrections.
    torch.testing.assert_close(moved, -1e-3 * 0.1 * uphill / P, rtol=1e-9, atol=1e-13)


def test_combined_optimizers_take_a_scheduler_and_say_who_they_are():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    combined = CombinedOptimizer([SGD([first], lr=1.0, momentum=0.9), SGD([second], lr=0.5, momentum=0.9)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(combined, 0.1)
    first.grad = second.grad = torch.ones(1)
    combined.step()
    scheduler.step()
    assert [o.param_groups[0]["lr"] for o in combined.optimizers] == pytest.approx([0.1, 0.05])
    assert set(combined.state) == {first, second}
    assert repr(combined) == "CombinedOptimizer(SGD and SGD)"
    with pytest.raises(ValueError, match="combine them anew"):
        combined.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_what_evaluates_the_loss_itself_cannot_be_wrapped_by_sam():
    p = nn.Parameter(torch.ones(2))
    for base in (torch.optim.LBFGS([p]), SAM(SGD([p], lr=0.1)), PSGD([p])):
        with pytest.raises(ValueError, match="evaluates the loss itself"):
            SAM(base)
