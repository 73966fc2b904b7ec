"""First-order sharpness: closed forms on quadratics, dense evaluation on a network, nothing left behind."""

import math

import pytest
import torch
from sharpscope import Objective
from sharpscope.landscape.sharpness import average_sharpness, sam_sharpness
from torch import nn


def symmetric(n=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, dtype=torch.float64, generator=gen)
    return A + A.T, torch.randn(n, dtype=torch.float64, generator=gen)


def quadratic(H, x):
    return Objective.from_closure(lambda y: 0.5 * y @ H @ y, x)


def test_quadratic():
    H, x = symmetric()
    g = H @ x
    unit = g / g.norm()
    for rho in (1e-3, 0.1, 2.0):
        expected = rho * float(g.norm()) + rho**2 / 2 * float(unit @ H @ unit)
        assert sam_sharpness(quadratic(H, x), rho) == pytest.approx(expected, rel=1e-10)
    assert sam_sharpness(quadratic(H, x), 0.0) == 0.0


def test_quadratic_in_units_of_the_weights():
    H, x = symmetric()
    g = H @ x
    shift = 0.1 * x**2 * g / (x.abs() * g).norm()
    expected = float(g @ shift + 0.5 * shift @ H @ shift)
    assert sam_sharpness(quadratic(H, x), 0.1, adaptive=True) == pytest.approx(expected, rel=1e-10)


def test_several_ascent_steps_follow_the_gradient():
    H, x = symmetric()
    y = x.clone()
    for _ in range(4):
        g = H @ y
        y = y + 0.5 / 4 * g / g.norm()
    expected = float(0.5 * y @ H @ y - 0.5 * x @ H @ x)
    assert sam_sharpness(quadratic(H, x), 0.5, ascent_steps=4) == pytest.approx(expected, rel=1e-10)


def test_what_is_known_already_is_not_computed_again(monkeypatch):
    H, x = symmetric()
    objective = quadratic(H, x)
    expected = sam_sharpness(objective, 0.1)
    loss, gradient = objective.loss(), objective.gradient()
    monkeypatch.setattr(Objective, "loss", lambda self: pytest.fail("loss"))
    monkeypatch.setattr(Objective, "gradient", lambda self: pytest.fail("gradient"))
    assert sam_sharpness(objective, 0.1, loss=loss, gradient=gradient) == expected


def moved_loss(model, loss, gradient, rho):
    """The loss with the weights really moved."""
    parameters = list(model.parameters())
    with torch.no_grad():
        before = [p.clone() for p in parameters]
        pieces = gradient.split([p.numel() for p in parameters])
        for p, g in zip(parameters, pieces, strict=True):
            p += rho * g.reshape(p.shape) / gradient.norm()
        value = float(loss())
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
    return value


@pytest.mark.parametrize("chunks", [None, 7])
def test_network_with_uneven_batches_and_nothing_left_behind(problem, chunks):
    model, (x, y) = problem
    sizes = (len(x) - 7, 4, 3)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, chunk_size=chunks)
    loss = lambda: nn.functional.cross_entropy(model(x), y)
    expected = moved_loss(model, loss, objective.gradient(), 0.3) - objective.loss()
    found = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    rng = torch.get_rng_state()
    assert sam_sharpness(objective, 0.3) == pytest.approx(expected, rel=1e-10)
    average_sharpness(objective, 0.1, 2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip((*model.parameters(), *model.buffers()), found, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_part_of_the_parameters(mlp):
    model, (x, y) = mlp
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), params=["0.weight"])
    rest = [p.detach().clone() for p in model.parameters()]
    g = objective.gradient()
    with torch.no_grad():
        model[0].weight += (0.2 * g / g.norm()).reshape(model[0].weight.shape)
        high = float(nn.functional.cross_entropy(model(x), y))
        model[0].weight.copy_(rest[0])
    assert sam_sharpness(objective, 0.2) == pytest.approx(high - objective.loss(), rel=1e-9)


def test_under_no_grad_and_in_low_precision(make_problem):
    model, data = make_problem("mlp", torch.bfloat16)
    wide = Objective.supervised(model, nn.CrossEntropyLoss(), data, dtype=torch.float64)
    with torch.no_grad():
        value = sam_sharpness(wide, 0.05)
    rough = sam_sharpness(Objective.supervised(model, nn.CrossEntropyLoss(), data, check=False), 0.05)
    assert value > 0
    assert rough == pytest.approx(value, abs=0.02)  # the loss itself has three digits


def test_average_on_a_quadratic():
    H, x = symmetric()
    objective, sigma = quadratic(H, x), 0.3
    result = average_sharpness(objective, sigma, 4000, seed=1)
    expected = sigma**2 / 2 * float(H.trace())
    assert abs(result.estimate - expected) < 4 * result.stderr
    # Var zᵀHz = 2 ‖H‖_F² for normal z: the gradient has cancelled.
    exact = sigma**2 / 2 * math.sqrt(2) * float(H.norm()) / math.sqrt(4000)
    assert result.stderr == pytest.approx(exact, rel=0.1)
    assert result.num_pairs == 4000


def test_average_of_one_pair_is_half_a_curvature():
    H, x = symmetric()
    z = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    result = average_sharpness(quadratic(H, x), 0.2, 1, seed=5)
    assert result.estimate == pytest.approx(0.2**2 / 2 * float(z @ H @ z), rel=1e-9)
    assert math.isnan(result.stderr)


def test_misuse_is_refused():
    H, x = symmetric()
    objective = quadratic(H, x)
    with pytest.raises(ValueError, match="`rho` is -1"):
        sam_sharpness(objective, -1.0)
    with pytest.raises(ValueError, match="`ascent_steps` is 0"):
        sam_sharpness(objective, 0.1, ascent_steps=0)
    with pytest.raises(ValueError, match="`num_pairs` is 0"):
        average_sharpness(objective, 0.1, 0)
    with pytest.raises(ValueError, match=r"closure\(\*tensors\)"):
        sam_sharpness(Objective.from_closure(lambda: 0.5 * x @ H @ x, x), 0.1)
