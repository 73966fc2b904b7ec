"""Following eigenvalues against dense float64 matrices: along real training, and where they cross."""

import copy
import functools
import warnings

import pytest
import torch
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.operator import DenseOperator
from sharpscope.hessian.tracking import EigenTracker
from sharpscope.landscape.objective import Objective
from torch import nn


class WithStart(DenseOperator):
    """A matrix with a vector to start from, as a Hessian has its gradient."""

    def __init__(self, matrix, start):
        super().__init__(matrix)
        self._start = start

    def start_vector(self):
        return self._start


def basis(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def matrix(Q, values):
    return (Q * values) @ Q.T


def wanted(values, which, num):
    """As `top_eigenvalues` orders them."""
    if which == "LM":
        return values[values.abs().argsort(descending=True)[:num]]
    if which == "BE":
        return torch.cat([values[: num // 2], values[len(values) - (num - num // 2) :]])
    return values[:num] if which == "SA" else values.flip(0)[:num]


def training(lr, seed, steps=200, every=5):
    """Yields the Hessian, float64, of a small classifier and its dense matrix at points of its training."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    y = (x @ torch.randn(6, 4, dtype=torch.float64)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps + 1):
        if step % every == 0:
            objective = Objective.supervised(model, nn.functional.cross_entropy, (x, y))
            yield Hessian(objective)
        batch = torch.randint(0, 64, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


@functools.cache
def dense_training(lr, seed):
    """Matrices and gradients along `training`."""
    return [(op.dense(), op.start_vector().clone()) for op in training(lr, seed)]


@pytest.mark.parametrize("lr", [0.01, 0.1])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_along_training_within_the_error_bars_and_the_tolerance(lr, which):
    tol, points, within, covered, warm, cold = 1e-2, 0, 0, 0, 0, 0
    for seed in range(2):
        tracker = EigenTracker(which=which, tol=tol, seed=seed)
        for step, (matrix, gradient) in enumerate(dense_training(lr, seed)):
            A = WithStart(matrix, gradient)
            exact = torch.linalg.eigvalsh(matrix)
            pairs = tracker.measure(A)
            error, scale = abs(float(pairs.values[0] - wanted(exact, which, 1)[0])), float(exact.abs().max())
            if step == 0:
                continue
            points += 1
            within += error <= tol * scale
            covered += error <= float(pairs.value_bounds[0])
            assert float((exact - pairs.values[0]).abs().min()) <= float(pairs.residuals[0])
            assert float(pairs.residuals[0]) <= 3.01 * float(pairs.value_bounds[0])
            assert pairs.converged
            warm += pairs.products
            cold += top_eigenvalues(A, which=which, tol=tol, seed=seed).products
    assert within >= 0.98 * points
    assert covered >= 0.95 * points
    # At the weak end a search from nothing stops earlier, on values that are further off.
    assert which == "SA" or warm < 0.8 * cold


@pytest.mark.parametrize(("which", "num"), [("LA", 4), ("SA", 3), ("LM", 3), ("BE", 4), ("BE", 1)])
def test_several_and_both_ends(which, num):
    tracker = EigenTracker(num, which=which, tol=1e-4)
    for step, op in enumerate(training(0.05, 1, steps=100)):
        A = op.dense()
        spectrum = torch.linalg.eigvalsh(A)
        exact = wanted(spectrum, which, num)
        pairs = tracker.measure(op)
        assert pairs.verified == (step == 0)
        assert pairs.values.shape == (num,)
        tolerance = 1e-4 * float(spectrum.abs().max())
        torch.testing.assert_close(pairs.values, exact, rtol=0, atol=tolerance)
        assert bool(((pairs.values - exact).abs() <= pairs.value_bounds + 1e-12).all())
        V = pairs.vectors
        torch.testing.assert_close(V.T @ V, torch.eye(num, dtype=V.dtype), rtol=0, atol=1e-9)
        rayleigh = (V * (A @ V)).sum(0)
        assert bool(((A @ V - V * rayleigh).norm(dim=0) <= pairs.residuals + 1e-12).all())


def test_an_overtaking_eigenvalue_is_found_between_proofs():
    """Two eigenvalues cross, in directions that have nothing of the gradient and nothing of each other."""
    n = 300
    Q = basis(n)
    gradient = Q[:, 5:].sum(1)
    tracker, lag = EigenTracker(tol=1e-2, proof_every=None), []
    for step in range(40):
        values = torch.linspace(-1, 1, n, dtype=torch.float64)
        values[0], values[1] = 4.0, 2.0 + 0.2 * step  # the second overtakes at step 10
        pairs = tracker.measure(WithStart(matrix(Q, values), gradient))
        exact = float(values.max())
        assert (
            float(pairs.residuals[0]) >= abs(float(values[0 if pairs.values[0] < 4.1 else 1] - pairs.values[0])) - 1e-9
        )
        if abs(float(pairs.values[0]) - exact) > 1e-2 * exact:
            lag.append(step)
    assert len(lag) <= 15
    assert lag == list(range(min(lag, default=0), min(lag, default=0) + len(lag)))


def test_a_hidden_eigenvalue_is_found_by_the_next_proof_at_the_latest():
    """A saddle that is symmetric about the tracked direction: the gradient is orthogonal to what overtakes, at once."""
    n = 300
    Q = basis(n, seed=3)
    gradient = Q[:, 0] + 0.1 * Q[:, 2]
    for every in (1, 4, 7):
        tracker = EigenTracker(tol=1e-2, proof_every=every)
        found = None
        for step in range(2 * every + 1):
            values = torch.full((n,), 0.0, dtype=torch.float64)
            values[0], values[1] = 4.0, 0.0 if step == 0 else 5.0
            pairs = tracker.measure(WithStart(matrix(Q, values), gradient))
            assert pairs.verified == (step % every == 0)
            if found is None and abs(float(pairs.values[0]) - 5.0) <= 0.05:
                found = step
        assert found is not None
        assert found <= every


def test_a_sign_change_of_the_largest_by_absolute_value():
    n = 200
    Q, tracker = basis(n, seed=1), EigenTracker(which="LM", tol=1e-3, proof_every=None)
    signs = []
    for step in range(30):
        values = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
        values[0], values[-1] = -2.0 - 0.1 * step, 3.0  # crosses at step 10
        pairs = tracker.measure(WithStart(matrix(Q, values), Q.sum(1)))
        signs.append(float(pairs.values[0]) > 0)
        near = float(values[-1] if signs[-1] else values[0])
        assert abs(float(pairs.values[0]) - near) <= 2e-3 * abs(near)
    assert signs[:10] == [True] * 10
    assert signs[20:] == [False] * 10


def test_resuming_repeats_the_very_same_numbers():
    points = [matrix(basis(80), torch.linspace(-1, 1 + 0.1 * t, 80, dtype=torch.float64) ** 3) for t in range(12)]
    start = basis(80).sum(1)

    def run(tracker, these):
        return [tracker.measure(WithStart(A, start)) for A in these]

    whole = run(EigenTracker(2, tol=1e-3, proof_every=5), points)
    for cut in (1, 3, 5, 6):
        first = EigenTracker(2, tol=1e-3, proof_every=5)
        run(first, points[:cut])
        saved = copy.deepcopy(first.state)
        assert all(isinstance(value, torch.Tensor | float | int) for value in saved.values())
        run(first, points[cut : cut + 2])  # must not reach into what was saved
        rest = run(EigenTracker(2, tol=1e-3, proof_every=5, state=saved), points[cut:])
        for a, b in zip(rest, whole[cut:], strict=True):
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.vectors, b.vectors)
            assert (a.products, a.verified) == (b.products, b.verified)


def test_an_unchanged_operator_takes_two_products():
    A, start = matrix(basis(100), torch.linspace(0, 1, 100, dtype=torch.float64) ** 8), basis(100).sum(1)
    tracker = EigenTracker(tol=1e-2, proof_every=None)
    pairs = [tracker.measure(WithStart(A, start)) for _ in range(6)]
    assert pairs[-1].products <= 2
    assert all(abs(float(p.values[0]) - 1) <= 1e-2 for p in pairs)


def test_a_spent_budget_is_visible():
    tracker = EigenTracker(tol=1e-9, max_products=4)
    A = matrix(basis(100), torch.linspace(0, 1, 100, dtype=torch.float64))
    for _ in range(2):
        with pytest.warns(NotConvergedWarning, match="max_products"):
            pairs = tracker.measure(DenseOperator(A))
        assert not pairs.converged
        assert pairs.products <= 4


def test_more_than_a_basis_holds():
    """A crowded end at a tight tolerance needs restarts, which are left to the full search."""
    values = torch.linspace(0, 1, 400, dtype=torch.float64)
    tracker = EigenTracker(tol=1e-7, max_products=2000)
    tracker.measure(DenseOperator(matrix(basis(400), values)))
    pairs = tracker.measure(DenseOperator(matrix(basis(400, seed=7), values)))
    assert pairs.converged
    assert abs(float(pairs.values[0]) - 1) <= 1e-6


def test_tiny_operators_and_zero():
    for n, num in ((1, 1), (3, 2), (9, 2)):
        values = torch.linspace(-1, 2, n, dtype=torch.float64)
        tracker = EigenTracker(num, tol=1e-9)
        for _ in range(3):
            pairs = tracker.measure(DenseOperator(torch.diag(values)))
            torch.testing.assert_close(pairs.values, values.flip(0)[:num])
    tracker = EigenTracker()
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert float(tracker.measure(DenseOperator(torch.zeros(50, 50, dtype=torch.float64))).values[0]) == 0.0


def test_another_operator_starts_afresh():
    tracker = EigenTracker()
    tracker.measure(DenseOperator(torch.diag(torch.arange(20.0))))
    pairs = tracker.measure(DenseOperator(torch.diag(torch.arange(30.0))))
    assert pairs.verified
    assert tracker.state["points"] == 1
    assert float(pairs.values[0]) == pytest.approx(29.0, rel=1e-3)


def test_bad_proof_every():
    with pytest.raises(ValueError, match="`proof_every` is 0"):
        EigenTracker(proof_every=0)
