"""Extreme eigenvalues of matrices whose spectra are known."""

import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator, IdentityOperator, LinearOperator

EPS = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}


class Diagonal(DiagonalOperator):
    """diag(d) that counts its products and offers a start vector."""

    def __init__(self, d, start=None):
        super().__init__(d)
        self.calls, self._start = 0, start

    def matmat(self, V):
        self.calls += V.shape[1]
        return super().matmat(V)

    def start_vector(self):
        return self._start


class Multiplied(LinearOperator):
    """matmat given as a function."""

    def __init__(self, n, function, **options):
        super().__init__(n, **options)
        self._function = function

    def matmat(self, V):
        return self._function(V)


def spectrum(*leading, n=300, dtype=torch.float64):
    """The leading eigenvalues over a bulk in [-0.5, 0.7]."""
    d = torch.linspace(-0.5, 0.7, n, dtype=torch.float64)
    d[: len(leading)] = torch.tensor(leading, dtype=torch.float64)
    return d[torch.randperm(n, generator=torch.Generator().manual_seed(5))].to(dtype)


def wanted(d, which, num):
    """The eigenvalues asked for, in the order promised."""
    d = d.double().sort().values
    if which == "LA":
        return d.flip(0)[:num]
    if which == "SA":
        return d[:num]
    if which == "LM":
        return d[d.abs().argsort(descending=True)][:num]
    return torch.cat([d[: num // 2], d[len(d) - (num - num // 2) :]])


def true_residuals(d, pairs):
    """‖A v − λ v‖ in float64 for A = diag(d)."""
    V = pairs.vectors.double()
    return (d.double().unsqueeze(1) * V - V * pairs.values).norm(dim=0)


@pytest.mark.parametrize("num", [1, 2, 3, 6])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_end_in_the_order_promised(which, num, dtype):
    d = spectrum(9.0, 6.0, 4.0, 3.0, 2.0, 1.5, -7.0, -5.0, -2.5, -2.0, -1.5, -1.0, dtype=dtype)
    tol = 1e-8 if dtype == torch.float64 else 1e-4
    op = Diagonal(d)
    pairs = top_eigenvalues(op, num, which=which, tol=tol, accuracy="vectors", verify=True)
    truth = wanted(d, which, num)
    assert pairs.converged
    assert pairs.verified
    assert torch.allclose(pairs.values, truth, rtol=0, atol=float(pairs.residuals.max()))
    assert torch.allclose(pairs.values, truth, rtol=0, atol=9 * (1e-12 if dtype == torch.float64 else 1e-6))
    assert bool((true_residuals(d, pairs) <= pairs.residuals).all())
    assert bool((pairs.residuals <= tol * 9.0).all())
    assert torch.allclose(pairs.vectors.norm(dim=0).double(), torch.ones(num, dtype=torch.float64), atol=EPS[dtype])
    assert pairs.products == op.calls
    assert (pairs.values.dtype, pairs.vectors.dtype, len(pairs)) == (torch.float64, dtype, num)
    assert pairs.vectors.shape == (300, num)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    n=st.sampled_from([1, 2, 3, 9, 30, 120]),
    num=st.integers(1, 6),
    which=st.sampled_from(["LA", "SA", "LM", "BE"]),
    tol=st.sampled_from([1e-1, 1e-3, 1e-6]),
    budget=st.sampled_from([6, 12, None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_residual_bounds_the_distance_to_an_eigenvalue(seed, n, num, which, tol, budget, dtype):
    """|λ − θ| ≤ ‖A v − θ v‖ ≤ the residual given: converged or not, with copies, clusters and zeros."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(n, generator=generator, dtype=torch.float64) ** 3
    d = [d, d.round(), d * (torch.rand(n, generator=generator) < 0.1), d.sign()][seed % 4].to(dtype)
    num = min(num, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        pairs = top_eigenvalues(
            Diagonal(d), num, which=which, tol=tol, max_products=budget, seed=seed, accuracy="vectors"
        )
    distance = (pairs.values[:, None] - d.double()).abs().amin(dim=1)
    rounding = 1e-15 * float(d.abs().max())
    assert bool((distance <= pairs.residuals + rounding).all())
    assert bool((true_residuals(d, pairs) <= pairs.residuals + rounding).all())
    if pairs.converged:
        assert float(pairs.residuals.max()) <= tol * float(d.double().abs().max()) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("leading", "num"),
    [
        ((5.0, 5.0, 5.0), 3),
        ((5.0, 5.0, 5.0, 2.0, 1.5), 5),
        ((5.0, 5.0, 5.0), 2),
        ((5.0, 4.0, 4.0, 3.0), 4),
        ((5.0, 4.0, 4.0, 3.0), 2),
        ((5.0,) * 8, 8),
        ((5.0, 4.999, 4.998, 4.997), 4),
    ],
)
def test_multiple_eigenvalues_come_as_often_as_they_are(leading, num, dtype):
    d = spectrum(*leading, n=2000, dtype=dtype)
    pairs = top_eigenvalues(Diagonal(d), num, tol=1e-4, accuracy="vectors", verify=True)
    assert pairs.verified
    assert torch.allclose(pairs.values, wanted(d, "LA", num), rtol=0, atol=1e-5)
    gram = pairs.vectors.double().T @ pairs.vectors.double()
    assert torch.allclose(gram, torch.eye(num, dtype=torch.float64), atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_copies_are_not_made_up():
    """400 products at one end, with restarts: simple eigenvalues stay simple."""
    d = spectrum(5.0, 4.0, 3.0, n=1000)
    with pytest.warns(NotConvergedWarning):
        pairs = top_eigenvalues(Diagonal(d), 6, tol=1e-15, max_products=400, basis_size=40)
    assert torch.allclose(pairs.values[:4], torch.tensor([5.0, 4.0, 3.0, 0.7]).double(), atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_a_hidden_eigenvector_is_found(seed):
    """The start holds 4 and 3 but, up to its noise, not 3.2: what converges first is not what was asked for."""
    d = spectrum(4.0, 3.0, 3.2, n=5000)
    start = torch.where(d == 3.2, 0.0, d**2)
    start[(d < 1.0)] *= 0.01
    pairs = top_eigenvalues(Diagonal(d, start), 2, tol=1e-2, seed=seed, verify=True)
    assert pairs.verified
    assert torch.allclose(pairs.values, torch.tensor([4.0, 3.2]).double(), atol=1e-2)


def test_verified_means_that_nothing_is_missed():
    """120 random spectra with copies, mirror images and decay; starts that favour a single eigenvector."""
    verified = 0
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        d = torch.randn(400, generator=generator, dtype=torch.float64) ** 3
        d = [d, d.round(), torch.cat([d[:200], -d[:200]]), d * torch.linspace(0, 1, 400).double() ** 4][seed % 4]
        start = torch.eye(400, dtype=torch.float64)[seed] if seed % 3 else d
        num, which = 2 + seed % 5, ["LA", "SA", "LM", "BE"][seed // 4 % 4]
        pairs = top_eigenvalues(Diagonal(d, start), num, which=which, tol=1e-2, seed=seed, verify=True)
        truth = wanted(d, which, num)
        errors = (pairs.values.abs() - truth.abs()).abs() if which == "LM" else (pairs.values - truth).abs()
        assert not pairs.verified or float(errors.max()) <= 2e-2 * float(d.abs().max())
        verified += pairs.verified
    assert verified >= 100


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_a_start_in_an_invariant_subspace_hides_nothing(which, num):
    d = spectrum(6.0, 3.0, n=400)
    start = (d == 3.0).double()
    expected = torch.tensor([6.0, 3.0]).double()[:num]
    for pairs in (
        top_eigenvalues(Diagonal(d, start), num, which=which, tol=1e-4),
        top_eigenvalues(Diagonal(d), num, which=which, tol=1e-4, start=start),
        top_eigenvalues(Diagonal(d, torch.zeros_like(d)), num, which=which, tol=1e-4),
    ):
        assert torch.allclose(pairs.values, expected, atol=1e-4)


def test_both_signs_of_equal_size():
    d = spectrum(3.0, -3.0, n=60)
    one = top_eigenvalues(Diagonal(d), 1, which="LM", tol=1e-6, accuracy="vectors")
    assert float(one.values[0].abs()) == pytest.approx(3.0, abs=1e-9)
    assert float(true_residuals(d, one)[0]) < 3e-6
    both = top_eigenvalues(Diagonal(d), 2, which="LM", tol=1e-6, accuracy="vectors")
    assert sorted(both.values.tolist()) == pytest.approx([-3.0, 3.0], abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_tiny_matrices_are_solved_exactly(n, which):
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    A = A + A.T
    for num in range(1, n + 1):
        pairs = top_eigenvalues(DenseOperator(A), num, which=which, tol=1e-12)
        assert torch.allclose(pairs.values, wanted(torch.linalg.eigvalsh(A), which, num), atol=1e-12)
        assert (pairs.converged, pairs.verified, pairs.products) == (True, True, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_identity_and_rank_one(dtype):
    zero = top_eigenvalues(DiagonalOperator(torch.zeros(50, dtype=dtype)), 3, which="LM")
    assert zero.values.tolist() == [0.0] * 3
    assert zero.converged
    assert zero.residuals.tolist() == [0.0] * 3
    same = top_eigenvalues(IdentityOperator(50, dtype=dtype), 3)
    assert same.values.tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert same.verified
    u = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rank_one = top_eigenvalues(Multiplied(50, lambda V: torch.outer(u, u @ V), dtype=dtype), 3, which="LM")
    assert rank_one.values.tolist() == pytest.approx([float(u.double() @ u.double()), 0.0, 0.0], abs=1e-4)
    assert rank_one.converged
    assert rank_one.products < 12


@pytest.mark.parametrize("tol", [1e-6, 1e-10])
def test_float64_reaches_small_tolerances(tol):
    d = spectrum(5.0, 4.9, 4.0, 3.0, -4.0, n=1000)
    pairs = top_eigenvalues(Diagonal(d), 4, which="LM", tol=tol, accuracy="vectors", verify=True)
    assert pairs.converged
    assert float(true_residuals(d, pairs).max()) <= 5 * tol
    assert torch.allclose(pairs.values, wanted(d, "LM", 4), atol=1e-12)


def test_a_tolerance_below_rounding_ends_early_and_says_so():
    d = spectrum(5.0, 4.0, dtype=torch.float32)
    op = Diagonal(d)
    with pytest.warns(NotConvergedWarning, match="no smaller than the error of the products"):
        pairs = top_eigenvalues(op, 2, tol=1e-9, accuracy="vectors")
    assert not pairs.converged
    assert op.calls < 60
    assert float(pairs.residuals.max()) < 64 * EPS[torch.float32] * 5
    assert bool((true_residuals(d, pairs) <= pairs.residuals).all())


def test_the_stated_error_of_the_products_is_in_the_residuals():
    d = spectrum(5.0, 4.0)
    rough = Multiplied(300, lambda V: d.unsqueeze(1) * V, dtype=torch.float64, relative_error=1e-2)
    with pytest.warns(NotConvergedWarning):
        pairs = top_eigenvalues(rough, 2, tol=1e-3)
    assert not pairs.converged
    assert float(pairs.residuals.min()) >= 1e-2 * 5


def test_products_that_are_not_symmetric_show_in_the_residuals():
    """Nobody told the search: the coefficients betray it."""
    generator = torch.Generator().manual_seed(0)
    A = torch.diag(spectrum(5.0, 4.0)) + 1e-3 * torch.randn(300, 300, generator=generator, dtype=torch.float64)
    op = Multiplied(300, lambda V: A @ V, dtype=torch.float64)
    with pytest.warns(NotConvergedWarning, match="error of the products"):
        pairs = top_eigenvalues(op, 1, tol=1e-6)
    assert not pairs.converged
    assert pairs.products < 100


def test_value_bounds_are_sharper_and_hold_on_a_separated_spectrum():
    d = spectrum(9.0, 6.0, 4.0, n=1000)
    pairs = top_eigenvalues(Diagonal(d), 3, tol=1e-2)
    errors = (pairs.values - wanted(d, "LA", 3)).abs()
    assert bool((errors <= pairs.value_bounds + 1e-12).all())
    assert bool((pairs.value_bounds <= pairs.residuals).all())
    assert float(pairs.value_bounds[0]) == pytest.approx(0.1 * float(pairs.residuals[0]), rel=1e-3)


def test_few_products_where_the_spectrum_is_like_a_network_s():
    """Ten outliers over a bulk a hundred times smaller, and a gradient made of the outliers."""
    generator = torch.Generator().manual_seed(0)
    d = 0.005 * torch.randn(100_000, generator=generator) ** 3
    d[:10] = torch.tensor([10, 6, 4, 3, 2.5, 2, 1.7, 1.4, 1.2, 1.0])
    gradient = d * torch.randn(100_000, generator=generator)
    op = Diagonal(d, gradient)
    assert top_eigenvalues(op).products <= 10
    assert top_eigenvalues(op, verify=False).products <= 8
    ten = top_eigenvalues(op, 10)
    assert ten.verified
    assert ten.products <= 40


@pytest.mark.parametrize("num", [1, 4])
def test_a_warm_start_saves_products(num):
    d = spectrum(9.0, 8.0, 7.0, 6.0, 5.5, 5.0, n=1000)
    cold = top_eigenvalues(Diagonal(d), num, tol=1e-4, verify=False)
    warm = top_eigenvalues(Diagonal(1.001 * d), num, tol=1e-4, verify=False, start=cold.vectors)
    assert warm.products < cold.products
    assert torch.allclose(warm.values, 1.001 * wanted(d, "LA", num), atol=1e-3)


def test_an_overtaking_eigenvalue_is_seen_from_a_warm_start():
    d = spectrum(5.0, 4.0, n=1000)
    old = top_eigenvalues(Diagonal(d), tol=1e-6)
    d[d == 4.0] = 6.0
    assert float(top_eigenvalues(Diagonal(d), start=old.vectors).values[0]) == pytest.approx(6.0, abs=1e-3)
    d[d == 6.0] = -8.0
    assert float(top_eigenvalues(Diagonal(d), which="LM", start=old.vectors).values[0]) == pytest.approx(-8, abs=1e-3)


def test_a_small_basis_needs_restarts_and_gets_there():
    d = spectrum(5.0, 4.9, 4.8, 4.7, n=1000)
    pairs = top_eigenvalues(Diagonal(d), 3, tol=1e-6, basis_size=12, verify=False)
    assert pairs.converged
    assert torch.allclose(pairs.values, wanted(d, "LA", 3), atol=1e-9)
    assert bool((true_residuals(d, pairs) <= pairs.residuals).all())


def test_the_budget_is_kept_and_the_best_answer_returned():
    d = torch.linspace(0, 1, 2000, dtype=torch.float64)
    op = Diagonal(d)
    with pytest.warns(NotConvergedWarning, match="2 of 3 eigenpairs|3 of 3 eigenpairs"):
        pairs = top_eigenvalues(op, 3, tol=1e-8, max_products=15)
    assert op.calls == pairs.products == 15
    assert not pairs.converged
    assert not pairs.verified
    assert "NOT converged, 15 products" in str(pairs)
    assert float(pairs.values[0]) == pytest.approx(1.0, abs=0.1)
    least = top_eigenvalues(Diagonal(spectrum(9.0)), 1, tol=10.0, max_products=1, verify=False)
    assert least.products == 1


def test_the_time_limit_is_kept_but_an_answer_is_given():
    op = Diagonal(torch.linspace(0, 1, 2000, dtype=torch.float64))
    with pytest.warns(NotConvergedWarning):
        pairs = top_eigenvalues(op, 4, tol=1e-12, max_seconds=1e-9)
    assert pairs.products == 4
    assert pairs.seconds > 0


def test_equal_seeds_give_equal_bits_and_leave_the_generators_alone():
    d = spectrum(5.0, 5.0, 4.0, dtype=torch.float32)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, again, other = (top_eigenvalues(Diagonal(d), 3, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_float32_at_five_million_entries():
    """Long float32 sums: the value is right to 1e-6 and the vector is of unit length."""
    d = torch.full((5_000_000,), 0.1)
    d[123], d[4_000_000] = 3.0, -2.0
    pairs = top_eigenvalues(Diagonal(d), 1, which="LM", tol=1e-4)
    assert float(pairs.values[0]) == pytest.approx(3.0, rel=1e-6)
    assert float(pairs.vectors[123].abs()) == pytest.approx(1.0, abs=1e-4)
    assert float(pairs.vectors.double().square().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller_do_not_matter(mode):
    d = spectrum(5.0, 4.0)
    plain = top_eigenvalues(Diagonal(d), 2)
    with mode():
        inside = top_eigenvalues(Diagonal(d), 2)
    assert torch.equal(plain.vectors, inside.vectors)
    assert not inside.vectors.is_inference()


def test_the_progress_bar_counts_products(capfd):
    top_eigenvalues(Diagonal(spectrum(5.0)), progress=True)
    assert "eigenvalues" in capfd.readouterr().err
    top_eigenvalues(Diagonal(spectrum(5.0)))
    assert capfd.readouterr().err == ""


def test_not_finite_is_an_error_that_names_the_product():
    op = Diagonal(torch.tensor([1.0] * 30 + [float("nan")]))
    with pytest.raises(ValueError, match="product 1 of Diagonal.* NaN or infinite"):
        top_eigenvalues(op)
    with pytest.raises(ValueError, match=r"`op.start_vector\(\)` has NaN"):
        top_eigenvalues(Diagonal(torch.ones(30), torch.full((30,), torch.inf)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 13}, r"`num` is 13 but the operator has only n = 12 .* use `dense\(\)`"),
        ({"num": 0}, "`num` is 0; ask for at least 1"),
        ({"num": 2.0}, "`num` is 2.0"),
        ({"num": True}, "`num` is True"),
        ({"which": "la"}, "`which` is 'la'; did you mean 'LA'"),
        ({"which": "largest"}, "must be one of 'LA' .largest., 'SA'"),
        ({"tol": -1e-3}, "`tol` is -0.001"),
        ({"tol": float("nan")}, "`tol` is nan"),
        ({"num": 4, "max_products": 3}, "`max_products` is 3 but 4 eigenvalues take at least 4"),
        ({"max_seconds": 0}, "`max_seconds` is 0"),
        ({"num": 3, "basis_size": 8}, "`basis_size` is 8; 3 eigenvalues need at least"),
        ({"start": torch.zeros(12)}, "`start` is zero"),
        ({"start": torch.stack([torch.ones(12), torch.zeros(12)], 1)}, "zero column"),
        ({"start": torch.ones(11)}, r"`start` is \[11\]; it must be a tensor \[12\] or \[12, k\]"),
        ({"start": torch.ones(12, 0)}, r"`start` is \[12, 0\]"),
        ({"start": [1.0] * 12}, "`start` is list"),
        ({"start": torch.ones(12, dtype=torch.float64)}, "`start` is torch.float64"),
        ({"start": torch.full((12,), torch.nan)}, "`start` has NaN"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(DiagonalOperator(torch.arange(12.0)), **options)


def test_a_matrix_is_not_an_operator():
    with pytest.raises(TypeError, match=r"`op` is a Tensor; .* DenseOperator\(matrix\)"):
        top_eigenvalues(torch.eye(3))
