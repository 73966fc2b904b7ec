"""Trace estimates: closed forms of their errors, coverage of their stated errors, budgets, messages."""

import math
import warnings

import pytest
import torch
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator, LinearOperator
from sharpscope.hessian.trace import trace

SAMPLED = ["hutchinson", "hutch++", "xtrace"]
N = 90


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


SPECTRA = {
    "decaying": 0.8 ** torch.arange(float(N)),
    "outliers": torch.cat([torch.tensor([10.0, 8, 5, 4, 3, 2]), 0.05 * torch.sin(torch.arange(N - 6.0))]),
    "indefinite": torch.linspace(-3, 4, N),
    "flat": torch.linspace(1, 3, N),
}


class Counted(DenseOperator):
    def __init__(self, matrix):
        super().__init__(matrix)
        self.products = 0

    def matmat(self, V):
        self.products += V.shape[1]
        return super().matmat(V)


def errors_and_stderrs(A, num_seeds=100, **options):
    op, truth = DenseOperator(A), float(A.double().trace())
    found = [trace(op, seed=seed, **options) for seed in range(num_seeds)]
    return torch.tensor([e.estimate - truth for e in found]), torch.tensor([e.stderr for e in found])


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_probes", [8, 12, 30])
def test_truth_lies_within_three_standard_errors(method, name, num_probes):
    errors, stderrs = errors_and_stderrs(symmetric(SPECTRA[name]), method=method, num_probes=num_probes)
    assert int((errors.abs() <= 3 * stderrs).sum()) >= 95
    # Honest the other way too: not everything may be called an error. XTrace's jackknife is the loosest.
    assert rms(stderrs) < (6 if method == "xtrace" else 1.5) * rms(errors)


@pytest.mark.parametrize("method", SAMPLED)
def test_float32_keeps_its_promise(method):
    A = symmetric(SPECTRA["decaying"]).float()
    errors, stderrs = errors_and_stderrs(A, num_seeds=40, method=method, num_probes=40)
    assert int((errors.abs() <= 3 * stderrs).sum()) >= 38


def test_hutchinson_errs_by_its_closed_form_and_falls_as_the_root_of_the_products():
    A = symmetric(SPECTRA["indefinite"])
    off = float((A - A.diag().diag()).square().sum())
    for num_probes in (4, 16, 64):
        errors, _ = errors_and_stderrs(A, num_seeds=200, method="hutchinson", num_probes=num_probes)
        # The rms of 200 normal errors has a standard error of 5 %.
        assert rms(errors) == pytest.approx(math.sqrt(2 * off / num_probes), rel=0.15)


@pytest.mark.parametrize(("method", "gain"), [("hutch++", 4), ("xtrace", 15)])
def test_sketches_pay_where_eigenvalues_decay(method, gain):
    """With 40 products the sketches have 13 and 20 directions, after which 0.8¹³ = 0.055 and 0.8²⁰ = 0.012 is left."""
    A = symmetric(SPECTRA["decaying"])
    plain, _ = errors_and_stderrs(A, num_seeds=30, method="hutchinson", num_probes=40)
    errors, _ = errors_and_stderrs(A, num_seeds=30, method=method, num_probes=40)
    assert rms(errors) < rms(plain) / gain


def test_hutch_plus_plus_error_falls_faster_than_its_budget_on_a_slow_decay():
    """For eigenvalues 1/i the residual norm falls as m^-1/2 and its sampling as m^-1/2: the error as 1/m."""
    A = symmetric(1 / torch.arange(1, 401.0))
    few, _ = errors_and_stderrs(A, num_seeds=60, method="hutch++", num_probes=12)
    many, _ = errors_and_stderrs(A, num_seeds=60, method="hutch++", num_probes=96)
    # A factor of 8 in products; rms values of 60 seeds carry 9 % each.
    assert 5 < rms(few) / rms(many) < 12


@pytest.mark.parametrize("method", SAMPLED)
def test_no_method_exceeds_its_budget(method):
    for num_probes in (4, 7, 12, 25):
        op = Counted(symmetric(SPECTRA["flat"]))
        found = trace(op, method=method, num_probes=num_probes)
        assert found.products == op.products <= num_probes
        assert found.products >= num_probes - 1


@pytest.mark.parametrize("method", [*SAMPLED, "exact"])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_n_products_give_the_exact_trace(method, n):
    op = Counted(symmetric(torch.linspace(-1, 2, n)))
    found = trace(op, method=method, num_probes=max(n, 10))
    assert found.estimate == pytest.approx(float(op.dense().trace()), abs=1e-14)
    assert (found.stderr, found.products, found.converged) == (0.0, n, True)


def test_exact_ignores_a_small_budget():
    A = symmetric(SPECTRA["indefinite"])
    found = trace(DenseOperator(A), method="exact", num_probes=3)
    assert found.estimate == pytest.approx(float(A.trace()), rel=1e-12)
    assert (found.stderr, found.products) == (0.0, N)


def test_hutchinson_is_exact_on_a_diagonal_matrix_and_says_so():
    d = torch.randn(300, dtype=torch.float64)
    found = trace(DiagonalOperator(d), num_probes=5)
    assert abs(found.estimate - float(d.sum())) <= 3 * found.stderr
    assert found.stderr < 1e-12 * float(d.norm())


@pytest.mark.parametrize("method", SAMPLED)
def test_zero_operator(method):
    found = trace(DiagonalOperator(torch.zeros(200)), method=method, num_probes=20, tol=0.1)
    assert (found.estimate, found.stderr, found.converged) == (0.0, 0.0, True)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_exact(method):
    d = torch.zeros(500, dtype=torch.float64)
    d[:3] = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    found = trace(DiagonalOperator(d), method=method, num_probes=30)
    assert abs(found.estimate - 2.5) <= 3 * found.stderr < 1e-12


def test_long_float32_sums_keep_their_digits():
    n = 2_000_000
    found = trace(DiagonalOperator(torch.full((n,), 0.1)), num_probes=2)
    assert found.estimate == pytest.approx(n * float(torch.tensor(0.1)), rel=1e-9)


@pytest.mark.parametrize("method", SAMPLED)
def test_tolerance_stops_early_and_holds(method):
    A = symmetric(SPECTRA["decaying"])
    op, truth = Counted(A), float(A.trace())
    hits, spent = 0, []
    for seed in range(40):
        op.products = 0
        found = trace(op, method=method, num_probes=80, tol=0.1, seed=seed)
        assert found.converged
        assert found.stderr <= 0.1 * abs(found.estimate)
        assert found.products == op.products
        spent.append(found.products)
        hits += abs(found.estimate - truth) <= 3 * found.stderr
    assert hits >= 38
    assert max(spent) < 80


@pytest.mark.parametrize("method", SAMPLED)
def test_a_tolerance_out_of_reach_is_said(method):
    op = DenseOperator(symmetric(torch.linspace(-1, 1.001, N)))
    with pytest.warns(NotConvergedWarning, match="num_probes"):
        found = trace(op, method=method, num_probes=20, tol=1e-3)
    assert not found.converged
    assert math.isfinite(found.estimate)


def test_without_a_tolerance_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trace(DenseOperator(symmetric(SPECTRA["indefinite"])), num_probes=4).converged


def test_one_probe_has_no_error():
    assert trace(DenseOperator(symmetric(SPECTRA["flat"])), num_probes=1).stderr == math.inf


class Approximate(DenseOperator):
    """Products with an error of the size it states, like those of finite differences."""

    def __init__(self, matrix, relative_error):
        super().__init__(matrix)
        self._relative_error = relative_error
        self._scale = float(torch.linalg.matrix_norm(matrix, 2)) * relative_error

    def matmat(self, V):
        noise = torch.randn(V.shape, dtype=V.dtype, generator=torch.Generator().manual_seed(V.shape[1]))
        return super().matmat(V) + self._scale * noise * V.norm(dim=0) / math.sqrt(len(V))


@pytest.mark.parametrize("method", [*SAMPLED, "exact"])
def test_errors_of_the_products_are_part_of_the_error(method):
    d = torch.linspace(1, 2, 64, dtype=torch.float64)
    found = trace(Approximate(torch.diag(d), 1e-2), method=method, num_probes=20)
    assert abs(found.estimate - float(d.sum())) <= 3 * found.stderr
    assert found.stderr >= 0.9e-2 * float(d.norm())


def test_seeds_repeat_and_differ_and_the_global_stream_stays():
    op = DenseOperator(symmetric(SPECTRA["flat"]))
    state = torch.random.get_rng_state()
    for method in SAMPLED:
        first, again, other = (trace(op, method=method, num_probes=12, seed=seed) for seed in (1, 1, 2))
        assert first.estimate == again.estimate != other.estimate
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [*SAMPLED, "exact"])
def test_any_grad_mode(mode, method):
    op = DenseOperator(symmetric(SPECTRA["flat"]))
    op._matrix.requires_grad_()
    outside = trace(op, method=method, num_probes=12)
    with mode():
        inside = trace(op, method=method, num_probes=12)
    assert inside.estimate == outside.estimate


class Broken(LinearOperator):
    """NaN from the third product on."""

    def __init__(self, n):
        super().__init__(n)
        self.products = 0

    def matmat(self, V):
        out = V.clone()
        for j in range(V.shape[1]):
            self.products += 1
            if self.products >= 3:
                out[0, j] = math.nan
        return out


@pytest.mark.parametrize("method", [*SAMPLED, "exact"])
def test_nan_names_the_product(method):
    with pytest.raises(ValueError, match="product 3 of Broken"):
        trace(Broken(40), method=method, num_probes=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hutchison"}, "did you mean 'hutchinson'"),
        ({"method": "Hutch++ "}, "did you mean 'hutch\\+\\+'"),
        ({"method": "zzz"}, "the methods are 'hutchinson'"),
        ({"tol": -1e-3}, "`tol` is -0.001"),
        ({"tol": 0.0}, "`tol` is 0.0"),
        ({"tol": math.nan}, "`tol` is nan"),
        ({"num_probes": 0}, "`num_probes` is 0"),
        ({"method": "xtrace", "num_probes": 3}, "`num_probes` is 3; xtrace needs at least 4"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        trace(DiagonalOperator(torch.ones(50)), **options)


def test_num_probes_is_a_count():
    with pytest.raises(TypeError, match="`num_probes` is 10.0"):
        trace(DiagonalOperator(torch.ones(50)), num_probes=10.0)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_probes", [12, 30])
def test_deflated_truth_lies_within_three_standard_errors(name, num_probes):
    errors, stderrs = errors_and_stderrs(symmetric(SPECTRA[name]), num_seeds=200, num_probes=num_probes, deflate=4)
    assert int((errors.abs() <= 3 * stderrs).sum()) >= 190
    assert rms(stderrs) < 1.5 * rms(errors)
    # Unbiased, with vectors that have not converged too: 6 products for 4 pairs.
    assert abs(float(errors.mean())) <= 3 * rms(errors) / math.sqrt(200)


@pytest.mark.parametrize("name", ["decaying", "outliers"])
def test_deflation_pays_where_few_eigenvalues_are_large(name):
    A = symmetric(SPECTRA[name])
    plain, _ = errors_and_stderrs(A, num_seeds=40, num_probes=40)
    errors, _ = errors_and_stderrs(A, num_seeds=40, num_probes=40, deflate=6)
    assert rms(errors) < rms(plain) / 5


def test_deflation_keeps_to_the_budget_and_tolerance():
    op = Counted(symmetric(SPECTRA["decaying"]))
    found = trace(op, num_probes=40, deflate=5)
    assert found.products == op.products == 40
    op.products = 0
    early = trace(op, num_probes=80, deflate=5, tol=0.1)
    assert early.converged
    assert early.products == op.products < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deflate": 30, "num_probes": 40}, "more than half of `num_probes` = 40"),
        ({"deflate": 2, "method": "xtrace"}, "`deflate` is 2 with method 'xtrace'"),
        ({"deflate": -2}, "`deflate` is -2"),
    ],
)
def test_bad_deflations(options, message):
    with pytest.raises(ValueError, match=message):
        trace(DiagonalOperator(torch.ones(500)), **options)
