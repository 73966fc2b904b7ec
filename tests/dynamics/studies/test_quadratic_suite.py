"""The quadratics of the study: their closed forms against optimizers that take the steps."""

import math

import pytest
import torch
from sharpscope.dynamics.studies.quadratic_suite import CASES, BlockQuadratic, Descent, most_steps, quadratic_suite
from sharpscope.hessian import block_spectra
from torch import nn


def start(seed=1):
    return torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_two_cases_have_the_same_spectrum_in_other_blocks():
    suite = quadratic_suite(3)
    assert list(suite) == ["heterogeneous", "homogeneous"]
    wholes = [sorted(value for block in problem.eigenvalues for value in block) for problem in suite.values()]
    assert wholes[0] == wholes[1]
    for problem, block_condition in zip(suite.values(), (3, 4998), strict=True):
        assert problem.condition == pytest.approx(5000)
        assert problem.block_condition == pytest.approx(block_condition)
        found = block_spectra(problem.operator())
        for i, values in enumerate(problem.eigenvalues):
            assert found[f"block{i}"].eigenvalues.tolist() == pytest.approx(values)
        assert not torch.equal(problem.H, torch.diag(problem.H.diagonal())), "the blocks are rotated"


def test_rotations_are_uniform():
    """The square of an entry of a uniform rotation in three dimensions is 1/3 in the mean, its own mean is 0."""
    squares, entries = [], []
    for seed in range(400):
        H = BlockQuadratic.random(((0.0, 0.0, 1.0),), seed=seed).H  # q qᵀ for the third column q
        squares.append(H.diagonal())
        entries.append(H[0, 1])
    mean = torch.stack(squares).mean(0)
    error = math.sqrt(4 / 45 / 400)
    assert float((mean - 1 / 3).abs().max()) < 4 * error
    assert abs(float(torch.stack(entries).mean())) < 4 * math.sqrt(1 / 15 / 400)


@pytest.mark.parametrize("case", CASES)
def test_gradient_descent_takes_the_steps_of_the_closed_form(case):
    problem = quadratic_suite(0)[case]
    descent = problem.descent(start())
    assert descent.lr == pytest.approx(2 / (1 + 5000))
    w = nn.Parameter(start())
    optimizer = torch.optim.SGD([w], lr=descent.lr)
    for step in range(100):
        loss = 0.5 * w @ problem.H @ w
        assert descent.loss(step) == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_adam_with_a_held_second_moment_takes_the_steps_of_the_closed_form(case):
    problem, w = quadratic_suite(0)[case], start()
    v = (problem.H @ w).square()
    descent = problem.descent(w, v.sqrt())
    for step in range(100):
        assert descent.loss(step) == pytest.approx(float(0.5 * w @ problem.H @ w), rel=1e-8)
        w = w - descent.lr * (problem.H @ w) / v.sqrt()


def test_no_other_learning_rate_contracts_faster():
    problem, scale = quadratic_suite(0)["heterogeneous"], (quadratic_suite(0)["heterogeneous"].H @ start()).abs()
    descent = problem.descent(start(), scale)

    def radius(lr):
        return float(torch.linalg.eigvals(torch.eye(9) - lr * problem.H / scale.unsqueeze(1)).abs().max())

    best = radius(descent.lr)
    assert best == pytest.approx((descent.condition - 1) / (descent.condition + 1))
    assert all(radius(factor * descent.lr) > best for factor in (0.9, 0.99, 1.01, 1.1))


def test_steps_are_the_first_that_suffice_and_bounded():
    for case in CASES:
        descent = quadratic_suite(2)[case].descent(start(5))
        steps = descent.steps_to(1e-8)
        assert descent.loss(steps) <= 1e-8 * descent.loss(0) < descent.loss(steps - 1)
        assert steps <= most_steps(5000, 1e-8)
    # Every eigenvalue at an end: the bound is met.
    ends = Descent(torch.tensor([1.0, 50.0], dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64))
    assert ends.steps_to(1e-6) == most_steps(50, 1e-6)
    assert ends.steps_to(1.0) == 0


def test_a_diagonal_of_equal_entries_changes_nothing():
    problem = quadratic_suite(0)["homogeneous"]
    plain, scaled = problem.descent(start()), problem.descent(start(), torch.full((9,), 7.0, dtype=torch.float64))
    assert scaled.condition == pytest.approx(plain.condition)
    assert scaled.steps_to(1e-8) == plain.steps_to(1e-8)
