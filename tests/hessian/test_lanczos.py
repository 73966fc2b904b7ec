"""The identities that a Krylov basis promises."""

from typing import NamedTuple

import pytest
import torch
from sharpscope.hessian.lanczos import KrylovBasis, checked_vector, plain_tensors
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator, IdentityOperator, LinearOperator
from sharpscope.kernels.accurate import norm

# Rounding of a few operations on unit vectors.
ORTHOGONALITY = {torch.float32: 1e-6, torch.float64: 1e-13}


def outliers(n, dtype=torch.float64):
    """Three separated eigenvalues over a bulk in [0, 1]: ghosts of them appear without reorthogonalisation."""
    d = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    d[-3:] = torch.tensor([3.0, 5.0, 9.0], dtype=torch.float64)
    return d.to(dtype)


class Run(NamedTuple):
    alpha: torch.Tensor
    beta: torch.Tensor
    residual_norm: float
    basis: torch.Tensor
    products: int


def lanczos(op, start, num_steps):
    """Plain Lanczos: one pending direction, the last remainder."""
    with plain_tensors():
        krylov = KrylovBasis(op, num_steps + 1)
        assert krylov.add(start) is not None
        remainder = 0.0
        while krylov.num_pending and krylov.size < num_steps:
            remainder = krylov.expand()
        k = krylov.size
        T = krylov.coefficients[:k, :k]
        return Run(T.diagonal().clone(), T.diagonal(-1).clone(), remainder, krylov.rows[:k], krylov.products)


def tridiagonal(run):
    return torch.diag(run.alpha) + torch.diag(run.beta, 1) + torch.diag(run.beta, -1)


def deviation(rows):
    """Largest entry of |Q Qᵀ − I|."""
    Q = rows.double()
    return float((Q @ Q.T - torch.eye(len(Q), dtype=torch.float64)).abs().max())


class Multiplied(LinearOperator):
    """matmat given as a function."""

    def __init__(self, n, function, dtype=torch.float64):
        super().__init__(n, dtype=dtype)
        self._function = function

    def matmat(self, V):
        return self._function(V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_hundred_steps_keep_the_identities_and_show_no_ghosts(dtype):
    n, k = 500, 200
    d = outliers(n, dtype)
    run = lanczos(DiagonalOperator(d), torch.ones(n, dtype=dtype), k)
    Q, T = run.basis.double(), tridiagonal(run)
    remainder = (d.double() * Q).T - Q.T @ T  # [n, k]
    assert run.products == k
    assert len(run.beta) == k - 1
    assert deviation(run.basis) < ORTHOGONALITY[dtype]
    assert float(remainder[:, :-1].norm(dim=0).max()) < 9 * ORTHOGONALITY[dtype]  # ‖A‖ = 9
    assert float(remainder[:, -1].norm()) == pytest.approx(run.residual_norm, abs=9 * ORTHOGONALITY[dtype])
    theta = torch.linalg.eigvalsh(T)
    for value in (3.0, 5.0, 9.0):
        assert int(((theta - value).abs() < 1e-3).sum()) == 1


def test_the_first_vector_is_the_start_whatever_its_length():
    start = torch.tensor([3.0, 0.0, 4.0]) * 1e-20
    run = lanczos(DiagonalOperator(torch.tensor([1.0, 2.0, 3.0])), start, 2)
    assert torch.allclose(run.basis[0], torch.tensor([0.6, 0.0, 0.8]))
    assert float(run.alpha[0]) == pytest.approx(0.36 * 1 + 0.64 * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_the_run_ends_with_the_distinct_eigenvalues(distinct, dtype):
    d = torch.arange(1, distinct + 1, dtype=dtype).repeat(20)
    start = torch.rand(len(d), dtype=dtype, generator=torch.Generator().manual_seed(0))
    run = lanczos(DiagonalOperator(d), start, 40)
    assert len(run.alpha) == distinct
    assert torch.allclose(torch.linalg.eigvalsh(tridiagonal(run)), d[:distinct].double(), atol=1e-5)
    assert run.residual_norm <= 8 * torch.finfo(dtype).eps * distinct


def test_never_more_steps_than_rows():
    d = torch.tensor([1.0, -2.0, 4.0, 0.5], dtype=torch.float64)
    run = lanczos(DiagonalOperator(d), torch.ones(4, dtype=torch.float64), 100)
    assert run.products == 4
    assert torch.allclose(torch.linalg.eigvalsh(tridiagonal(run)), d.sort().values, atol=1e-14)


def test_the_zero_matrix_and_a_single_parameter():
    zero = lanczos(DiagonalOperator(torch.zeros(5)), torch.ones(5), 3)
    assert (zero.alpha.tolist(), zero.beta.tolist(), zero.residual_norm) == ([0.0], [], 0.0)
    one = lanczos(DiagonalOperator(torch.tensor([-7.0])), torch.tensor([0.1]), 3)
    assert one.alpha.tolist() == [-7.0]


def test_orthogonality_does_not_fade_with_length():
    """Float32 sums over five million entries."""
    n = 5_000_000
    generator = torch.Generator().manual_seed(0)
    d = torch.rand(n, generator=generator)
    run = lanczos(DiagonalOperator(d), torch.randn(n, generator=generator), 4)
    assert deviation(run.basis) < 1e-6
    truth = (d.double() * run.basis[2].double() * run.basis[2].double()).sum()
    assert float(run.alpha[2]) == pytest.approx(float(truth), rel=1e-6)


def test_an_operator_that_returns_its_argument_is_not_written_to():
    v = torch.tensor([3.0, 4.0], dtype=torch.float64)
    run = lanczos(Multiplied(2, lambda V: V), v, 2)
    assert run.alpha.tolist() == pytest.approx([1.0])
    assert run.basis[0].tolist() == pytest.approx([0.6, 0.8])
    assert v.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_results_are_plain_tensors_in_any_mode(mode):
    leaf = torch.ones(6, dtype=torch.float64, requires_grad=True)
    with mode():
        run = lanczos(Multiplied(6, lambda V: V * leaf.unsqueeze(1)), torch.ones(6).double(), 2)
    for tensor in (run.alpha, run.beta, run.basis):
        assert not tensor.requires_grad
        assert not tensor.is_inference()


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (torch.ones(4), ValueError, r"`start` has shape \[4\]; it must be \[3\]"),
        (torch.ones(3, dtype=torch.float64), ValueError, r"`start` is torch.float64 .* use start.to"),
        (torch.tensor([1.0, torch.nan, 0.0]), ValueError, "`start` has NaN"),
        ([1.0, 0.0, 0.0], TypeError, "`start` is a list"),
    ],
)
def test_bad_vectors_are_named(start, error, message):
    with pytest.raises(error, match=message):
        checked_vector(IdentityOperator(3), start, "start")


def test_zero_is_no_start():
    assert KrylovBasis(IdentityOperator(3), 2).add(torch.zeros(3)) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_named_by_number(poison):
    calls = []

    def product(V):
        calls.append(1)
        return torch.full_like(V, poison) if len(calls) == 3 else V * torch.arange(1.0, 9.0).double().unsqueeze(1)

    with pytest.raises(ValueError, match="product 3 of Multiplied"):
        lanczos(Multiplied(8, product), torch.ones(8, dtype=torch.float64), 5)


def test_a_product_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"matmat must return torch.float64 \[3\]"):
        lanczos(Multiplied(3, lambda V: V[:2]), torch.ones(3, dtype=torch.float64), 2)


def relation_error(krylov, A):
    """Largest entry of A Q_jᵀ − Qᵀ H."""
    Q = krylov.rows.double()
    return float((A @ Q[: krylov.size].T - Q.T @ krylov.coefficients).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_relation_survives_starts_directions_and_restarts(dtype):
    """A Q_jᵀ = Qᵀ H with several pending directions, each step checked."""
    n, generator = 60, torch.Generator().manual_seed(3)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A + A.T
    krylov = KrylovBasis(DenseOperator(A.to(dtype)), 30)
    tolerance = 30 * ORTHOGONALITY[dtype]  # ‖A‖ is about 30
    for _ in range(3):
        assert krylov.add(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)) is not None
    assert (krylov.starts, krylov.num_pending) == (3, 3)
    for step in range(12):
        direction = torch.randn(3, generator=generator, dtype=torch.float64) if step % 2 else None
        krylov.expand(direction)
        assert relation_error(krylov, A) < tolerance
        assert deviation(krylov.rows) < ORTHOGONALITY[dtype]
    theta, S, _ = krylov.ritz()
    before = krylov.vectors(S[:, -4:])
    krylov.restart(theta[-4:], S[:, -4:])
    assert (krylov.size, krylov.num_pending, krylov.restarts) == (4, 3, 1)
    assert torch.allclose(krylov.rows[:4], before)
    krylov.expand()
    assert relation_error(krylov, A) < tolerance
    assert deviation(krylov.rows) < ORTHOGONALITY[dtype]
    assert torch.allclose(krylov.ritz()[0][-1:], theta[-1:], atol=2.0)  # it can only rise, and not by much
    assert float(krylov.ritz()[0][-1]) >= float(theta[-1]) - tolerance


def test_a_pending_direction_can_be_any_combination():
    """The combination asked for is the one that is multiplied."""
    d = torch.arange(1.0, 11.0, dtype=torch.float64)
    krylov = KrylovBasis(DiagonalOperator(d), 10)
    for i in (0, 3, 7):
        krylov.add(torch.eye(10, dtype=torch.float64)[i])
    krylov.expand(torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64))
    expected = torch.zeros(10, dtype=torch.float64)
    expected[[0, 3, 7]] = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64) / 3
    assert torch.allclose(krylov.rows[0] * krylov.rows[0][0].sign(), expected, atol=1e-15)
    assert float(krylov.coefficients[0, 0]) == pytest.approx((1 * 1 + 4 * 4 + 4 * 8) / 9)


def test_add_gives_the_coordinates_of_what_is_new():
    krylov = KrylovBasis(IdentityOperator(5, dtype=torch.float64), 5)
    eye = torch.eye(5, dtype=torch.float64)
    assert krylov.add(eye[0]).tolist() == [1.0]
    krylov.expand()
    assert krylov.num_pending == 0  # the space is invariant
    assert krylov.add(2 * eye[0]) is None
    assert krylov.add(torch.zeros(5, dtype=torch.float64)) is None
    assert krylov.add(eye[1]).tolist() == [1.0]
    assert krylov.add(eye[1] + eye[2]).tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert krylov.add(eye[1] - eye[2]).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert (krylov.num_pending, krylov.starts) == (2, 4)


def test_a_full_basis_says_so():
    krylov = KrylovBasis(DiagonalOperator(torch.arange(9.0)), 3)
    krylov.add(torch.ones(9))
    krylov.expand()
    assert not krylov.is_full
    krylov.expand()
    assert krylov.is_full
    assert krylov.add(torch.ones(9)) is None


def test_asymmetric_products_show():
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
    krylov = KrylovBasis(Multiplied(3, lambda V: A @ V), 3)
    krylov.add(torch.ones(3, dtype=torch.float64))
    while krylov.size < 3:
        krylov.expand() if krylov.num_pending else krylov.add(torch.eye(3, dtype=torch.float64)[0])
    theta, S, asymmetry = krylov.ritz()
    V = krylov.vectors(S)
    residuals = (V @ A.T - theta[:, None] * V).norm(dim=1)
    assert torch.allclose(asymmetry, residuals, atol=1e-12)  # the basis spans everything: all of it is asymmetry
    assert float(norm(asymmetry)) > 0.1
