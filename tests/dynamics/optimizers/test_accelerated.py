"""Accelerated SGD: its two-by-two map, its other form, its limits, and the exact risk on Gaussian least squares."""

import copy
import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.accelerated import AcceleratedSGD, accelerated_options
from torch import nn

D, PSI, KT = 60, 3.0, 5
SPECTRUM = np.arange(1, D + 1) ** -2.0
RULE = accelerated_options(SPECTRUM.tolist(), KT, PSI)
SGD_RULE = {**RULE, "gamma": RULE["lr"]}


def scalar(value=1.0):
    return nn.Parameter(torch.tensor([value], dtype=torch.float64))


def step_on(optimizer, p, curvature):
    p.grad = curvature * p.detach()
    optimizer.step()


def test_the_rule_for_a_spectrum():
    assert RULE["lr"] == pytest.approx(0.1023, abs=5e-5)
    assert RULE["gamma"] == pytest.approx(1.0114, abs=5e-5)
    assert RULE["beta"] == pytest.approx(0.00675, abs=5e-6)
    assert RULE["alpha"] == pytest.approx(0.9933, abs=5e-5)
    optimizer = AcceleratedSGD.from_spectrum([scalar()], SPECTRUM[::-1].copy(), KT, weight_decay=0.1)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in RULE} == pytest.approx(RULE, rel=1e-14)
    assert group["weight_decay"] == 0.1
    form = optimizer.nesterov_form()[0]
    assert form.momentum == pytest.approx(0.98660, abs=5e-6)
    assert form.step_size == pytest.approx(0.10844, abs=5e-6)
    assert (1 - form.momentum) / form.lr == pytest.approx(0.131, abs=5e-4)  # below it ASGD beats SGD


def map_of(curvature, **options):
    """The step as a matrix on (y, v)."""
    columns = []
    for y, v in ((1.0, 0.0), (0.0, 1.0)):
        p = scalar()
        optimizer = AcceleratedSGD([p], **options)
        step_on(optimizer, p, curvature)
        p.data.fill_(y)
        optimizer.state[p]["v"].fill_(v)
        step_on(optimizer, p, curvature)
        columns.append([float(p.detach()), float(optimizer.state[p]["v"])])
    return np.array(columns).T


@pytest.mark.parametrize(
    ("curvature", "modulus", "plain"),
    [(1.0, 0.94107, 0.89765), (0.1, 0.98818, 0.98977), (0.01, 0.99277, 0.998977), (1e-4, 0.99994413, 0.99998977)],
)
def test_spectrum_of_the_step(curvature, modulus, plain):
    p = scalar()
    c, delta, q = AcceleratedSGD([p], **RULE).nesterov_form()[0]
    roots = np.roots([1.0, -(1 + c - q * curvature), c * (1 - delta * curvature)])
    found = np.linalg.eigvals(map_of(curvature, **RULE))
    np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(roots), rtol=0, atol=1e-12)
    assert max(abs(found)) == pytest.approx(modulus, abs=2e-5)
    assert abs(1 - delta * curvature) == pytest.approx(plain, abs=2e-5)


def test_where_the_roots_are_complex():
    c, delta, q = AcceleratedSGD([scalar()], **RULE).nesterov_form()[0]
    ends = [(math.sqrt(q - c * delta) + s * math.sqrt(c * (q - delta))) ** 2 / q**2 for s in (-1, 1)]
    assert ends == pytest.approx([0.006686, 2.285], rel=5e-4)
    for curvature, turns in ((0.99 * ends[0], False), (1.01 * ends[0], True), (0.99 * ends[1], True)):
        found = np.linalg.eigvals(map_of(curvature, **RULE))
        assert bool(abs(found.imag).max() > 0) == turns
        if turns:
            np.testing.assert_allclose(abs(found) ** 2, c * (1 - delta * curvature), rtol=1e-10)


@pytest.mark.parametrize("alpha", [None, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_steps_are_sgd_bit_for_bit(alpha, dtype):
    start = torch.randn(50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = AcceleratedSGD([p], lr=0.07, gamma=0.07, beta=0.3, alpha=alpha, weight_decay=0.01)
    plain = torch.optim.SGD([q], lr=0.07, weight_decay=0.01)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97) for optimizer in (ours, plain)]
    for _ in range(100):
        p.grad, q.grad = torch.cos(3 * p.detach()), torch.cos(3 * q.detach())
        for optimizer, schedule in zip((ours, plain), schedules, strict=True):
            optimizer.step()
            schedule.step()
        assert torch.equal(p, q)


def test_its_nesterov_reading_is_the_same_iteration():
    gen = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(30, dtype=torch.float64, generator=gen))
    optimizer = AcceleratedSGD([p], lr=0.05, gamma=0.3, beta=0.2, alpha=0.7)
    c, delta, q = optimizer.nesterov_form()[0]
    y, last = p.detach().clone(), None
    for _ in range(50):
        g = torch.randn(30, dtype=torch.float64, generator=gen)
        p.grad = g
        optimizer.step()
        ahead = y if last is None else last[0] - delta * last[1]
        y, last = (1 + c) * y - c * ahead - q * g, (y, g)
        torch.testing.assert_close(p.detach(), y, rtol=1e-12, atol=1e-12)


def test_torchs_nesterov_is_a_case_of_it():
    c, beta, delta = 0.8, 0.1, 0.05
    alpha = c / (1 - beta)
    gamma = (delta * (1 + c) - alpha * delta) / (1 - alpha)  # so that q = δ (1 + c)
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(30, dtype=torch.float64, generator=gen)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = AcceleratedSGD([p], lr=delta, gamma=gamma, beta=beta, alpha=alpha)
    torchs = torch.optim.SGD([q], lr=delta, momentum=c, nesterov=True)
    for _ in range(50):
        p.grad = q.grad = torch.randn(30, dtype=torch.float64, generator=gen)
        ours.step()
        torchs.step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert ours.stability_threshold() == pytest.approx(2 * (1 + c) / (delta * (1 + 2 * c)), rel=1e-12)


def exact_risks(rule, error, noise, steps):
    """Σ λ_k E (w_k − w*_k)² after each step for Gaussian x, from the second moments of (w, v) per coordinate.

    E[xxᵀ y yᵀ xxᵀ]_kk = 2 λ_k² E y_k² + λ_k Σ_j λ_j E y_j².
    """
    delta, gamma, beta, alpha = (rule[key] for key in ("lr", "gamma", "beta", "alpha"))
    P = np.zeros((D, 2, 2)) + (error**2)[:, None, None]
    to_y, pull = np.array([alpha, 1 - alpha]), np.array([delta, gamma])
    fixed = np.array([[alpha, 1 - alpha], [beta * alpha, beta * (1 - alpha) + 1 - beta]])
    mean = fixed[None] - SPECTRUM[:, None, None] * (pull[:, None] * to_y)[None]
    risks = []
    for _ in range(steps):
        yy = np.einsum("i,kij,j->k", to_y, P, to_y)
        # The gradient is (x·y − noise) x: second moment less the square of the mean part, which `mean` has.
        extra = SPECTRUM**2 * yy + SPECTRUM * (SPECTRUM @ yy) + noise * SPECTRUM
        P = mean @ P @ mean.transpose(0, 2, 1) + extra[:, None, None] * np.outer(pull, pull)
        risks.append(float(SPECTRUM @ P[:, 0, 0]))
    return risks


def coordinate(k):
    return np.eye(D)[k - 1]


@pytest.mark.parametrize(("error", "noise"), [(coordinate(1) + coordinate(10), 0.0), (np.zeros(D), 0.01)])
@pytest.mark.parametrize("rule", [RULE, SGD_RULE], ids=["accelerated", "sgd"])
def test_risk_on_gaussian_least_squares(rule, error, noise):
    runs, steps = 4000, 120
    gen = torch.Generator().manual_seed(0)
    root = torch.from_numpy(np.sqrt(SPECTRUM))
    p = nn.Parameter(torch.from_numpy(error).repeat(runs, 1))  # the error of each run; the optimizer is elementwise
    optimizer = AcceleratedSGD([p], **rule)
    for _ in range(steps):
        x = torch.randn(runs, D, dtype=torch.float64, generator=gen) * root
        residual = (x * p.detach()).sum(1) - math.sqrt(noise) * torch.randn(runs, dtype=torch.float64, generator=gen)
        p.grad = residual[:, None] * x
        optimizer.step()
    with optimizer.swap_to_output():
        risks = (p.detach().square() * torch.from_numpy(SPECTRUM)).sum(1)
    stderr = float(risks.std()) / math.sqrt(runs)
    assert abs(float(risks.mean()) - exact_risks(rule, error, noise, steps)[-1]) < 4 * stderr


def test_bias_and_variance_compared_with_sgd():
    head = [exact_risks(rule, coordinate(1), 0.0, 200)[-1] for rule in (RULE, SGD_RULE)]
    assert head[0] > 3 * head[1]  # slower where the curvature is large
    tail = [exact_risks(rule, coordinate(10), 0.0, 500)[-1] for rule in (RULE, SGD_RULE)]
    assert tail[0] < tail[1] / 20  # faster where it is small
    variance = [np.array(exact_risks(rule, np.zeros(D), 0.01, 500)) for rule in (RULE, SGD_RULE)]
    assert bool((variance[0] >= variance[1]).all())
    assert 2 < variance[0][-1] / variance[1][-1] < 3


def test_a_linear_model_follows_the_recursion():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((300, 6)) * np.arange(1, 7) ** -0.5, rng.standard_normal(300)
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    w = v = model.weight.detach().numpy()[0].copy()
    delta, gamma, beta, alpha = 0.04, 0.15, 0.1, 0.8
    optimizer = AcceleratedSGD(model.parameters(), lr=delta, gamma=gamma, beta=beta, alpha=alpha, average_from=100)
    outputs = [w]
    for x, y in zip(X, Y, strict=True):
        optimizer.zero_grad()
        (0.5 * (model(torch.from_numpy(x)) - y).square()).sum().backward()
        optimizer.step()
        point = alpha * w + (1 - alpha) * v
        g = (x @ point - y) * x
        w, v = point - delta * g, beta * point + (1 - beta) * v - gamma * g
        outputs.append(w)
        np.testing.assert_allclose(model.weight.detach().numpy()[0], alpha * w + (1 - alpha) * v, atol=1e-10)
    for average, expected in (
        (False, w),
        (True, np.mean(outputs[100:], axis=0)),
        (None, np.mean(outputs[100:], axis=0)),
    ):
        before = model.weight.detach().clone()
        with optimizer.swap_to_output(average):
            np.testing.assert_allclose(model.weight.detach().numpy()[0], expected, atol=1e-10)
        assert torch.equal(model.weight, before)


THRESHOLD_OPTIONS = {
    "rule": {**RULE},
    "sgd": {"lr": 0.1, "gamma": 0.1, "beta": 0.2},
    "long": {"lr": 0.05, "gamma": 0.8, "beta": 0.05},
    "short": {"lr": 0.1, "gamma": 0.0, "beta": 0.5},
    "standing": {"lr": 0.1, "gamma": 0.0, "beta": 0.0, "alpha": 0.7},
    "plain": {"lr": 0.1, "gamma": 1.0, "beta": 0.0},
    "decay": {"lr": 0.05, "gamma": 0.3, "beta": 0.1, "alpha": 0.6, "weight_decay": 4.0},
}


@pytest.mark.parametrize("options", THRESHOLD_OPTIONS.values(), ids=THRESHOLD_OPTIONS)
def test_divergence_sets_in_at_the_threshold(options):
    def growth(factor):
        gen = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(4, dtype=torch.float64, generator=gen))
        optimizer = AcceleratedSGD([p], **options)
        Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=gen)).Q
        top = optimizer.stability_threshold() - options.get("weight_decay", 0.0)
        H = Q @ torch.diag(factor * top * torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)) @ Q.T
        sizes = []
        for _ in range(2000):
            p.grad = H @ p.detach()
            optimizer.step()
            sizes.append(float(p.detach().norm()))
        return max(sizes[1000:]) / max(sizes[500:1000])

    assert growth(0.995) < 1 + 1e-9  # where v never moves, y ends at rest away from zero
    assert growth(1.005) > 1


def test_threshold_at_the_ends_of_its_options():
    assert AcceleratedSGD([scalar()], lr=0.0, gamma=0.2, beta=0.1).stability_threshold() is None
    plain = AcceleratedSGD([scalar()], lr=0.1, gamma=1.0, beta=0.0)  # α = 1: y is w, and v is not heard
    assert plain.stability_threshold() == 20.0


def test_gamma_keeps_its_ratio_to_the_learning_rate():
    options = {"lr": 0.1, "gamma": 0.4, "beta": 0.1}
    p, q, r = scalar(), scalar(), scalar()
    groups = [{"params": [p]}, {"params": [q], "lr": 0.05}, {"params": [r], "lr": 0.05, "gamma": 0.4}]
    forms = AcceleratedSGD(groups, **options).nesterov_form()
    halved = AcceleratedSGD([scalar()], lr=0.05, gamma=0.2, beta=0.1).nesterov_form()[0]
    own = AcceleratedSGD([scalar()], lr=0.05, gamma=0.4, beta=0.1).nesterov_form()[0]
    assert forms[1] == pytest.approx(halved)
    assert forms[2] == pytest.approx(own)
    optimizer = AcceleratedSGD([p], **options)
    optimizer.param_groups[0]["lr"] = 0.05
    assert optimizer.nesterov_form()[0] == pytest.approx(halved)
    again = AcceleratedSGD([p], lr=1.0, gamma=1.0, beta=0.5)
    again.load_state_dict(optimizer.state_dict())
    assert again.nesterov_form() == optimizer.nesterov_form()


def test_output_before_and_between_steps():
    p, idle = scalar(2.0), scalar(3.0)
    optimizer = AcceleratedSGD([p, idle], lr=0.1, gamma=0.5, beta=0.1)
    with optimizer.swap_to_output():
        assert float(p.detach()) == 2.0
    step_on(optimizer, p, 1.0)
    with optimizer.swap_to_output():
        assert float(p.detach()) == pytest.approx(1.8, abs=1e-15)  # w = y − δ g
        assert float(idle.detach()) == 3.0
    inside = copy.deepcopy(p.detach())
    with pytest.raises(KeyError), optimizer.swap_to_output():
        raise KeyError
    assert torch.equal(p, inside)
    with pytest.raises(ValueError, match="nothing is averaged"), optimizer.swap_to_output(True):
        pass


def test_half_precision_keeps_a_wide_state():
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = AcceleratedSGD([p], lr=0.01, gamma=0.05, beta=0.1, average_from=1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.dtype == torch.bfloat16
    assert {optimizer.state[p][key].dtype for key in ("v", "average")} == {torch.float32}


def test_misuse_is_refused():
    for options, words in (
        ({"gamma": -1.0}, "`gamma` is -1"),
        ({"beta": 1.5}, "`beta` is 1.5"),
        ({"alpha": 0.0}, "`alpha` is 0"),
        ({"weight_decay": -1.0}, "`weight_decay` is -1"),
        ({"average_from": 0}, "`average_from` is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            AcceleratedSGD([scalar()], **{"lr": 0.1, "gamma": 0.2, "beta": 0.1, **options})
    with pytest.raises(ValueError, match="from 1 to 2"):
        accelerated_options([3.0, 2.0, 1.0], 3)
    with pytest.raises(ValueError, match="`eigenvalues`"):
        accelerated_options([1.0, -1.0], 1)
