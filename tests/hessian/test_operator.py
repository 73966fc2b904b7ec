"""The algebra of operators against the same algebra of dense matrices."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from sharpscope import GGN, DenseOperator, Hessian, Objective, PreconditionedOperator, partition
from sharpscope.hessian import DiagonalOperator, IdentityOperator, RestrictedOperator
from sharpscope.hessian.operator import DENSE_COLUMNS
from torch import nn

N = 12


def symmetric(seed, dtype=torch.float64, n=N):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


A, B = symmetric(0), symmetric(1)
D = torch.linspace(0.5, 3.0, N, dtype=torch.float64)
EYE = torch.eye(N, dtype=torch.float64)
ROOT = torch.diag(D**-0.5)


def dense(matrix):
    return DenseOperator(matrix)


# Every operator that is made from others, beside the matrix it stands for.
TABLE = {
    "dense": (lambda: dense(A), A),
    "diagonal": (lambda: DiagonalOperator(D), torch.diag(D)),
    "identity": (lambda: IdentityOperator(N, dtype=torch.float64), EYE),
    "sum": (lambda: dense(A) + dense(B), A + B),
    "difference": (lambda: dense(A) - dense(B), A - B),
    "scaled left": (lambda: 2.5 * dense(A), 2.5 * A),
    "scaled right": (lambda: dense(A) * -3, -3 * A),
    "divided": (lambda: dense(A) / 4, A / 4),
    "negative": (lambda: -dense(A), -A),
    "shifted": (lambda: dense(A).shifted(0.7), A + 0.7 * EYE),
    "shifted down": (lambda: dense(A).shifted(-0.7), A - 0.7 * EYE),
    "nested": (
        lambda: 2 * (dense(A) - DiagonalOperator(D) / 2) + dense(B).shifted(1.0),
        2 * A - torch.diag(D) + B + EYE,
    ),
    "preconditioned": (lambda: PreconditionedOperator(dense(A), D), ROOT @ A @ ROOT),
    "preconditioned sum": (lambda: PreconditionedOperator(dense(A) + dense(B), D), ROOT @ (A + B) @ ROOT),
}


@pytest.mark.parametrize("name", TABLE)
def test_products_are_those_of_the_matrix(name):
    make, matrix = TABLE[name]
    op = make()
    assert op.shape == (N, N)
    V = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Twelve terms a sum, a handful of operations: some ten roundings.
    same = dict(rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(op.dense(), matrix, **same)
    torch.testing.assert_close(op @ V, matrix @ V, **same)
    torch.testing.assert_close(op @ V[:, 0], matrix @ V[:, 0], **same)
    torch.testing.assert_close(op.matvec(V[:, 1]), matrix @ V[:, 1], **same)
    assert (op @ V[:, :0]).shape == (N, 0)
    error = float(torch.linalg.matrix_norm(op @ V - matrix @ V, 2))
    assert error <= op.relative_error * float(torch.linalg.matrix_norm(matrix, 2) * V.norm())


@pytest.mark.parametrize("name", TABLE)
def test_scipy_finds_the_eigenvalues(name):
    make, matrix = TABLE[name]
    op = make().to_scipy()
    assert (op.shape, op.dtype) == ((N, N), np.float64)
    V = np.random.default_rng(0).standard_normal((N, 2))
    np.testing.assert_allclose(op @ V, matrix.numpy() @ V, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(op.rmatvec(V[:, 0]), matrix.numpy() @ V[:, 0], rtol=1e-12, atol=1e-12)
    values = scipy.sparse.linalg.eigsh(op, k=3, which="LA", return_eigenvectors=False, v0=V[:, 0])
    if name != "identity":  # a Krylov space of dimension 1
        expected = torch.linalg.eigvalsh(matrix)[-3:].numpy()
        np.testing.assert_allclose(np.sort(values), expected, rtol=1e-9, atol=1e-9)


def test_scipy_vectors_of_another_type_are_converted():
    op = DenseOperator(A.float()).to_scipy()
    assert op.dtype == np.float32
    result = op @ np.ones(N)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, A.float().numpy() @ np.ones(N, np.float32), rtol=1e-5, atol=1e-5)


def test_dense_goes_through_more_columns_than_one_block_holds():
    matrix = symmetric(3, n=2 * DENSE_COLUMNS + 5)
    torch.testing.assert_close(DenseOperator(matrix).dense(), matrix, rtol=0, atol=0)


def test_the_identity_hands_out_a_copy():
    V = torch.ones(3, 2)
    product = IdentityOperator(3) @ V
    product.zero_()
    assert V.sum() == 6


def test_what_matmul_refuses():
    op = dense(A)
    v = torch.ones(N, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"`V` is a ndarray.*to_scipy\(\)"):
        op @ v.numpy()
    with pytest.raises(TypeError, match="`V` is a list"):
        op @ [1.0] * N
    for wrong in (v[:-1], v.unsqueeze(0), torch.ones(N, 1, 1, dtype=torch.float64), torch.tensor(1.0).double()):
        with pytest.raises(ValueError, match=rf"this operator takes \[{N}\] or \[{N}, m\]"):
            op @ wrong
    with pytest.raises(ValueError, match=r"works in torch.float64 on cpu: use V.to\(...\)"):
        op @ v.float()
    with pytest.raises(ValueError, match="`V` is torch.float64 on meta"):
        op @ v.to("meta")


def test_what_the_algebra_refuses():
    op = dense(A)
    for other in (dense(symmetric(0, n=3)), dense(A.float())):
        with pytest.raises(ValueError, match="shape, dtype and device must agree"):
            op + other
        with pytest.raises(ValueError, match="shape, dtype and device must agree"):
            op - other
    for wrong in (lambda: op + 1.0, lambda: op - A, lambda: op * "2", lambda: op * op):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ZeroDivisionError):
        op / 0


def test_matrices_that_are_no_symmetric_matrices_are_refused():
    skewed = A.clone()
    skewed[0, 1] += 0.1
    with pytest.raises(ValueError, match=r"not symmetric; pass \(matrix \+ matrix.T\) / 2"):
        DenseOperator(skewed)
    # Small as a whole is no excuse.
    with pytest.raises(ValueError, match="not symmetric"):
        DenseOperator(1e-9 * skewed)
    with pytest.raises(ValueError, match=r"shape \[3, 4\]; it must be square"):
        DenseOperator(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"`n` is 0; an operator needs at least one row"):
        IdentityOperator(0)


@pytest.mark.parametrize("cancelled", [0.9, 0.999, 0.99999])
def test_the_stated_error_of_a_sum_grows_as_its_terms_cancel(cancelled):
    matrix = symmetric(4, torch.float32)
    op = DenseOperator(matrix) - cancelled * DenseOperator(matrix)
    alone = op.relative_error
    V = torch.randn(N, 5, generator=torch.Generator().manual_seed(5))
    exact = (1 - cancelled) * matrix.double()
    error = float(torch.linalg.matrix_norm((op @ V).double() - exact @ V.double(), 2))
    scale = float(torch.linalg.matrix_norm(exact, 2))
    assert error <= op.relative_error * scale * float(V.norm())
    # Terms of size 1 + c leave a sum of size 1 − c.
    assert op.relative_error / alone == pytest.approx((1 + cancelled) / (1 - cancelled), rel=0.05)


def test_the_stated_error_of_a_sum_without_cancellation_is_that_of_its_terms():
    op = DenseOperator(A) + DenseOperator(2 * A)
    before = op.relative_error
    op @ torch.ones(N, 2, dtype=torch.float64)
    assert op.relative_error == pytest.approx(before, rel=1e-9)
    nothing = DenseOperator(A) - DenseOperator(A)
    assert not (nothing @ torch.ones(N, dtype=torch.float64)).any()


def test_a_preconditioned_operator_has_the_eigenvalues_of_p_inverse_a():
    op = PreconditionedOperator(dense(A), D)
    values = torch.linalg.eigvalsh(op.dense())
    expected = torch.linalg.eigvals(A / D.unsqueeze(1)).real.sort().values
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_preconditioners_that_are_no_metric_are_refused(bad):
    preconditioner = D.clone()
    preconditioner[4] = bad
    with pytest.raises(ValueError, match=r"`preconditioner\[4\]` is .* \(1 such entries\).*add the optimizer's eps"):
        PreconditionedOperator(dense(A), preconditioner)
    for wrong in (D[:-1], D.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"`preconditioner` has shape .*; it must be \[12\]"):
            PreconditionedOperator(dense(A), wrong)


@pytest.fixture
def objective(mlp):
    return Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1], params="4.*")


def test_vectors_go_to_parameter_names_and_back(mlp, objective):
    v = torch.arange(float(objective.num_parameters), dtype=torch.float64)
    for op in (Hessian(objective), 2 * Hessian(objective), Hessian(objective) + GGN(objective), -GGN(objective)):
        named = op.unflatten(v)
        assert {name: t.shape for name, t in named.items()} == {
            name: p.shape for name, p in mlp[0].named_parameters() if name in ("4.weight", "4.bias")
        }
        assert torch.equal(named["4.weight"].reshape(-1), v[:24])
        assert torch.equal(op.flatten(named), v)
        assert torch.equal(op.flatten(dict(reversed(named.items()))), v)
    shifted = Hessian(objective).shifted(0.1)
    assert torch.equal(shifted.flatten(shifted.unflatten(v)), v)
    for call in (dense(A).unflatten, dense(A).flatten):
        with pytest.raises(ValueError, match="no parameter names"):
            call(torch.ones(N))
    with pytest.raises(ValueError, match=r"needs a flat vector \[27\]"):
        shifted.unflatten(v[:-1])


def test_a_restriction_is_the_principal_submatrix(objective):
    hessian = Hessian(objective)
    exact = hessian.dense()
    combined = 2 * hessian + GGN(objective).shifted(0.5)
    matrix = combined.dense()
    for kind in ("parameter", "layer", "neuron"):
        for block in partition(objective, kind).values():
            at = block.indices(objective.layout)
            restricted = combined.block(block)
            assert isinstance(restricted, RestrictedOperator)
            assert restricted.shape == (len(at), len(at))
            torch.testing.assert_close(restricted.dense(), matrix[at][:, at], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(hessian.block(block).dense(), exact[at][:, at], rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="needs parameter names"):
        dense(A).block(block)


def test_start_vectors_follow_the_operator(objective):
    gradient = objective.gradient()
    hessian = Hessian(objective)
    torch.testing.assert_close((2 * hessian).start_vector(), gradient)
    torch.testing.assert_close(hessian.shifted(1.0).start_vector(), gradient)
    P = torch.linspace(1, 4, len(gradient), dtype=torch.float64)
    torch.testing.assert_close(PreconditionedOperator(hessian, P).start_vector(), gradient / P.sqrt())
    assert dense(A).start_vector() is None
