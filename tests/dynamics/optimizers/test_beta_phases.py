"""Phase diagrams: every run is torch's Adam, and the labels say what the paper says."""

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.beta_phases import index_samples, phase_diagram, rescaled_beta2
from sharpscope.dynamics.optimizers.elementwise_adam import adam_paths
from sharpscope.dynamics.optimizers.generic_adam import GenericAdam
from sharpscope.dynamics.optimizers.schedules import PaperTheta
from sharpscope.dynamics.studies.counterexamples import adam_counterexample, reddi, reddi_stochastic
from torch import nn

PROBLEMS = [
    adam_counterexample(3),
    adam_counterexample(10),
    adam_counterexample(4, a=0.2),
    reddi(7),
    reddi_stochastic(),
]


def run_by_hand(problem, optimizer_of, indices, start, lr=0.1, decay=0.5):
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = optimizer_of([x])
    path = []
    for t, i in enumerate(indices, 1):
        optimizer.param_groups[0]["lr"] = lr * t**-decay
        optimizer.zero_grad()
        problem.value(x, torch.tensor([int(i)])).backward()
        optimizer.step()
        if problem.box is not None:
            with torch.no_grad():
                x.clamp_(*problem.box)
        path.append(float(x.detach()))
    return path


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_slopes_are_the_derivatives_of_the_values(problem):
    for x in (-3.0, -1.5, -0.5, 0.9):
        for i in range(problem.n):
            at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(problem.value(at, torch.tensor([i])), at)
            assert float(problem.slope(np.float64(x), i)) == pytest.approx(float(slope), abs=1e-14)
    at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(problem.value(at, torch.arange(problem.n)), at)
    assert float(problem.full_slope(np.float64(0.3))) == pytest.approx(float(slope), abs=1e-12)


@pytest.mark.parametrize("n", [3, 10, 50])
def test_the_counterexample_has_its_published_constants(n):
    problem, x = adam_counterexample(n), np.linspace(-6, 6, 241)
    full = problem.full_slope(x)
    each = problem.slope(x[:, None], np.arange(n))
    assert full[x >= -1] == pytest.approx(1 / n)
    assert (np.sign(full) == np.sign(np.round(x + 2, 9))).all()  # the only zero is −2
    a = 1 / (n - 1) ** 2
    D1 = n**2 * ((1 + (n - 1) * a) ** 2 + (n - 1) * a**2)
    np.testing.assert_allclose(np.square(each).sum(1), D1 * full**2, rtol=1e-9, atol=1e-12)
    smooth = np.abs(np.diff(each, axis=0)).max() / (x[1] - x[0])
    assert smooth <= 1 + (n - 1) * a + 1e-9


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.5), (0.9, 0.99), (0.5, 0.5)])
def test_each_run_is_that_of_torch_adam(betas):
    problem, steps = adam_counterexample(10), 3000
    diagram = phase_diagram(problem, [0.0, 0.5, 0.9], [0.0, 0.5, 0.99], steps=steps, seeds=2)
    indices = index_samples(10, 2)(steps)[:, 1]
    path = run_by_hand(problem, lambda p: torch.optim.Adam(p, betas=betas, foreach=False), indices, 1.0)
    row, column = [0.0, 0.5, 0.9].index(betas[0]), [0.0, 0.5, 0.99].index(betas[1])
    found = diagram.curves[:, row, column, 1]
    expected = np.array(path).reshape(len(found), -1).mean(1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(diagram.ends, np.arange(30, 3001, 30))


@pytest.mark.parametrize("order", ["uniform", "cyclic", "shuffled"])
def test_indices_do_not_depend_on_how_many_are_drawn_at_once(order):
    together = index_samples(5, 3, order)(40)
    pieces = index_samples(5, 3, order)
    np.testing.assert_array_equal(together, np.concatenate([pieces(k) for k in (7, 1, 20, 12)]))
    assert together.min() == 0
    assert together.max() == 4
    if order != "uniform":
        assert (np.sort(together.reshape(8, 5, 3), axis=1) == np.arange(5)[None, :, None]).all()
    if order != "cyclic":
        assert not np.array_equal(together[:, 0], together[:, 1])


@pytest.mark.parametrize("r", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_runs_with_a_schedule_are_those_of_generic_adam(r, beta):
    problem, theta = reddi_stochastic(), PaperTheta(r, base=0.01)
    paths = adam_paths(
        problem.slope,
        index_samples(problem.n, 3),
        np.zeros(3),
        steps=500,
        alpha=lambda t: 0.5 * t**-0.5,
        beta=beta,
        theta=theta.values,
        corrected=False,
        v0=1e-16,
        box=problem.box,
        num_stretches=500,
    )
    indices = index_samples(problem.n, 3)(500)[:, 2]
    path = run_by_hand(problem, lambda p: GenericAdam(p, theta=theta, beta=beta), indices, 0.0, lr=0.5)
    np.testing.assert_allclose(paths.means[:, 2], path, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="corrected"):
        adam_paths(problem.slope, index_samples(100, 3), np.zeros(3), steps=5, alpha=lambda t: t, beta=0.0,
                   theta=theta.values, corrected=True)  # fmt: skip


def test_small_beta2_diverges_at_the_predicted_speed_and_large_beta2_converges():
    steps = 20_000
    for n in (10, 50):
        diagram = phase_diagram(adam_counterexample(n), [0.0], [0.0, 0.99], steps=steps, seeds=8)
        assert diagram.label(0.0, 0.0) == "diverged"
        # β = (0, 0) is the sign method: E step = −η (1 − (n − 1)) / n.
        k = np.arange(1, steps + 1)
        way = 0.1 * np.cumsum(k**-0.5)
        signs = np.sqrt((4 * (n - 1) / n**2) * np.sum(0.01 / k))  # standard deviation of the sum of signs
        expected = 1 + (n - 2) / n * way[-steps // 10 :].mean()
        assert diagram.final[0, 0].mean() == pytest.approx(expected, abs=4 * signs / np.sqrt(8))
        if n == 10:
            assert diagram.final[0, 1] == pytest.approx(-2, abs=0.05)
            assert diagram.critical_beta2(0.0) == (0.0, 0.99)


def test_labels_tell_converged_neighbourhood_and_diverged_apart():
    square = adam_counterexample(3)
    still = phase_diagram(square, [0.0], [0.5], steps=200, lr=1e-9, start=-2.0)
    assert still.labels == [["converged"]]
    assert still.critical_beta2(0.0) == (None, 0.5)
    away = phase_diagram(reddi(101), [0.9], [0.99], steps=2000, start=0.0)
    assert away.labels == [["diverged"]]
    assert (away.final[0, 0] > 0.8).all()
    assert away.critical_beta2(0.9) == (0.99, None)
    on_its_way = phase_diagram(adam_counterexample(10), [0.0], [0.999], steps=200, lr=0.01)
    assert on_its_way.labels == [["neighbourhood"]]


def test_bad_grids_are_refused():
    problem = adam_counterexample(3)
    for options in ({"beta1s": [1.0]}, {"beta2s": [0.9, 0.5]}, {"steps": 50}, {"seeds": 0}, {"order": "random"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            phase_diagram(problem, **{"beta1s": [0.0], "beta2s": [0.5], **options})
    with pytest.raises(ValueError, match="`n` is 2"):
        adam_counterexample(2)


def test_beta2_for_another_batch_size_averages_over_as_many_examples():
    assert rescaled_beta2(0.999, 32, 64) == pytest.approx(0.999**2)
    assert 1 / (1 - rescaled_beta2(0.9999, 512, 64)) * 64 == pytest.approx(512 / (1 - 0.9999), rel=1e-3)
