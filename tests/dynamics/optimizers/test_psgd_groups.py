"""The groups of PSGD against dense matrices, psgd_torch and limits that are known."""

import math
from unittest import mock

import pytest
import torch
from sharpscope.dynamics.optimizers.psgd_group import Coins, initial_scale
from sharpscope.dynamics.optimizers.psgd_kron import Kron, norm_bound, triangular
from sharpscope.dynamics.optimizers.psgd_lra import LRA
from sharpscope.dynamics.optimizers.psgd_xmat import XMat

FLOAT = torch.float64
TINY = torch.finfo(FLOAT).tiny
QUIET = Coins(0.0, False, True)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


def xmat(n=9):
    b = 0.3 * normal(n, seed=2)
    if n % 2:
        b[n // 2] = 0
    return XMat(1 + 0.1 * normal(n, seed=1), b)


def lra(n=9, rank=3):
    return LRA(0.2 * normal(n, rank, seed=1), 0.2 * normal(n, rank, seed=2), 1 + 0.1 * normal(n, seed=3))


def kron(axes=(3, 1, 4), dense=(True, False, True)):
    factors = []
    for i, (size, full) in enumerate(zip(axes, dense, strict=True)):
        diagonal = 1 + 0.1 * normal(size, seed=i)
        factors.append(0.2 * normal(size, size, seed=9 + i).triu(1) + torch.diag(diagonal) if full else diagonal)
    return Kron(factors)


FACTORS = [xmat(9), xmat(10), lra(), lra(rank=0), kron(), kron((5,), (False,)), kron((4, 3), (False, True))]


def dense(factor):
    return factor.apply(torch.eye(factor.shape[1], dtype=FLOAT))


def test_an_x_matrix_has_its_shape():
    factor = xmat(9)
    expected = torch.diag(factor.a) + torch.diag(factor.b).flip(1)
    torch.testing.assert_close(dense(factor), expected, rtol=0, atol=1e-15)


def test_a_low_rank_matrix_is_its_formula():
    factor = lra()
    expected = (torch.eye(9, dtype=FLOAT) + factor.U @ factor.V.T) @ torch.diag(factor.d)
    torch.testing.assert_close(dense(factor), expected, rtol=0, atol=1e-15)


def test_a_kronecker_matrix_is_the_product_of_its_factors():
    factor = kron()
    expected = torch.ones(1, 1, dtype=FLOAT)
    for q in factor.factors:
        expected = torch.kron(expected, torch.diag(q) if q.ndim == 1 else q)
    torch.testing.assert_close(dense(factor), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("factor", FACTORS, ids=lambda f: f"{type(f).__name__}-{f.shape[0]}")
def test_products_agree_with_the_dense_matrix(factor):
    Q, n = dense(factor), factor.shape[0]
    v, V = normal(n, seed=5), normal(n, 2, seed=6)
    torch.testing.assert_close(factor.apply(V), Q @ V, rtol=0, atol=1e-13)
    torch.testing.assert_close(factor.transposed(V), Q.T @ V, rtol=0, atol=1e-13)
    torch.testing.assert_close(factor.inverse_transposed(v), torch.linalg.solve(Q.T, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(factor.precondition(v), Q.T @ Q @ v, rtol=0, atol=1e-13)
    torch.testing.assert_close(factor.log_det, torch.linalg.slogdet(Q).logabsdet, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", FACTORS, ids=lambda f: f"{type(f).__name__}-{f.shape[0]}")
def test_its_state_comes_back_from_slices(factor):
    sizes = [factor.shape[0]] if isinstance(factor, Kron) else [2, factor.shape[0] - 2]
    params = [torch.zeros(size) for size in sizes]
    again = type(factor).gathered(factor.slices(params))
    assert torch.equal(dense(again), dense(factor))


def images(factor, v, h):
    Q = dense(factor)
    return Q, Q @ h, torch.linalg.solve(Q.T, v)


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("normalizer", ["2nd", "1st"])
def test_the_x_update_is_the_projected_dense_one(n, normalizer):
    factor, v, h = xmat(n), normal(n, seed=7), normal(n, seed=8)
    Q, A, B = images(factor, v, h)
    mask = torch.eye(n, dtype=FLOAT).logical_or(torch.eye(n, dtype=FLOAT).flip(1))
    slope = (torch.outer(A, A) - torch.outer(B, B)) * mask
    size = (A.square() + B.square()).max() if normalizer == "2nd" else slope.abs().max()
    expected = Q - 0.1 / size * slope @ Q
    torch.testing.assert_close(dense(factor.fitted(v, h, 0.1, normalizer, QUIET)), expected, rtol=0, atol=1e-13)


def test_the_kronecker_update_is_the_projected_dense_one():
    # One axis, triangular: Q - mu triu(A A^T - B B^T) Q, with a lower bound on the norm of A A^T + B B^T in mu.
    factor, v, h = kron((6,), (True,)), normal(6, seed=7), normal(6, seed=8)
    Q, A, B = images(factor, v, h)
    slope = torch.outer(A, A) - torch.outer(B, B)
    size = norm_bound(torch.outer(A, A) + torch.outer(B, B))
    expected = Q - 0.1 / size * slope.triu() @ Q
    torch.testing.assert_close(dense(factor.fitted(v, h, 0.1, "2nd", QUIET)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("first", [True, False])
def test_the_low_rank_update_moves_q_within_the_group(first):
    # With S = A A^T - B B^T: U moves by -mu S V V^T (I + U V^T), V by -mu U U^T S (I + U V^T), in terms of I + U V^T.
    factor, v, h = lra(), normal(9, seed=7), normal(9, seed=8)
    _, A, B = images(factor, v, h)
    after = factor.fitted(v, h, 0.1, "2nd", Coins(0.0, False, first))
    identity = torch.eye(9, dtype=FLOAT)
    S, core = torch.outer(A, A) - torch.outer(B, B), identity + factor.U @ factor.V.T
    half = factor.V @ factor.V.T if first else factor.U @ factor.U.T
    size = A.norm() * (half @ A).norm() + B.norm() * (half @ B).norm()
    expected = core - 0.1 / size * ((S @ half if first else half @ S) @ core)
    torch.testing.assert_close(identity + after.U @ after.V.T, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("normalizer", ["2nd", "1st"])
@pytest.mark.parametrize("n", [8, 9])
def test_the_x_update_is_that_of_psgd_torch(n, normalizer):
    psgd = pytest.importorskip("psgd_torch.psgd")
    factor = XMat(torch.full((n,), 0.7, dtype=FLOAT), torch.zeros(n, dtype=FLOAT))
    a, b = factor.a.clone(), factor.b.clone()
    H = normal(n, n, seed=3)
    for t in range(300):
        v = normal(n, seed=100 + t)
        h = (H + H.T) @ v
        factor = factor.fitted(v, h, 0.1, normalizer, QUIET)
        psgd.update_precond_Xmat_math_(a, b, v, h, 0.1, normalizer, TINY)
    torch.testing.assert_close(factor.a, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(factor.b, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(factor.precondition(v), psgd.precond_grad_Xmat_math(a, b, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["2nd", "1st"])
def test_the_low_rank_update_is_that_of_psgd_torch(normalizer):
    psgd = pytest.importorskip("psgd_torch.psgd")
    factor = lra()
    U, V, d = factor.U.clone(), factor.V.clone(), factor.d.clone()[:, None]
    H = normal(9, 9, seed=3)
    draws = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)).tolist()
    draws[5][0] = draws[80][0] = 0.001  # balances
    for t, (balance, first) in enumerate(draws):
        v = normal(9, seed=100 + t)
        h = (H + H.T) @ v
        factor = factor.fitted(v, h, 0.05, normalizer, Coins(0.0, balance < 0.01, first < 0.5))
        with mock.patch("torch.rand", side_effect=[torch.tensor(balance), torch.tensor(first)]):
            psgd.update_precond_UVd_math_(U, V, d, v[:, None], h[:, None], 0.05, normalizer, TINY)
    for mine, theirs in ((factor.U, U), (factor.V, V), (factor.d, d[:, 0])):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    theirs = psgd.precond_grad_UVd_math(U, V, d, v[:, None])[:, 0]
    torch.testing.assert_close(factor.precondition(v), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["2nd", "1st"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 3, 4), (40, 2)])
def test_the_kronecker_update_is_that_of_psgd_torch(shape, normalizer):
    psgd = pytest.importorskip("psgd_torch.psgd")
    p = torch.zeros(shape, dtype=FLOAT)
    options = {"max_size": 8192, "max_skew": 10.0}
    state = Kron.initial(p, torch.tensor(0.7, dtype=FLOAT), options, torch.Generator())
    factor = Kron.gathered([state])
    Q, exprs = psgd.init_Q_exprs(p, 0.7, 8192, 10.0)
    n = math.prod(shape)
    H = normal(n, n, seed=3)
    for t in range(100):
        v = normal(n, seed=100 + t)
        h = (H + H.T) @ v
        balance = t == 50
        factor = factor.fitted(v, h, 0.05, normalizer, Coins(0.0, balance, True))
        with mock.patch("torch.rand", side_effect=[torch.tensor(0.0 if balance else 0.5)]):
            psgd.update_precond_kron_math_(Q, exprs, v.view(shape), h.view(shape), 0.05, normalizer, TINY)
    for mine, theirs in zip(factor.factors, Q, strict=True):
        torch.testing.assert_close(mine, theirs.reshape(mine.shape), rtol=0, atol=1e-12)
    theirs = psgd.precond_grad_kron_math(Q, exprs, v.view(shape)).reshape(-1)
    torch.testing.assert_close(factor.precondition(v), theirs, rtol=0, atol=1e-12)


def test_balancing_changes_no_product():
    for factor in (lra(), kron((4, 3), (True, True))):
        torch.testing.assert_close(dense(factor._balanced()), dense(factor), rtol=1e-13, atol=1e-14)
    balanced = lra()._balanced()
    torch.testing.assert_close(balanced.U.norm(), balanced.V.norm())


def test_uncoupling_keeps_the_diagonal_of_p():
    factor = xmat(10)
    before, after = (dense(f).T @ dense(f) for f in (factor, factor.uncoupled()))
    torch.testing.assert_close(after, torch.diag(before.diagonal()))


@pytest.mark.parametrize("make", [lambda n: XMat(torch.ones(n, dtype=FLOAT), torch.zeros(n, dtype=FLOAT)),
                                  lambda n: LRA(torch.zeros(n, 0, dtype=FLOAT), torch.zeros(n, 0, dtype=FLOAT),
                                                torch.ones(n, dtype=FLOAT))])  # fmt: skip
def test_a_diagonal_curvature_gives_its_absolute_inverse(make):
    values = torch.tensor([3.0, -0.5, 1.0, 7.0, -2.0, 0.2], dtype=FLOAT)
    factor = make(6)
    for t in range(4000):
        v = normal(6, seed=t)
        factor = factor.fitted(v, values * v, 0.1, "2nd", QUIET)
    Q = dense(factor)
    torch.testing.assert_close((Q.T @ Q).diagonal(), 1 / values.abs(), rtol=0.05, atol=0)


def test_a_diagonal_factor_whitens_gradients_like_rmsprop():
    sizes = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=FLOAT)
    empty = torch.zeros(4, 0, dtype=FLOAT)
    factor, total = LRA(empty, empty, torch.ones(4, dtype=FLOAT)), torch.zeros(4, dtype=FLOAT)
    draw = torch.Generator().manual_seed(0)
    for t in range(6000):
        v, z = (torch.randn(4, dtype=FLOAT, generator=draw) for _ in range(2))
        factor = factor.fitted(v, sizes * z, 0.1, "2nd", QUIET)
        if t >= 2000:
            total += factor.d.square() / 4000
    # P fluctuates by a third; some hundred independent values among 4000 leave a few per cent.
    torch.testing.assert_close(total, 1 / sizes, rtol=0.1, atol=0)


LEFT = torch.tensor([[2.0, 0.5], [0.0, 0.5]], dtype=FLOAT)
RIGHT = torch.tensor([[1.0, 0, 0], [1, 3, 0], [0, 1, 0.5]], dtype=FLOAT)


def test_a_kronecker_factor_whitens_gradients():
    draw = torch.Generator().manual_seed(0)
    factor, total = kron((2, 3), (True, True)), torch.zeros(6, 6, dtype=FLOAT)
    for t in range(6000):
        v, z = (torch.randn(6, dtype=FLOAT, generator=draw) for _ in range(2))
        g = (LEFT @ z.view(2, 3) @ RIGHT.T).reshape(-1)
        factor = factor.fitted(v, g, 0.02, "2nd", QUIET)
        if t >= 2000:
            Q = dense(factor)
            total += Q.T @ Q / 4000
    covariance = torch.kron(LEFT @ LEFT.T, RIGHT @ RIGHT.T)
    values, vectors = torch.linalg.eigh(covariance)
    target = (vectors * values.rsqrt()) @ vectors.T
    assert (total - target).norm() / target.norm() < 0.1


def test_kron_torch_whitens_to_the_same_preconditioner():
    """The same gradients, its own probes and rule: means over the late steps."""
    theirs = pytest.importorskip("kron_torch.kron")
    draw = torch.Generator().manual_seed(0)
    factor = kron((2, 3), (True, True))
    Q, exprs = theirs._init_Q_exprs(torch.zeros(2, 3, dtype=FLOAT), 1.0, 8192, 2, None, dtype=FLOAT)
    totals = [torch.zeros(6, 6, dtype=FLOAT) for _ in range(2)]
    step, tiny = torch.tensor(0.02, dtype=FLOAT), torch.tensor(TINY, dtype=FLOAT)
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        for t in range(4000):
            v, z = (torch.randn(6, dtype=FLOAT, generator=draw) for _ in range(2))
            g = LEFT @ z.view(2, 3) @ RIGHT.T
            factor = factor.fitted(v, g.reshape(-1), 0.02, "2nd", QUIET)
            theirs._update_precond(Q, exprs, g, step, tiny)
            if t >= 2000:
                for total, root in zip(totals, (dense(factor), torch.kron(*Q)), strict=True):
                    total += root.T @ root / 2000
    mine, other = (total / total.norm() for total in totals)
    assert (mine - other).norm() < 0.15


def test_the_bound_on_the_norm_is_below_it_and_near():
    for seed in range(20):
        S = normal(7, 7, seed=seed)
        S = S + S.T
        norm = torch.linalg.matrix_norm(S, 2)
        assert 0.6 * norm <= norm_bound(S) <= norm * (1 + 1e-12)
    assert norm_bound(torch.zeros(3, 3)) == 0


def test_long_axes_have_diagonal_factors():
    assert triangular(64, 6400, 8192, 10.0)
    assert not triangular(64, 6400, 32, 10.0)
    assert not triangular(1, 6400, 8192, 10.0)
    assert not triangular(50000, 50000 * 768, 1e9, 10.0)
    assert not triangular(11, 11, 8192, 10.0)  # a bias


def test_the_initial_scale_is_its_formula_and_does_not_overflow():
    h, v = normal(50, seed=0), normal(50, seed=1)
    expected = v.square().mean() ** 0.25 * (h**4).mean() ** (-1 / 8)
    torch.testing.assert_close(initial_scale(h, v), expected)
    torch.testing.assert_close(initial_scale(h, None), (h**4).mean() ** (-1 / 8))
    huge = initial_scale(1e30 * h.float(), v.float())
    assert torch.isfinite(huge)
    torch.testing.assert_close(huge, (expected * 1e-15).float())


def test_q_stays_invertible_under_wild_pairs():
    """The determinant keeps its sign at rates below 1/2: in a 2 x 2 block of XMat, A A^T is up to 2 max A^2."""
    for factor in (xmat(10), lra(), kron((3, 4), (True, True))):
        sign = torch.linalg.slogdet(dense(factor)).sign
        n = factor.shape[0]
        for t in range(200):
            v, h = normal(n, seed=t), 10.0 ** (t % 7 - 3) * normal(n, seed=1000 + t)
            factor = factor.fitted(v, h, 0.49, "2nd", Coins(0.0, False, t % 2 == 0))
            Q = dense(factor)
            assert torch.isfinite(Q).all()
            assert torch.linalg.slogdet(Q).sign == sign
