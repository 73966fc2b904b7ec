"""Bounds on values, proofs from the search's own run, and coarse starts, against spectra that are known."""

import itertools
import warnings

import pytest
import torch
from sharpscope.hessian import eigs
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.exclusion import RandomRun
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator
from sharpscope.hessian.ritz_search import Ends, RitzPairs


class Similar(DiagonalOperator):
    """diag(d) with a start vector and a coarse operator."""

    def __init__(self, d, start=None, coarse=None):
        super().__init__(d)
        self._start, self._coarse = start, coarse

    def start_vector(self):
        return self._start

    def coarse(self):
        return self._coarse


def zoo(seed, n=200):
    """Eigenvalues [n] over a bulk: separated, clustered, multiple, with tiny gaps, mirrored; and a start vector."""
    generator = torch.Generator().manual_seed(seed)
    d = 0.02 * torch.randn(n, generator=generator, dtype=torch.float64)
    leading = torch.rand(10, generator=generator, dtype=torch.float64) * 4 + 0.5
    kind = seed % 6
    if kind == 1:
        leading[1:4] = leading[0] * (1 + 1e-2 * torch.rand(3, generator=generator, dtype=torch.float64))
    if kind == 2:
        leading[1:3] = leading[0]
    if kind == 3:
        leading[1:3] = leading[0] * (1 + 1e-7 * torch.rand(2, generator=generator, dtype=torch.float64))
    if kind == 4:
        leading[5:] = -leading[:5]
    d[:10] = leading
    start = d * torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == 5:
        start[0] = 0.0  # hidden but for the noise
    return d, start


def largest(d, num):
    return d.sort(descending=True).values[:num]


def test_what_the_bounds_promise_holds_in_two_hundred_matrices():
    """An eigenvalue within each residual, always; within value_bounds where the gap behind them is true, and mostly."""
    checked = sharp = covered = loose = 0
    for seed in range(200):
        d, start = zoo(seed)
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(len(d), len(d), generator=generator, dtype=torch.float64)).Q
        A = (Q * d) @ Q.T
        num = 1 + seed % 3
        op = DenseOperator((A + A.T) / 2)
        pairs = top_eigenvalues(op, num, tol=10.0 ** -(2 + seed % 4), seed=seed, start=Q @ start)
        assert pairs.converged
        distances = (pairs.values[:, None] - d).abs().sort(dim=1).values
        assert bool((distances[:, 0] <= pairs.residuals + 1e-13).all())
        scale = float(d.abs().max())
        for distance, residual, bound in zip(distances, pairs.residuals, pairs.value_bounds, strict=True):
            error, others = float(distance[0]), distance[distance - distance[0] > 1e-6 * scale]
            checked += 1
            sharp += float(bound) < 0.5 * float(residual)
            covered += error <= float(bound) + 1e-6 * scale
            loose += error > pairs.tol * scale
            if float(residual) ** 2 <= float(bound) * float(others.min()):
                assert error <= float(bound) + 1e-6 * scale
    assert sharp >= 0.8 * checked
    # Where a neighbour is nearer than the Ritz values show yet: seldom, and never beyond the residual.
    assert covered >= 0.95 * checked
    assert loose <= 0.02 * checked


def test_values_take_fewer_products_than_vectors_and_are_as_good_as_asked_for():
    saved = 0
    for seed in range(20):
        d, start = zoo(6 * seed)
        values = top_eigenvalues(Similar(d, start), 1, tol=1e-5, verify=False)
        vectors = top_eigenvalues(Similar(d, start), 1, tol=1e-5, verify=False, accuracy="vectors")
        assert values.converged
        assert vectors.converged
        assert float(vectors.residuals[0]) <= 1e-5 * float(d.abs().max())
        assert float((values.values - largest(d, 1)).abs()) <= 1e-5 * float(d.abs().max())
        saved += vectors.products - values.products
    assert saved >= 10


@pytest.mark.parametrize(
    ("theta", "residuals", "expected"),
    [
        # The nearest other Ritz interval counts, not the nearest Ritz value.
        ([1.0, 0.6, 0.5], [0.02, 0.1, 0.3], [3 * 0.02**2 / 0.2]),
        # No gap, or one below the residual: the residual.
        ([1.0, 0.98, 0.1], [0.02, 0.01, 0.0], [0.02]),
        ([1.0, 0.97, 0.1], [0.02, 0.02, 0.0], [0.02]),
        ([1.0], [0.02], [0.02]),
        ([1.0, -0.8, 0.1], [0.03, 0.06, 0.0], [0.003, 3 * 0.06**2 / 0.9]),
        # A small one next to a wide gap: a tenth of the residual.
        ([1.0, 0.1], [0.002, 0.0], [0.0002]),
    ],
)
def test_errors_of_values_are_squares_over_gaps(theta, residuals, expected):
    """Closed form: three times the square over the gap, between a tenth of the residual and the residual."""
    pairs = RitzPairs(
        theta=torch.tensor(theta, dtype=torch.float64),
        S=torch.eye(len(theta), dtype=torch.float64),
        coupling=torch.tensor([residuals], dtype=torch.float64),
        num=len(expected),
        scale=1.0,
        floor=0.0,
    )
    assert pairs.value_errors.tolist() == pytest.approx(expected)
    assert pairs.errors("values").tolist() == pytest.approx(expected)
    assert pairs.errors("vectors").tolist() == pytest.approx(residuals[: len(expected)])
    assert pairs.errors("vectors").tolist() == pytest.approx(residuals[: len(expected)])


@pytest.mark.parametrize(
    ("which", "wanted", "edges"),
    [
        ("LA", [3.0, 2.0], [(1, 2.0)]),
        ("SA", [-3.0, -2.0], [(-1, 2.0)]),
        ("LM", [3.0, -2.0], [(1, 2.0), (-1, 2.0)]),
        ("BE", [3.0, -2.0, 1.0], [(1, 1.0), (-1, 2.0)]),
    ],
)
def test_what_lies_beyond_the_edges_would_be_wanted_too(which, wanted, edges):
    assert Ends(which, len(wanted)).edges(torch.tensor(wanted).double()) == edges


def test_accuracy_is_named():
    with pytest.raises(ValueError, match="`accuracy` is 'value'"):
        top_eigenvalues(DiagonalOperator(torch.arange(12.0)), accuracy="value")
    with pytest.raises(ValueError, match="`verify` is 'runs'"):
        top_eigenvalues(DiagonalOperator(torch.arange(12.0)), verify="runs")


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_the_margin_that_is_reported_holds_from_starts_that_hide_the_top(which):
    """The top eigenvector is in the start by its noise only: below 8 % of the proofs may be wrong."""
    wrong = verified = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        d = 0.01 * torch.randn(3000, generator=generator, dtype=torch.float64)
        d[:6] = torch.tensor([1.0, 0.8, 0.5, 0.4, 0.3, 2.0]).double()
        d = -d if which == "SA" else d
        start = d.clone()
        start[5] = 0.0
        pairs = top_eigenvalues(Similar(d, start), 1, which=which, tol=1e-2, seed=seed)
        verified += pairs.verified
        scale = float(pairs.values.abs().max())
        wrong += pairs.verified and 2.0 - scale > (pairs.margin + 1e-2) * scale
    assert verified >= 55
    assert wrong <= 0.08 * 60


def test_the_own_run_of_several_pairs_leaves_no_gap_between_them():
    d, start = zoo(0)
    pairs = top_eigenvalues(Similar(d, start), 6)
    assert pairs.verified
    assert pairs.margin <= 0.05
    assert torch.allclose(pairs.values, largest(d, 6), rtol=0, atol=1e-3 * float(d.max()))


def test_a_strict_proof_costs_more_and_shows_more():
    d, start = zoo(0)
    cheap, strict = (top_eigenvalues(Similar(d, start), 4, verify=verify) for verify in ("run", True))
    none = top_eigenvalues(Similar(d, start), 4, verify=False)
    assert none.products <= cheap.products < strict.products
    assert strict.margin <= cheap.margin < none.margin == float("inf")
    assert (none.verified, cheap.verified, strict.verified) == (False, True, True)


def test_a_run_excludes_all_but_what_it_has_found():
    """Three outliers: nothing is left beside them after nine steps, some after four, and never at the values found."""
    d = torch.cat([torch.tensor([5.0, 4.0, 3.0]), torch.linspace(-0.3, 0.3, 37)]).double()
    q = torch.full((len(d),), len(d) ** -0.5, dtype=torch.float64)
    alpha, beta, rows = [], [], [q]
    for _ in range(9):
        w = d * rows[-1]
        alpha.append(float(w.dot(rows[-1])))
        for row in itertools.chain(rows, rows):
            w = w - row.dot(w) * row
        beta.append(float(w.norm()))
        rows.append(w / w.norm())
    run, short = RandomRun(len(d), alpha, beta), RandomRun(len(d), alpha[:4], beta[:4])
    theta = run.ritz_values()[:3]
    assert theta == pytest.approx([5.0, 4.0, 3.0], abs=1e-6)
    assert run.excludes_all_but(theta, [(1, theta[2])], margin=1e-3)
    assert not run.excludes_all_but(theta, [(1, theta[2])], margin=1e-9)
    assert not short.excludes_all_but(short.ritz_values()[:3], [(1, short.ritz_values()[2])], margin=1e-3)
    assert run.excludes_all_but(theta, [(1, theta[2]), (-1, 0.4)], margin=1e-3)
    assert not run.excludes_all_but(theta, [(1, theta[2]), (-1, 0.2)], margin=1e-3)
    assert bool((run.last_squares(theta) < 1e-6).all())
    # p_k² grows away from the values found, and is the last term of the sum that `excludes` looks at.
    assert run.last_squares([5.1])[0] < run.last_squares([5.2])[0]
    assert RandomRun(float(run.last_squares([5.2])[0]) * 0.999, alpha, beta).excludes(5.2)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("verify", ["run", True])
def test_a_coarse_operator_changes_the_start_and_never_the_result(num, verify, monkeypatch):
    """A good one, an unrelated one, one of the wrong sign, and zero."""
    monkeypatch.setattr(eigs, "COARSE_FROM", 0)
    d, start = zoo(0)
    generator = torch.Generator().manual_seed(1)
    truth = largest(d, num)
    unrelated = d[torch.randperm(len(d), generator=generator)]
    for other in (1.1 * d, unrelated, -d, torch.zeros_like(d)):
        pairs = top_eigenvalues(Similar(d, start, Similar(other, start)), num, tol=1e-4, verify=verify)
        assert pairs.converged
        assert bool(((pairs.values - truth).abs() <= pairs.residuals).all())
        assert bool(((pairs.values - truth).abs() <= 1e-4 * float(d.max())).all())
        assert (pairs.coarse_products > 0) == (num == 1)
    alone = top_eigenvalues(Similar(d, start, Similar(d, start)), num, tol=1e-4, verify=verify, coarse=False)
    assert alone.coarse_products == 0
    monkeypatch.setattr(eigs, "COARSE_FROM", len(d) + 1)
    assert top_eigenvalues(Similar(d, start, Similar(d, start)), num).coarse_products == 0


def test_a_good_coarse_operator_saves_products(monkeypatch):
    monkeypatch.setattr(eigs, "COARSE_FROM", 0)
    d = torch.cat([torch.linspace(2, 5, 40), 0.05 * torch.randn(2000, generator=torch.Generator().manual_seed(0))])
    d = d.double()
    start = d * torch.randn(len(d), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bent = d + 0.02 * torch.randn(len(d), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cold = top_eigenvalues(Similar(d, start), tol=1e-4)
    helped = top_eigenvalues(Similar(d, start, Similar(bent, start)), tol=1e-4)
    assert helped.products < cold.products


@pytest.mark.parametrize("num", [2, 3, 5])
def test_both_ends_at_once(num):
    d, start = zoo(4)
    ordered = d.sort().values
    truth = torch.cat([ordered[: num // 2], ordered[len(d) - (num - num // 2) :]])
    both = top_eigenvalues(Similar(d, start), num, which="BE", tol=1e-5)
    assert both.verified
    assert torch.allclose(both.values, truth, rtol=0, atol=1e-5 * float(d.abs().max()))
    low = top_eigenvalues(Similar(d, start), num // 2, which="SA", tol=1e-5)
    high = top_eigenvalues(Similar(d, start), num - num // 2, which="LA", tol=1e-5)
    assert both.products < low.products + high.products


def test_a_run_that_restarts_keeps_what_it_has_shown():
    d = torch.cat([torch.tensor([5.0, 4.9, 4.8]), torch.linspace(-1, 1, 997)]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        pairs = top_eigenvalues(DiagonalOperator(d), 3, tol=1e-6, basis_size=12)
    assert torch.allclose(pairs.values, d[:3], rtol=0, atol=1e-5)
    assert pairs.margin <= 0.05 or not pairs.verified


def hard_pair(seed, n=1000):
    """A top pair 0.1 to 10 % apart that the start holds alike: eigenvalues [n] and start."""
    generator = torch.Generator().manual_seed(seed)
    d = 0.01 * torch.randn(n, generator=generator, dtype=torch.float64)
    start = d * torch.randn(n, generator=generator, dtype=torch.float64)
    d[:2] = torch.tensor([1.0, 1 - 10 ** float(-3 + 2 * torch.rand(1, generator=generator))])
    d[2:8] = 0.7 * torch.rand(6, generator=generator, dtype=torch.float64)
    start[:8] = d[:8] * torch.tensor([1.0, 0.5 + float(torch.rand(1, generator=generator)), 1, 1, 1, 1, 1, 1])
    return d, start


def test_a_pair_that_passes_as_one_is_within_the_residual_and_is_resolved_where_it_is_asked_for():
    beyond = 0
    for seed in range(60):
        d, start = hard_pair(seed)
        one = top_eigenvalues(Similar(d, start), 1, tol=1e-3, seed=seed)
        distance, residual = float((d - one.values[0]).abs().min()), float(one.residuals[0])
        assert one.converged
        assert distance <= residual
        # √(tol/3), the stated most.
        assert residual <= (1e-3 / 3) ** 0.5
        if distance > float(one.value_bounds[0]) + 1e-12:
            beyond += 1
            assert 1 - float(d[1]) < residual**2 / float(one.value_bounds[0])
        exact = top_eigenvalues(Similar(d, start), 1, tol=1e-3, seed=seed, accuracy="vectors")
        assert float((d - exact.values[0]).abs().min()) <= 1e-3
        two = top_eigenvalues(Similar(d, start), 2, tol=1e-3, seed=seed)
        assert torch.allclose(two.values, d[:2], rtol=0, atol=1e-3)
    # So `value_bounds` are estimates.
    assert beyond > 0
