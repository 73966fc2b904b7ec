"""Warmup schedules against their formulas; catapults on quadratics and on digits."""

import copy
import math
import pickle

import pytest
import torch
from sharpscope.dynamics.optimizers.catapult import catapult_learning_rate
from sharpscope.dynamics.optimizers.gi_adam import GIAdam
from sharpscope.dynamics.optimizers.warmup import CatapultWarmup, LinearWarmup
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.landscape.objective import Objective
from torch import nn


def parameter(values=(1.0, 2.0)):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def rates(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def quadratic(curvatures):
    p, h = parameter([1.0] * len(curvatures)), torch.tensor(curvatures, dtype=torch.float64)
    return p, Objective.from_closure(lambda x: 0.5 * (h * x.square()).sum(), [p])


def test_the_rate_rises_linearly_then_decays_as_a_cosine():
    for warmup, init, exponent, total in (
        (10, 0.0, 0.0, None),
        (10, 0.02, 1.0, 30),
        (4, 0.05, 2.5, 20),
        (1, 0.0, 0.0, None),
    ):
        optimizer = torch.optim.SGD([parameter()], lr=0.1)
        scheduler = LinearWarmup(optimizer, warmup, init, total_steps=total, exponent=exponent)
        for t, rate in enumerate(rates(scheduler, optimizer, 30), 1):
            if t <= warmup:
                expected = init + (0.1 - init) * t / warmup
            elif exponent == 0:
                expected = 0.1
            else:
                wave = 0.5 * (1 + math.cos(math.pi * min(1, (t - warmup) / (total - warmup))))
                expected = 0.01 + 0.09 * wave**exponent
            assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("init", [0.0, 0.013, 0.05, 0.099, 0.1, 0.3])
def test_with_the_same_rate_the_target_comes_earlier_by_the_share_that_was_skipped(init):
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    scheduler = LinearWarmup(optimizer, 200, init, keep_rate=True)
    found = rates(scheduler, optimizer, 210)
    reached = next(t for t, rate in enumerate(found, 1) if rate >= 0.1 * (1 - 1e-12))
    assert abs(reached - 200 * (1 - min(init, 0.1) / 0.1)) <= 1
    assert max(found) <= 0.1


def test_groups_keep_their_targets_and_a_schedule_resumes():
    groups = [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": torch.tensor(0.3)}]
    optimizer = torch.optim.SGD(groups)
    scheduler = LinearWarmup(optimizer, 10, 0.05)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.075, 0.175])
    again = LinearWarmup(
        torch.optim.SGD([{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.3}]), 10, 0.05
    )
    again.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    again.optimizer.step()
    again.step()
    assert again.get_last_lr() == pytest.approx([0.08, 0.2])


def test_bad_warmups_are_refused():
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    for options in ({"warmup_steps": 0}, {"warmup_steps": 5, "init": -1}, {"warmup_steps": 5, "exponent": 1.0}):
        with pytest.raises(ValueError, match="`"):
            LinearWarmup(optimizer, **options)
    with pytest.raises(ValueError, match="total_steps"):
        LinearWarmup(optimizer, 10, exponent=1.0, total_steps=10)
    with pytest.raises(ValueError, match="all 0"):
        CatapultWarmup(torch.optim.SGD([parameter()], lr=0.0), 1.0, lambda: 1.0)


@pytest.mark.parametrize("curvature", [0.3, 1.7, 40.0, 900.0])
@pytest.mark.parametrize("delta", [0.1, 0.01])
def test_on_a_parabola_the_bracket_is_known(curvature, delta):
    _, objective = quadratic([curvature])
    found = catapult_learning_rate(objective, lambda params: torch.optim.SGD(params, lr=1.0), delta=delta)
    assert found.found
    assert found.forward_passes <= 20
    rounding = 1e-12
    assert found.lr >= (2 / curvature) * (1 - rounding)
    if found.converged:
        assert found.lr <= (1 + math.sqrt(1 + delta)) / curvature
        assert found.loss <= (1 + delta) * found.initial_loss
    else:  # from 1e-4 twenty passes do not always suffice, and it says so
        assert found.forward_passes == 20
        assert curvature < 1 or delta < 0.1
    assert found.lower < 2 / curvature
    assert found.loss == pytest.approx(found.initial_loss * (1 - found.lr * curvature) ** 2, rel=1e-9)


def test_it_goes_down_when_the_start_is_too_large_and_stops_at_the_target():
    _, objective = quadratic([30.0])
    sgd = lambda params: torch.optim.SGD(params, lr=1.0)
    below = catapult_learning_rate(objective, sgd, start=10.0)
    assert 2 / 30 < below.lr <= (1 + math.sqrt(1.1)) / 30
    capped = catapult_learning_rate(objective, sgd, target=0.05)
    assert (capped.lr, capped.found, capped.converged) == (0.05, False, True)
    spent = catapult_learning_rate(objective, sgd, start=1e-9, max_forward_passes=5)
    assert (spent.found, spent.converged, spent.forward_passes) == (False, False, 5)


def test_a_loss_that_overflows_counts_as_raised():
    p = parameter([1.0])
    objective = Objective.from_closure(lambda x: torch.exp(x.square()).sum(), [p])
    found = catapult_learning_rate(objective, lambda params: torch.optim.SGD(params, lr=1.0), start=40.0)
    assert found.converged
    assert found.initial_loss <= found.loss <= 1.1 * found.initial_loss


def test_everything_is_left_as_found(mlp):
    model, data = mlp
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    optimizer = torch.optim.SGD(
        [{"params": [*model[0].parameters()]}, {"params": [*model[2:].parameters()], "lr": 0.02}], lr=0.1
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    found = catapult_learning_rate(objective, optimizer, start=1.0)
    assert found.converged
    assert found.initial_loss == objective.loss()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(torch.get_rng_state(), random)
    gradients = objective.unflatten(objective.gradient())
    with torch.no_grad():  # the second group moves at a fifth of the rate
        for i, (name, p) in enumerate(model.named_parameters()):
            p.sub_(gradients[name], alpha=found.lr * (1.0 if i < 2 else 0.2))
    assert objective.loss() == pytest.approx(found.loss, rel=1e-12)


def test_it_reads_the_state_of_a_running_optimizer_and_leaves_it_alone():
    p, objective = quadratic([2.0, 0.1])
    optimizer = GIAdam([p], lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)  # puts a step of its own on the optimizer
    for _ in range(5):
        p.grad = torch.tensor([2.0, 0.1], dtype=torch.float64) * p.detach()
        optimizer.step()
        scheduler.step()
    state, here = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    found = catapult_learning_rate(objective, optimizer, delta=0.01)
    assert torch.equal(p, here)
    assert str(optimizer.state_dict()) == str(state)
    twin = copy.deepcopy(p)
    direction = GIAdam([twin], lr=found.lr)
    direction.load_state_dict(copy.deepcopy(state))
    direction.param_groups[0]["lr"] = found.lr
    twin.grad = torch.tensor([2.0, 0.1], dtype=torch.float64) * twin.detach()
    direction.step()
    after = float(0.5 * (torch.tensor([2.0, 0.1], dtype=torch.float64) * twin.detach().square()).sum())
    assert after == pytest.approx(found.loss, rel=1e-12)


def test_catapults_follow_the_loss_down_to_the_target():
    optimizer = torch.optim.SGD([{"params": [parameter()], "lr": 1.0}, {"params": [parameter()], "lr": 0.1}])
    estimates = iter([0.2, 0.1, 0.4, 2.0])
    warmup = CatapultWarmup(optimizer, 1.0, lambda: next(estimates))
    seen = []
    for loss in (5.0, 6.0, 5.0, 4.9, 7.0, 4.8, 4.0, 1.0):
        seen.append(warmup.step(loss))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([seen[-1], 0.1 * seen[-1]])
        twin = CatapultWarmup(optimizer, 1.0, lambda: next(estimates))
        twin.load_state_dict(warmup.state_dict())
        warmup = twin
    assert seen == [0.2, 0.2, 0.2, 0.1, 0.1, 0.4, 1.0, 1.0]
    assert warmup.finished
    assert warmup.num_estimates == 4


class FullyConnected:
    """500 digits, ReLU, depth 4, width 128: truncated normal weights of variance 2/fan_in, 1/fan_in in the last layer,
    zero biases; half the mean squared error over examples and outputs; float32."""

    def __init__(self, zero_last=False, seed=0):
        pixels, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (64, 128, 128, 128, 10)
            layers = []
            for i in range(4):
                layer = nn.Linear(sizes[i], sizes[i + 1])
                variance = (1.0 if i == 3 else 2.0) / sizes[i]
                std = math.sqrt(variance / 0.7737)  # cut at two deviations, a normal has 0.7737 of its variance
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer.bias)
                layers += [layer, nn.ReLU()]
            self.model = nn.Sequential(*layers[:-1])
        if zero_last:
            nn.init.zeros_(self.model[-1].weight)
        pixels = torch.as_tensor(pixels[:500]).float()
        self.inputs = (pixels - pixels.mean()) / pixels.std()
        self.targets = nn.functional.one_hot(torch.as_tensor(labels[:500]), 10).float()
        self.objective = Objective.supervised(
            self.model, lambda y, t: 0.5 * nn.functional.mse_loss(y, t), (self.inputs, self.targets)
        )

    def sharpness(self):
        return float(top_eigenvalues(Hessian(self.objective), tol=1e-3).values[0])

    def train(self, optimizer, steps, scheduler=None):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.5 * nn.functional.mse_loss(self.model(self.inputs), self.targets)
            loss.backward()
            losses.append(float(loss.detach()))
            if not losses[-1] < 1e6:
                break
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return losses


@pytest.mark.parametrize("kind", ["tanh", "relu"])
@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_network_it_is_where_a_grid_of_steps_finds_the_loss_rising(kind, seed):
    network = FullyConnected(seed=seed)
    objective, start = network.objective, 1e-4
    if kind == "tanh":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10))
        data = (network.inputs, network.targets)
        objective, start = Objective.supervised(model, lambda y, t: 0.5 * nn.functional.mse_loss(y, t), data), 0.01
    found = catapult_learning_rate(objective, lambda params: torch.optim.SGD(params, lr=1.0), start=start)
    assert found.converged
    assert found.forward_passes <= 20
    hessian, g = Hessian(objective), objective.gradient()
    parameters = list(objective.parameters.values())
    here = torch.cat([p.detach().flatten() for p in parameters])
    grid, first = torch.linspace(0, found.lr, 200)[1:], None
    for rate in grid:
        torch.nn.utils.vector_to_parameters(here - rate * g, parameters)
        if objective.loss() >= found.initial_loss:
            first = float(rate)
            break
    torch.nn.utils.vector_to_parameters(here, parameters)
    assert first is not None
    assert found.lower <= first <= found.lr * (1 + 1e-6)  # the grid is in float32
    # To second order the loss rises from 2 gᵀg / gᵀHg on; here the network flattens on the way, so a little later.
    assert first > 0.98 * 2 * float(g @ g) / float(g @ (hessian @ g))
    assert found.lr >= 2 / float(top_eigenvalues(hessian, tol=1e-3).values[0])


def test_a_zero_last_layer_sharpens_and_the_standard_one_flattens_at_once():
    flat, standard = FullyConnected(zero_last=True), FullyConnected()
    before = flat.sharpness()
    flat.train(torch.optim.SGD(flat.model.parameters(), lr=1.0 / before), 100)
    assert flat.sharpness() > 1.05 * before
    before = standard.sharpness()
    standard.train(torch.optim.SGD(standard.model.parameters(), lr=1.0 / before), 1)
    assert standard.sharpness() < 0.98 * before


@pytest.mark.slow
def test_warmup_moves_the_boundary_of_divergence():
    first = FullyConnected().sharpness()
    diverged, ends = {}, {}
    for c in (16, 32, 128):
        for warmup in (1, 16, 64, 256):
            network = FullyConnected()
            optimizer = torch.optim.SGD(network.model.parameters(), lr=c / first)
            losses = network.train(optimizer, 300, LinearWarmup(optimizer, warmup))
            diverged[c, warmup] = len(losses) < 300
            if not diverged[c, warmup]:
                ends[c, warmup] = network.sharpness() * c / first
    assert all(diverged[c, 1] for c in (16, 32, 128)), diverged
    # 16 steps up to 128/λ₀ are too few for most initial weights, enough for some.
    assert not any(diverged[c, warmup] for c in (16, 32, 128) for warmup in (16, 64, 256) if (c, warmup) != (128, 16))
    for case in ((32, 16), (32, 64), (32, 256), (128, 64)):
        assert 1.8 <= ends[case] <= 2.3, ends


@pytest.mark.slow
def test_the_gradient_start_moves_the_boundary_of_failure():
    def losses(make):
        network = FullyConnected()
        return network.train(make(network.model.parameters()), 200)

    found = {}
    for lr in (1.25e-4, 0.032, 0.128):
        found[lr] = (
            losses(lambda params, lr=lr: torch.optim.Adam(params, lr=lr)),
            losses(lambda params, lr=lr: GIAdam(params, lr=lr)),
        )
    adam, gi = found[0.032]
    assert max(adam) > 10 * adam[0]
    assert max(gi) <= gi[0]
    adam, gi = found[0.128]
    assert gi[-1] < 0.1 * adam[-1]
    adam, gi = found[1.25e-4]
    assert gi[-1] > adam[-1]  # it is a warmup, after all
