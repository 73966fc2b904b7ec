"""The modes of optimizers with momentum, against the optimizers themselves."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.eigen_response import EigenResponse, eigen_responses
from sharpscope.dynamics.optimizers.accelerated import AcceleratedSGD, NesterovForm
from torch import nn

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "heavy ball": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8),
    "damped": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8, dampening=0.3),
    "Nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8, nesterov=True),
    "ASGD": lambda params: AcceleratedSGD(params, lr=0.1, gamma=0.6, beta=0.05),
    "ASGD, own alpha": lambda params: AcceleratedSGD(params, lr=0.1, gamma=0.3, beta=0.2, alpha=0.6),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("eigenvalue", [0.05, 1.0, 7.0])
def test_iterates_obey_the_recursion_of_the_roots(make, eigenvalue):
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([p])
    path = []
    for _ in range(12):
        path.append(float(p.detach()))
        p.grad = eigenvalue * p.detach()
        optimizer.step()
    first, second = eigen_responses(optimizer)[0].roots(eigenvalue)
    # torch's first momentum buffer is the gradient without dampening, so that the recursion begins a step later.
    for before, now, after in zip(path[1:], path[2:], path[3:], strict=False):
        expected = (first + second) * now - first * second * before
        assert after == pytest.approx(expected.real, abs=1e-12 * max(map(abs, path)))
        assert abs(expected.imag) < 1e-12 * max(map(abs, path))


def test_special_cases():
    values = np.array([0.0, 0.3, 5.0, 12.0])
    plain = EigenResponse(NesterovForm(0.0, 0.1, 0.1))
    np.testing.assert_allclose(plain.modulus(values), abs(1 - 0.1 * values), atol=1e-15)
    assert plain.complex_range is None
    assert plain.slow_step == 0.1
    heavy = EigenResponse(NesterovForm(0.9, 0.0, 0.1))
    low, high = heavy.complex_range
    assert (low, high) == pytest.approx(((1 - math.sqrt(0.9)) ** 2 / 0.1, (1 + math.sqrt(0.9)) ** 2 / 0.1), rel=1e-12)
    assert heavy.modulus(1.0) == pytest.approx(math.sqrt(0.9), rel=1e-12)
    assert heavy.slow_step == pytest.approx(1.0, rel=1e-12)
    assert heavy.even_eigenvalue == math.inf
    assert heavy.roots(values).shape == (4, 2)


@pytest.mark.parametrize("make", list(OPTIMIZERS.values())[3:], ids=list(OPTIMIZERS)[3:])
def test_where_the_roots_turn_complex_and_where_a_gradient_step_is_as_fast(make):
    response = eigen_responses(make([nn.Parameter(torch.ones(1))]))[0]
    low, high = response.complex_range
    for value, turns in ((0.99 * low, False), (1.01 * low, True), (0.99 * high, True), (1.01 * high, False)):
        assert bool(abs(response.roots(value).imag).max() > 0) == turns
    even, step = response.even_eigenvalue, response.form.lr
    if low < even < high:
        assert response.modulus(even) == pytest.approx(abs(1 - step * even), rel=1e-12)
        assert response.modulus(0.9 * even) < abs(1 - step * 0.9 * even)
    slow = 1e-6
    assert 1 - response.modulus(slow) == pytest.approx(response.slow_step * slow, rel=1e-4)


def test_the_threshold_of_the_class_is_where_a_root_leaves_the_circle():
    optimizer = AcceleratedSGD([nn.Parameter(torch.ones(1))], lr=0.1, gamma=0.6, beta=0.05)
    edge, response = optimizer.stability_threshold(), eigen_responses(optimizer)[0]
    assert response.modulus(edge) == pytest.approx(1, abs=1e-12)
    assert response.modulus(0.999 * edge) < 1 < response.modulus(1.001 * edge)


def test_groups_and_strangers():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.2)]
    assert [response.form.lr for response in eigen_responses(torch.optim.SGD(groups, lr=1.0))] == [0.1, 0.2]
    with pytest.raises(TypeError, match="`optimizer` is Adam"):
        eigen_responses(torch.optim.Adam([nn.Parameter(torch.ones(1))]))
