"""SAM: its limits, its two forms, what it leaves as found, where it is stable."""

import copy
import math

import pytest
import torch
from sharpscope.dynamics.optimizers.accelerated import AcceleratedSGD
from sharpscope.dynamics.optimizers.closures import needs_closure
from sharpscope.dynamics.optimizers.langevin import LangevinSGD
from sharpscope.dynamics.optimizers.sam import SAM, sam_edge
from torch import nn

BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AcceleratedSGD": lambda params: AcceleratedSGD(params, lr=0.05, gamma=0.2, beta=0.1),
}


def network(dtype=torch.float32, norm=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)]
        if norm:
            layers.insert(1, nn.BatchNorm1d(9))
        model = nn.Sequential(*layers).to(dtype)
        x, y = torch.randn(40, 5, dtype=dtype), torch.randint(0, 3, (40,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def closure_of(optimizer, loss, calls=None):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if calls is not None:
            calls.append(float(value.detach()))
        return value

    return closure


def train(model, loss, optimizer, steps):
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, loss))
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.5, "enabled": False}], ids=["rho 0", "switched off"])
def test_without_a_perturbation_it_is_its_base(base, options):
    model, loss = network()
    expected = train(model, loss, base(model.parameters()), 30)
    model, loss = network()
    sam, calls = SAM(base(model.parameters()), **options), []
    for _ in range(30):
        sam.step(closure_of(sam, loss, calls))
    assert same(list(model.parameters()), expected)
    assert len(calls) == 30
    model, loss = network()
    sam = SAM(base(model.parameters()), **options)
    for _ in range(30):
        for half in (sam.first_step, sam.second_step):
            loss().backward()
            half(zero_grad=True)
    assert same(list(model.parameters()), expected)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_both_forms_make_the_same_steps(base, adaptive):
    model, loss = network()
    sam, calls = SAM(base(model.parameters()), rho=0.3, adaptive=adaptive), []
    for _ in range(10):
        sam.step(closure_of(sam, loss, calls))
    assert len(calls) == 20
    assert calls[1] > calls[0]
    other, loss = network()
    sam = SAM(base(other.parameters()), rho=0.3, adaptive=adaptive)
    for _ in range(10):
        loss().backward()
        sam.first_step(zero_grad=True)
        loss().backward()
        sam.second_step(zero_grad=True)
    assert same(list(model.parameters()), list(other.parameters()))
    assert all(p.grad is None for p in other.parameters())


def test_the_second_gradient_is_that_at_the_perturbed_weights():
    model, loss = network(torch.float64)
    params = list(model.parameters())
    sam = SAM(torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "rho": 0.7}], lr=1.0), rho=0.2)
    before = [p.detach().clone() for p in params]
    g = torch.autograd.grad(loss(), params)
    length = torch.cat([x.reshape(-1) for x in g]).norm()  # one norm for both groups
    with torch.no_grad():
        for p, x, rho in zip(params, g, (0.2, 0.7, 0.7, 0.7), strict=True):
            p.add_(rho * x / length)
    expected = [b - x for b, x in zip(before, torch.autograd.grad(loss(), params), strict=True)]
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    sam.step(closure_of(sam, loss))
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype):
    model, loss = network(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=300.0)  # adding and subtracting would lose digits
    sam.step(closure_of(sam, loss))
    assert same(list(model.parameters()), before)
    loss().backward()
    sam.first_step()
    assert not same(list(model.parameters()), before)
    sam.restore()
    assert same(list(model.parameters()), before)


def test_a_failing_closure_leaves_the_weights_in_place():
    model, loss = network(norm=True)
    sam, calls = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model), []

    def closure():
        if calls:
            raise KeyboardInterrupt
        return closure_of(sam, loss, calls)()

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert same(list(model.parameters()), before)
    sam.step(closure_of(sam, loss))


def test_running_statistics_are_those_of_the_first_pass():
    reference, loss = network(norm=True)
    loss()
    once = [b.clone() for b in reference.buffers()]
    model, loss = network(norm=True)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    sam.step(closure_of(sam, loss))
    assert same(list(model.buffers()), once)
    model, loss = network(norm=True)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    sam.step(closure_of(sam, loss))
    assert int(model[1].num_batches_tracked) == 2


def test_late_sam_is_sgd_and_then_sam_with_the_same_momentum():
    base = BASES["SGD"]
    model, loss = network()
    sam = SAM(base(model.parameters()), rho=0.4, enabled=False)
    train(model, loss, sam, 10)
    sam.enabled = True
    train(model, loss, sam, 10)
    other, loss = network()
    sgd = base(other.parameters())
    train(other, loss, sgd, 10)
    train(other, loss, SAM(sgd, rho=0.4), 10)
    assert same(list(model.parameters()), list(other.parameters()))
    saved = sam.state_dict()
    again = SAM(base(model.parameters()), enabled=False)
    again.load_state_dict(saved)
    assert again.enabled
    assert again.param_groups[0]["rho"] == 0.4


def test_one_group_alone_can_be_perturbed():
    model, loss = network()
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "enabled": False}]
    sam = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.5)
    before = [p.detach().clone() for p in params]
    loss().backward()
    sam.first_step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, False, True, True]
    moved = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(params, before, strict=True)]).norm()
    assert float(moved) < 0.5  # the norm is that of all gradients
    sam.restore()


def test_a_gradient_scaler_drives_it_and_skips_what_overflowed():
    base = BASES["SGD"]
    model, loss = network()
    expected = train(model, loss, SAM(base(model.parameters()), rho=0.3), 5)
    model, loss = network()
    sam, scaler = SAM(base(model.parameters()), rho=0.3), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(5):
        scaler.scale(loss()).backward()
        sam.first_step(zero_grad=True)
        scaler.scale(loss()).backward()
        scaler.step(sam)
        sam.restore()
        scaler.update()
        sam.zero_grad()
    assert same(list(model.parameters()), expected)
    scaler.scale(loss() * math.inf).backward()
    sam.first_step(zero_grad=True)
    scaler.scale(loss()).backward()
    scaler.step(sam)
    sam.restore()
    assert same(list(model.parameters()), expected)


def test_schedulers_of_either_and_hooks_see_one_step():
    model, loss = network()
    base = BASES["SGD"](model.parameters())
    sam = SAM(base, rho=0.3)
    seen = []
    base.register_step_post_hook(lambda *_: seen.append("base"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sam, 0.5)
    for _ in range(2):
        loss().backward()
        sam.first_step(zero_grad=True)
        loss().backward()
        sam.second_step(zero_grad=True)
        scheduler.step()
    assert seen == ["base", "base"]
    assert base.param_groups[0]["lr"] == sam.param_groups[0]["lr"] == 0.025


def test_nothing_is_kept_between_steps():
    model, loss = network()
    base = BASES["SGD"](model.parameters())
    sam = SAM(base, rho=0.3)
    train(model, loss, sam, 2)
    assert sam.state_bytes() == sum(p.nbytes for p in model.parameters())  # the momentum of SGD
    assert sam.state_dict()["state"] == {}


def test_misuse_is_refused():
    model, loss = network()
    sam = SAM(BASES["SGD"](model.parameters()))
    with pytest.raises(ValueError, match="two gradients"):
        sam.step()
    with pytest.raises(RuntimeError, match="without first_step"):
        sam.second_step()
    loss().backward()
    sam.first_step()
    for call in (sam.first_step, sam.state_dict, lambda: sam.step(lambda: None), lambda: sam.load_state_dict({})):
        with pytest.raises(RuntimeError, match="second_step"):
            call()
    sam.second_step()
    with pytest.raises(ValueError, match="`rho` is -1"):
        SAM(BASES["SGD"](model.parameters()), rho=-1.0)
    with pytest.raises(TypeError, match="`base` is a list"):
        SAM(list(model.parameters()))
    with pytest.raises(TypeError, match="adaptive"):
        SAM(BASES["SGD"](model.parameters()), adaptive=1)
    with pytest.raises(TypeError, match="`model` is a list"):
        SAM(BASES["SGD"](model.parameters()), model=[])


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_agrees_with_another_implementation(adaptive):
    theirs = pytest.importorskip("pytorch_optimizer").SAM
    mine, my_loss = network(torch.float64)
    other, other_loss = network(torch.float64)
    sam = SAM(torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9), rho=0.3, adaptive=adaptive)
    oracle = theirs(other.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.1, momentum=0.9)
    for _ in range(20):
        sam.step(closure_of(sam, my_loss))
        other_loss().backward()
        oracle.step(closure_of(oracle, other_loss))
        oracle.zero_grad()
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # their norm is summed in float32


def quadratic(H, make, steps=1600, seed=0):
    """log of the growth of ‖x‖ over the second half of a run on xᵀHx/2."""
    gen = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.randn(len(H), dtype=torch.float64, generator=gen))
    optimizer = make([x])

    def closure():
        x.grad = H @ x.detach()
        return 0.0

    sizes = []
    for _ in range(steps):
        optimizer.step(closure)
        sizes.append(float(x.detach().norm()))
        if sizes[-1] > 1e100:
            return math.inf
    half = steps // 2
    return math.log(max(sizes[half:]) / max(sizes[half // 2 : half])) if max(sizes[half:]) > 1e-250 else -math.inf


def hessian_with(top, n=5):
    gen = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=gen)).Q
    return Q @ torch.diag(top * torch.linspace(0.2, 1.0, n, dtype=torch.float64) ** 2) @ Q.T


RULES = {
    "gradient descent": lambda params: torch.optim.SGD(params, lr=0.1),
    "heavy ball": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.8, nesterov=True),
    "weight decay": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=3.0),
    "accelerated": lambda params: AcceleratedSGD(params, lr=0.05, gamma=0.3, beta=0.05),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_unnormalised_form_diverges_at_its_threshold(rule):
    make = lambda params: SAM(rule(params), rho=0.5, normalize=False)
    optimizer = make([nn.Parameter(torch.ones(1))])
    decay = optimizer.coupled_weight_decay(optimizer.param_groups[0])
    top = optimizer.stability_threshold() - decay
    assert quadratic(hessian_with(0.995 * top), make) < 0
    assert quadratic(hessian_with(1.005 * top), make) > 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_normalised_form_stays_bounded_below_the_threshold_of_its_base(rule):
    make = lambda params: SAM(rule(params), rho=0.5)
    optimizer = make([nn.Parameter(torch.ones(1))])
    top = optimizer.stability_threshold() - optimizer.coupled_weight_decay(optimizer.param_groups[0])
    assert abs(quadratic(hessian_with(0.98 * top), make)) < 0.05
    assert quadratic(hessian_with(1.02 * top), make) > 1


def test_closed_forms_in_one_dimension():
    x = [nn.Parameter(torch.ones(1, dtype=torch.float64))]
    lr, rho = 0.1, 0.5
    sam = SAM(torch.optim.SGD(x, lr=lr), rho=rho, normalize=False)
    h = sam.stability_threshold()
    assert h == pytest.approx((-1 + math.sqrt(1 + 8 * rho / lr)) / (2 * rho), rel=1e-14)
    assert h == pytest.approx(5.4031, abs=5e-5)
    h = 5.0
    sam = SAM(torch.optim.SGD(x, lr=lr), rho=rho)

    def closure():
        x[0].grad = h * x[0].detach()
        return 0.0

    seen = []
    for _ in range(300):
        sam.step(closure)
        seen.append(float(x[0].detach()))
    amplitude = lr * h * rho / (2 - lr * h)
    assert seen[-1] == pytest.approx(-seen[-2], abs=1e-10)
    assert abs(seen[-1]) == pytest.approx(amplitude, abs=1e-10)


def test_it_says_when_a_step_needs_a_closure():
    x = nn.Parameter(torch.ones(1))
    sam = SAM(torch.optim.SGD([x], lr=0.1))
    noisy = LangevinSGD(sam, temperature=0.1)
    assert needs_closure(sam)
    assert needs_closure(noisy)
    sam.enabled = False
    assert not needs_closure(sam)
    assert not needs_closure(noisy)


def test_where_no_threshold_exists_there_is_none():
    x = lambda: [nn.Parameter(torch.ones(1))]
    assert SAM(torch.optim.SGD(x(), lr=0.1), adaptive=True).stability_threshold() is None
    assert SAM(torch.optim.SGD(x(), lr=0.1), adaptive=True, rho=0.0).stability_threshold() == 20.0
    adam = lambda: torch.optim.Adam(x(), lr=0.1)
    assert SAM(adam(), normalize=False).stability_threshold() is None
    assert SAM(adam()).stability_threshold() == SAM(adam(), enabled=False).stability_threshold() == pytest.approx(380)
    noisy = lambda: LangevinSGD(x(), 0.1, temperature=1.0)
    assert SAM(noisy(), normalize=False, rho=0.5).stability_threshold() == pytest.approx(5.4031, abs=5e-5)


def test_the_edge_is_where_a_step_stops_to_reduce_the_loss():
    lr, rho = 0.1, 0.05
    for length in (1e-3, 0.1, 7.0):
        h = sam_edge(2 / lr, rho, length)
        published = length / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * length)) - 1)
        assert h == pytest.approx(published, rel=1e-9)
        x = nn.Parameter(torch.tensor([length / h], dtype=torch.float64))
        sam = SAM(torch.optim.SGD([x], lr=lr), rho=rho)
        before = copy.deepcopy(x.detach())

        def closure(x=x, h=h):
            x.grad = h * x.detach()
            return 0.0

        sam.step(closure)
        # The 1e-12 added to the norm is 1e-9 of the smallest.
        torch.testing.assert_close(x.detach(), -before, rtol=1e-8, atol=0)
    assert sam_edge(20.0, 0.0, 1.0) == 20.0
    assert sam_edge(20.0, 0.1, 0.0) == 0.0
    with pytest.raises(ValueError, match="`threshold` is 0"):
        sam_edge(0.0, 0.1, 1.0)
