"""Eigenvalues over a basis that is held in fewer bits than the operator works in."""

import warnings
from functools import cache

import pytest
import torch
from sharpscope.hessian import eigs
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.lanczos import KrylovBasis
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator
from sharpscope.kernels.rounded_rows import rotate_stored_, store, unit_of
from sharpscope.landscape.peak_memory import peak_bytes

SHORT = [torch.float16, torch.bfloat16]
# Half a unit in the last place: the most that rounding takes from an entry.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@cache
def matrix(n, seed=0, dtype=torch.float32):
    """Ten outliers over a bulk, in a random basis; with its eigenvalues, ascending, in float64."""
    generator = torch.Generator().manual_seed(seed)
    d = 0.02 * torch.randn(n, generator=generator, dtype=torch.float64)
    d[:10] = 0.5 + 4 * torch.rand(10, generator=generator, dtype=torch.float64)
    d[9] = -3.0
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    A = (Q * d) @ Q.T
    A = ((A + A.T) / 2).to(dtype)
    return A, torch.linalg.eigvalsh(A.double())


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return top_eigenvalues(*args, **options)


def test_the_unit_is_a_power_of_two_of_about_the_root_that_float16_can_hold():
    assert [unit_of(n) for n in (1, 4, 15, 16, 10**6, 2**31, 2**40)] == [1.0, 2.0, 2.0, 4.0, 512.0, 2.0**15, 2.0**15]


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("n", [2, 300, 10**6])
def test_a_stored_vector_is_off_by_what_is_reported_and_by_no_more_than_half_a_unit(n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    length, unit = float(x.double().norm()), unit_of(n)
    row = torch.empty(n, dtype=dtype)
    moved = store(row, x, unit / length)
    assert float((row.double() / unit - x.double() / length).norm()) == pytest.approx(moved / unit, rel=1e-6)
    assert 0.2 * ROUNDING[dtype] < moved / unit <= ROUNDING[dtype] or n == 2
    peak = torch.zeros(n)
    peak[-1] = 1.0
    assert store(row, peak, unit) == 0.0


@pytest.mark.parametrize("dtype", SHORT)
def test_a_rotation_is_off_by_what_is_reported(dtype):
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(6, 5000, generator=generator).to(dtype)
    S = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64)).Q
    exact, last = S.T @ Q.double(), Q[4:].clone()
    moved = rotate_stored_(Q, S)
    assert torch.allclose(moved, (Q[:4].double() - exact).norm(dim=1), rtol=1e-9)
    assert torch.equal(Q[4:], last)
    assert bool((moved < ROUNDING[dtype] * exact.norm(dim=1)).all())


@pytest.mark.parametrize("dtype", SHORT)
def test_the_stored_rows_fulfil_the_relation_up_to_the_reported_rounding(dtype):
    """A Qᵀ = Qᵀ H + E for the rows as they are stored: column by column, and after rotations and a restart."""
    n = 400
    A, _ = matrix(n)
    generator = torch.Generator().manual_seed(1)
    krylov = KrylovBasis(DenseOperator(A), 20, dtype)
    krylov.add(torch.randn(n, generator=generator))

    def deviations():
        Q, j = krylov.rows.double() / unit_of(n), krylov.size
        return (A.double() @ Q[:j].T - Q.T @ krylov.coefficients).norm(dim=0), Q

    for _ in range(6):
        krylov.expand()
    single = torch.eye(6, dtype=torch.float64)
    found, Q = deviations()
    stated = krylov.rounding(single)
    coupling = krylov.coefficients[krylov.size :].norm(dim=0)
    assert bool((found <= stated + 1e-6 * krylov.scale).all())
    # Beside what the coupling's non-orthogonal directions may add, it is a measurement, not a bound.
    assert torch.allclose(stated - coupling * 7 * krylov.orthogonality, found, atol=3e-6 * krylov.scale)
    assert float(found.max()) > 0.1 * ROUNDING[dtype] * float(coupling.max())
    assert krylov.orthogonality == pytest.approx(float((Q @ Q.T - torch.eye(7)).abs().max()), rel=1e-2)

    direction = krylov.add(torch.randn(n, generator=generator))
    krylov.expand(direction)
    krylov.expand(torch.tensor([0.6, -0.8], dtype=torch.float64))
    found, Q = deviations()
    # Pending rows that are rotated are rounded again.
    coupling = krylov.coefficients[krylov.size :].norm(dim=0)
    stated = krylov.rounding(torch.eye(8, dtype=torch.float64)) - coupling * len(Q) * krylov.orthogonality
    assert bool((found <= stated + 1e-6 * krylov.scale).all())

    theta, S, asymmetry = krylov.ritz()
    krylov.restart(theta[4:], S[:, 4:])
    found, Q = deviations()
    slack = float(asymmetry.max()) + 1e-6 * krylov.scale
    assert bool((found <= krylov.rounding(torch.eye(4, dtype=torch.float64)) + slack).all())
    assert krylov.orthogonality >= 0.99 * float((Q @ Q.T - torch.eye(len(Q))).abs().max())


def test_a_restart_that_moves_no_row_keeps_what_rounding_did_before():
    krylov = KrylovBasis(DenseOperator(matrix(400)[0]), 20, torch.float16)
    krylov.add(torch.randn(400, generator=torch.Generator().manual_seed(1)))
    for _ in range(6):
        krylov.expand()
    kept = torch.eye(6, dtype=torch.float64)[:, [3, 1, 0]]
    before = krylov.rounding(kept)
    krylov.restart(krylov.coefficients.diagonal()[[3, 1, 0]], kept)
    assert float(before.min()) > 0
    torch.testing.assert_close(krylov.rounding(torch.eye(3, dtype=torch.float64)), before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(("num", "basis_size"), [(1, None), (1, 8), (4, None), (4, 12), (10, None), (10, 18)])
@pytest.mark.parametrize("n", [300, 2000])
def test_values_and_vectors_are_within_what_is_stated(n, num, basis_size, dtype):
    """A smaller basis makes restarts, whose rounding counts too."""
    A, truth = matrix(n)
    pairs = quiet(DenseOperator(A), num, which="LM", basis_size=basis_size, basis_dtype=dtype, max_products=100)
    plain = quiet(DenseOperator(A), num, which="LM", basis_size=basis_size, max_products=100)
    V = pairs.vectors.double()
    assert (pairs.vectors.dtype, pairs.vectors.shape) == (torch.float32, (n, num))
    residuals = (A.double() @ V - V * pairs.values).norm(dim=0) / V.norm(dim=0)
    assert bool((residuals <= pairs.residuals).all())
    errors = (pairs.values - truth[truth.abs().argsort(descending=True)][:num]).abs()
    scale = float(truth.abs().max())
    assert bool((errors <= pairs.value_bounds).all())
    # Rounding is random: it does to the values far less than to the vectors.
    assert float(errors.max()) <= float((plain.values - pairs.values).abs().max()) + pairs.tol * scale
    assert float(errors.max()) <= 0.2 * ROUNDING[dtype] * scale + pairs.tol * scale
    # The bound says something: not above what one restart's rounding and the asked accuracy make of it.
    restarted = basis_size is not None
    assert float(pairs.value_bounds.max()) <= ((1 + 8 * restarted) * ROUNDING[dtype] + pairs.tol) * scale
    if dtype == torch.float16 and not restarted:
        assert pairs.converged
        assert pairs.verified
        assert pairs.products <= plain.products + 1


def test_orthogonality_is_watched():
    A, _ = matrix(300)
    options = {"num": 4, "which": "LM", "verify": False}
    plain, rounded, coarse = (quiet(DenseOperator(A), basis_dtype=d, **options) for d in (None, *SHORT))
    assert plain.orthogonality < 1e-6 < rounded.orthogonality < 2 * ROUNDING[torch.float16]
    assert rounded.orthogonality < coarse.orthogonality < 2 * ROUNDING[torch.bfloat16]


def test_a_float64_search_with_float32_rows():
    A, truth = matrix(300, dtype=torch.float64)
    op = DenseOperator(A)
    pairs = top_eigenvalues(op, 4, which="LM", tol=1e-6, basis_dtype=torch.float32, accuracy="vectors")
    V = pairs.vectors
    assert pairs.converged
    assert V.dtype == torch.float64
    assert bool(((A @ V - V * pairs.values).norm(dim=0) <= pairs.residuals).all())
    assert 1e-9 * 4 < float(pairs.residuals.min()) < 1e-6 * float(truth.abs().max())


def test_a_tolerance_that_rounding_keeps_out_of_reach_says_so_soon():
    A, _ = matrix(300)
    with pytest.warns(NotConvergedWarning, match="`basis_dtype`"):
        pairs = top_eigenvalues(DenseOperator(A), 2, tol=1e-5, basis_dtype=torch.float16)
    assert not pairs.converged
    assert pairs.products < 40


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(
    "d", [torch.zeros(40), torch.ones(40), torch.cat([torch.full((3,), 5.0), torch.linspace(-1, 1, 60)])]
)
def test_zero_identity_and_copies_along_the_axes(d, dtype):
    """Eigenvectors with a single entry, the largest that is ever stored."""
    pairs = quiet(DiagonalOperator(d), 3, which="LM", verify=True, basis_dtype=dtype)
    assert torch.allclose(pairs.values, d.double().sort(descending=True).values[:3], rtol=0, atol=float(1e-2 * d.max()))
    V = pairs.vectors.double()
    residuals = (d.double()[:, None] * V - V * pairs.values).norm(dim=0)
    assert bool((residuals <= pairs.residuals + 1e-15).all())


def test_a_basis_in_half_the_bits_takes_half_the_memory():
    d = torch.full((1 << 18,), 0.1)
    d[:12] = torch.arange(5.0, 17.0)
    op, peaks = DiagonalOperator(d), {}
    for dtype in (None, torch.float16):

        def run(dtype=dtype):
            top_eigenvalues(op, 2, basis_size=64, basis_dtype=dtype, max_products=60)

        peaks[dtype] = peak_bytes(run, torch.device("cpu")).peak
    saved, row = peaks[None] - peaks[torch.float16], 4 * len(d)
    # A product of a rounded row needs the row in float32.
    assert 64 * row / 2 - 3 * row < saved <= 64 * row / 2


def test_the_basis_is_rounded_where_the_fewest_rows_do_not_fit(monkeypatch):
    A, truth = matrix(300)
    chosen = []

    class Watched(KrylovBasis):
        def __init__(self, op, capacity, dtype=None):
            super().__init__(op, capacity, dtype)
            chosen.append((dtype, self.capacity))

    monkeypatch.setattr(eigs, "KrylovBasis", Watched)
    monkeypatch.setattr(eigs, "SMALL_BASIS", 0)
    row = 300 * 4
    for rows in (40, 20, 15):
        monkeypatch.setattr(eigs, "available_bytes", lambda device, rows=rows: rows * row)
        pairs = quiet(DenseOperator(A), 4)
        assert torch.allclose(pairs.values, truth.flip(0)[:4], rtol=0, atol=2e-3 * float(truth.max()))
    top_eigenvalues(DenseOperator(A.double()), 4)
    assert [dtype for dtype, _ in chosen] == [torch.float32, torch.float32, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_a_basis_of_more_bits_or_of_integers_is_refused(dtype):
    with pytest.raises(ValueError, match="`basis_dtype` is .*; it must be one of None, torch.float32, torch.float16"):
        top_eigenvalues(DiagonalOperator(torch.arange(12.0)), basis_dtype=dtype)
