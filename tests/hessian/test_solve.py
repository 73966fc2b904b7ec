"""CG and MINRES against dense float64 solves and SciPy; curvature, damping, budgets, what rounding allows."""

import itertools
import math
import warnings

import pytest
import scipy.sparse.linalg
import torch
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator, LinearOperator
from sharpscope.hessian.solve import solve

N = 120
METHODS = ["cg", "minres"]


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


DEFINITE = torch.linspace(1, 50, N)
INDEFINITE = torch.cat([-torch.linspace(0.3, 3, 20), torch.linspace(0.3, 10, N - 20)])


def right_hand_side(n=N, dtype=torch.float64):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def relative_residual(A, x, b, damping=0.0):
    x, b = x.double(), b.double()
    return float((b - A.double() @ x - damping * x).norm() / b.norm())


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return solve(*arguments, **options)


class Counted(DenseOperator):
    def __init__(self, matrix):
        super().__init__(matrix)
        self.products = 0

    def matmat(self, V):
        self.products += V.shape[1]
        return super().matmat(V)


@pytest.mark.parametrize(("method", "eigenvalues"), [("cg", DEFINITE), ("minres", DEFINITE), ("minres", INDEFINITE)])
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
def test_solution_equals_the_dense_one(method, eigenvalues, tol):
    A, b = symmetric(eigenvalues), right_hand_side()
    op = Counted(A)
    found = solve(op, b, method=method, tol=tol)
    assert found.converged
    assert found.residual <= tol
    assert found.residual == pytest.approx(relative_residual(A, found.x, b), rel=1e-3)
    # ‖x − x*‖ ≤ ‖A⁻¹‖ ‖residual‖.
    bound = tol * float(b.norm()) / float(eigenvalues.abs().min())
    assert float((found.x - torch.linalg.solve(A, b)).norm()) <= bound
    assert found.products == op.products


@pytest.mark.parametrize("method", METHODS)
def test_as_close_as_scipy_after_as_many_steps(method):
    A, b = symmetric(DEFINITE), right_hand_side()
    for steps in (10, 20, 40):
        reference, _ = getattr(scipy.sparse.linalg, method)(A.numpy(), b.numpy(), rtol=1e-14, maxiter=steps)
        theirs = relative_residual(A, torch.from_numpy(reference), b)
        # Beside the steps: three checks at the end, and one for every fall by 1e-3.
        found = quietly(DenseOperator(A), b, method=method, tol=1e-14, max_products=steps + 6)
        assert found.residual <= 1.01 * theirs
        assert float((found.x - torch.from_numpy(reference)).norm()) <= 2 * theirs * float(b.norm())


@pytest.mark.parametrize("method", METHODS)
def test_k_distinct_eigenvalues_take_k_steps(method):
    d = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64).repeat(50)
    found = solve(DiagonalOperator(d), torch.ones(200, dtype=torch.float64), method=method, tol=1e-10)
    assert found.converged
    assert found.products <= 4 + 3  # and checks as the residual falls through 1e-3 and 1e-6, and of the result
    torch.testing.assert_close(found.x, 1 / d)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damping", [0.0, 0.5, 20.0])
def test_damping_is_added_to_every_eigenvalue(method, damping):
    A, b = symmetric(DEFINITE), right_hand_side()
    found = solve(DenseOperator(A), b, method=method, damping=damping, tol=1e-9)
    torch.testing.assert_close(found.x, torch.linalg.solve(A + damping * torch.eye(N), b), rtol=0, atol=1e-7)
    assert found.residual == pytest.approx(relative_residual(A, found.x, b, damping), rel=1e-2)


def test_damping_makes_an_indefinite_system_definite():
    A, b = symmetric(INDEFINITE), right_hand_side()
    found = solve(DenseOperator(A), b, damping=3.5, tol=1e-8)
    assert found.converged
    assert found.negative_curvature is None


def test_cg_stops_at_negative_curvature_and_reports_it():
    A, b = symmetric(INDEFINITE), right_hand_side()
    with pytest.warns(NotConvergedWarning, match="curvature along a search direction is -"):
        found = solve(DenseOperator(A), b)
    assert not found.converged
    assert found.negative_curvature is not None
    direction, curvature = found.negative_curvature
    assert curvature < 0
    assert float(direction.norm()) == pytest.approx(1)
    assert float(direction @ A @ direction) == pytest.approx(curvature)
    # The x before is kept, and better than none.
    assert found.residual == pytest.approx(relative_residual(A, found.x, b))
    assert found.residual < 1


def test_cg_reports_the_right_hand_side_itself_where_that_is_negative():
    d = torch.tensor([-2.0, 1.0, 3.0])
    found = quietly(DiagonalOperator(d), torch.tensor([1.0, 0.0, 0.0]))
    assert found.negative_curvature is not None
    assert found.negative_curvature.curvature == pytest.approx(-2.0)
    assert (found.residual, found.products) == (1.0, 2)
    assert not bool(found.x.any())


def test_minres_solves_on_and_reports_negative_curvature():
    A, b = symmetric(INDEFINITE), right_hand_side()
    found = solve(DenseOperator(A), b, method="minres", tol=1e-8)
    assert found.converged
    assert found.negative_curvature is not None
    direction, curvature = found.negative_curvature
    assert curvature < -0.1
    assert float(direction.norm()) == pytest.approx(1)
    assert float(direction @ A @ direction) == pytest.approx(curvature)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_negative_curvature_is_invented(method, dtype):
    for seed in range(10):
        A = symmetric(torch.linspace(0.01, 1, 60), seed).to(dtype)
        assert quietly(DenseOperator(A), right_hand_side(60, dtype), method=method).negative_curvature is None


def test_minres_on_a_negative_definite_system():
    A, b = symmetric(-DEFINITE), right_hand_side()
    found = solve(DenseOperator(A), b, method="minres", tol=1e-8)
    assert found.converged
    assert found.negative_curvature is not None
    assert found.negative_curvature.curvature <= -1


@pytest.mark.parametrize("method", METHODS)
def test_singular_but_consistent_systems_are_solved(method):
    A = symmetric(torch.cat([torch.zeros(40), torch.linspace(1, 5, N - 40)]))
    b = A @ right_hand_side()
    found = solve(DenseOperator(A), b, method=method, tol=1e-8)
    assert found.converged
    # From zero both stay in the range, so x is the solution of least norm.
    torch.testing.assert_close(found.x, torch.linalg.pinv(A, rtol=1e-10) @ b, rtol=0, atol=1e-6)


def test_minres_ends_at_a_least_squares_solution():
    A, b = symmetric(torch.cat([torch.zeros(40), torch.linspace(1, 5, N - 40)])), right_hand_side()
    with pytest.warns(NotConvergedWarning, match="not in the range"):
        found = solve(DenseOperator(A), b, method="minres")
    least = b - A @ (torch.linalg.pinv(A, rtol=1e-10) @ b)
    assert found.residual == pytest.approx(float(least.norm() / b.norm()), rel=1e-6)
    assert found.products < 100


def test_minres_goes_on_where_only_tiny_eigenvalues_are_left():
    """The residual along 1e-9 has A r as good as zero, like a least-squares residual, yet one more step removes it."""
    d = torch.cat([torch.tensor([1e-9]), torch.linspace(1, 2, 9)]).double()
    found = solve(DiagonalOperator(d), torch.ones(10, dtype=torch.float64), method="minres")
    assert found.converged
    torch.testing.assert_close(found.x, 1 / d, rtol=1e-3, atol=0)


def test_cg_on_an_inconsistent_system_does_not_blow_up():
    A, b = symmetric(torch.cat([torch.zeros(40), torch.linspace(1, 5, N - 40)])), right_hand_side()
    found = quietly(DenseOperator(A), b)
    assert not found.converged
    assert found.residual < 1
    assert found.negative_curvature is not None
    assert abs(found.negative_curvature.curvature) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_zero_operator(method):
    found = quietly(DiagonalOperator(torch.zeros(30)), torch.ones(30), method=method)
    assert not found.converged
    assert not bool(found.x.any())
    assert found.products < 5


@pytest.mark.parametrize("method", METHODS)
def test_zero_right_hand_side(method):
    found = solve(DenseOperator(symmetric(INDEFINITE)), torch.zeros(N, dtype=torch.float64), method=method)
    assert not bool(found.x.any())
    assert (found.residual, found.converged, found.products) == (0.0, True, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_systems(method, n):
    A = symmetric(torch.linspace(0.5, 2, n))
    b = right_hand_side(n)
    found = solve(DenseOperator(A), b, method=method, tol=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b))


@pytest.mark.parametrize("method", METHODS)
def test_float32_meets_a_tolerance_above_its_floor(method):
    A, b = symmetric(DEFINITE), right_hand_side()
    found = solve(DenseOperator(A.float()), b.float(), method=method, tol=1e-5)
    assert found.converged
    assert relative_residual(A, found.x, b) < 1.2e-5


@pytest.mark.parametrize("method", METHODS)
def test_float32_says_where_its_floor_is(method):
    A, b = symmetric(DEFINITE).float(), right_hand_side(dtype=torch.float32)
    with pytest.warns(NotConvergedWarning, match=r"float32 allow no less.*float64"):
        found = solve(DenseOperator(A), b, method=method, tol=1e-12)
    assert not found.converged
    # It did get down to the floor, 6e-8 ‖A‖ ‖x‖ / ‖b‖ and a little, and did not spend the budget there.
    assert relative_residual(A, found.x, b) < 20 * 6e-8 * 50 * float(found.x.norm() / b.norm())
    assert found.residual == pytest.approx(relative_residual(A, found.x, b), rel=0.5)
    assert found.products < 500


@pytest.mark.parametrize("method", METHODS)
def test_drift_is_noticed_on_an_ill_conditioned_float32_system(method):
    """The recurrence's residual falls for ever; the one returned is the true one."""
    A, b = symmetric(torch.logspace(-6, 0, N)).float(), right_hand_side(dtype=torch.float32)
    found = quietly(DenseOperator(A), b, method=method)
    assert not found.converged
    assert found.residual == pytest.approx(relative_residual(A, found.x, b), rel=1e-2)
    assert found.residual < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_products", [5, 6, 13, 60])
def test_budget_is_kept_and_its_end_is_said(method, max_products):
    op, b = Counted(symmetric(torch.logspace(-4, 0, N))), right_hand_side()
    with pytest.warns(NotConvergedWarning, match="`max_products`"):
        found = solve(op, b, method=method, tol=1e-10, max_products=max_products)
    assert op.products == found.products <= max_products
    assert found.products >= max_products - 1
    assert found.residual <= 1
    assert found.residual == pytest.approx(relative_residual(op._matrix, found.x, b))


@pytest.mark.parametrize("method", METHODS)
def test_budget_holds_with_a_start_and_negative_curvature(method):
    for max_products in range(5, 70, 3):
        op = Counted(symmetric(INDEFINITE))
        found = quietly(op, right_hand_side(), method=method, max_products=max_products, start=torch.ones(N).double())
        assert op.products == found.products <= max_products


def test_residuals_never_rise_with_more_products():
    A, b = symmetric(torch.logspace(-4, 0, N)), right_hand_side()
    for method in METHODS:
        found = [quietly(DenseOperator(A), b, method=method, tol=1e-10, max_products=m).residual for m in range(5, 60)]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("method", METHODS)
def test_a_good_start_saves_products(method):
    A, b = symmetric(DEFINITE), right_hand_side()
    truth = torch.linalg.solve(A, b)
    cold = solve(DenseOperator(A), b, method=method)
    near = truth + 1e-5 * torch.randn(N, dtype=torch.float64)
    warm = solve(DenseOperator(A), b, method=method, start=near.clone())
    assert warm.converged
    assert warm.products < cold.products / 2
    done = solve(DenseOperator(A), b, method=method, start=truth)
    assert (done.converged, done.products) == (True, 1)
    torch.testing.assert_close(done.x, truth)


def test_arguments_are_not_written_to():
    A, b, start = symmetric(DEFINITE), right_hand_side(), torch.ones(N, dtype=torch.float64)
    kept = b.clone(), start.clone()
    for method in METHODS:
        solve(DenseOperator(A), b, method=method, start=start)
    assert torch.equal(b, kept[0])
    assert torch.equal(start, kept[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode(mode):
    A, b = symmetric(DEFINITE), right_hand_side().requires_grad_()
    with mode():
        found = solve(DenseOperator(A), b)
    assert found.converged
    assert not found.x.requires_grad


class Broken(LinearOperator):
    def matmat(self, V):
        return torch.full_like(V, math.nan)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [None, torch.ones(9)])
def test_nan_names_the_product(method, start):
    with pytest.raises(ValueError, match="product 1 of Broken"):
        solve(Broken(9), torch.ones(9), method=method, start=start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "GC"}, "did you mean 'cg'"),
        ({"method": "minress"}, "did you mean 'minres'"),
        ({"damping": -0.1}, r"`damping` is -0.1.*shifted"),
        ({"damping": math.inf}, "`damping` is inf"),
        ({"tol": 0.0}, "`tol` is 0.0"),
        ({"tol": -1.0}, "`tol` is -1.0"),
        ({"max_products": 2}, "`max_products` is 2"),
        ({"start": torch.ones(3)}, r"`start` has shape \[3\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        solve(DiagonalOperator(torch.ones(9)), torch.ones(9), **options)


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (torch.ones(8), ValueError, r"`b` has shape \[8\]"),
        (torch.ones(9, 1), ValueError, r"`b` has shape \[9, 1\]"),
        (torch.ones(9).double(), ValueError, "`b` is torch.float64"),
        (torch.full((9,), math.nan), ValueError, "`b` has NaN"),
        ([1.0] * 9, TypeError, "`b` is a list"),
    ],
)
def test_bad_right_hand_sides(b, error, message):
    with pytest.raises(error, match=message):
        solve(DiagonalOperator(torch.ones(9)), b)
