"""Probe vectors, and the variance of Hutchinson's samples read off whole vectors."""

import math

import pytest
import torch
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator
from sharpscope.hessian.probes import (
    ProbeMoments,
    exact_columns,
    gaussian,
    probe_groups,
    products,
    rademacher,
    random_generator,
)


def symmetric(n, seed=0):
    torch.manual_seed(seed)
    A = torch.randn(n, n, dtype=torch.float64)
    return A + A.T


def moments_of(A, Z, **options):
    op = DenseOperator(A)
    moments = ProbeMoments(op, **options)
    for i, (z, image) in enumerate(zip(Z, products(op, Z), strict=True)):
        moments.add(z, image, product=i + 1)
    return moments


@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_a_stream_of_probes_does_not_depend_on_how_many_are_drawn_at_once(draw):
    op = DiagonalOperator(torch.ones(50))
    one, two = random_generator(op, 3), random_generator(op, 3)
    together = draw(op, 5, one)
    apart = torch.cat([draw(op, 2, two), draw(op, 3, two)])
    assert torch.equal(together, apart)


def test_rademacher_probes_are_signs_with_mean_zero():
    Z = rademacher(DiagonalOperator(torch.ones(10_000)), 4, torch.Generator().manual_seed(0))
    assert set(Z.unique().tolist()) == {-1.0, 1.0}
    assert float(Z.mean().abs()) < 4 / math.sqrt(Z.numel())  # four standard errors
    assert float((Z @ Z.T / 10_000 - torch.eye(4)).abs().max()) < 0.05


def test_probes_leave_the_global_stream_alone():
    before = torch.random.get_rng_state()
    op = DiagonalOperator(torch.ones(8))
    rademacher(op, 2, random_generator(op, 0))
    gaussian(op, 2, random_generator(op, 0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_groups_cover_all_probes_and_shrink_for_long_vectors():
    assert list(probe_groups(DiagonalOperator(torch.ones(10)), 19)) == [8, 8, 3]
    assert list(probe_groups(DiagonalOperator(torch.ones(1).expand(1 << 27)), 2)) == [1, 1]


def test_moments_over_all_sign_vectors_are_those_of_the_matrix():
    """Averaged over all 2ⁿ probes the mean is the diagonal, the samples' variance 2 ‖off-diagonal‖² and so on."""
    n, A = 6, symmetric(6)
    Z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n)
    moments, m = moments_of(A, Z, entrywise=True), 2**n
    off = A - A.diag().diag()
    torch.testing.assert_close(moments.mean, A.diagonal())
    torch.testing.assert_close(moments.samples.var(correction=0), 2 * off.square().sum())
    assert moments.stderr() == pytest.approx(math.sqrt(2 * float(off.square().sum()) / (m - 1)))
    torch.testing.assert_close(moments.entry_stderr(), (off.square().sum(1) / (m - 1)).sqrt())
    torch.testing.assert_close(moments.entry_mean_square(), A.square().sum(1))
    assert moments.mean_square == pytest.approx(float(A.square().sum()))


def test_stated_variance_is_unbiased_and_much_steadier_than_that_of_the_samples():
    A = symmetric(80)
    truth = 2 * float((A - A.diag().diag()).square().sum()) / 6
    generator = torch.Generator().manual_seed(1)
    runs = [moments_of(A, rademacher(DenseOperator(A), 6, generator)) for _ in range(300)]
    stated = torch.tensor([moments.stderr() ** 2 for moments in runs])
    from_samples = torch.stack([moments.samples.var() / 6 for moments in runs])
    # Standard error of this mean: below 1 %.
    assert float(stated.mean()) == pytest.approx(truth, rel=0.03)
    assert float(stated.std()) < 0.25 * float(from_samples.std())


def test_one_sample_has_no_error():
    moments = moments_of(symmetric(5), torch.ones(1, 5, dtype=torch.float64), entrywise=True)
    assert moments.stderr() == math.inf
    assert bool(torch.isinf(moments.entry_stderr()).all())


def test_entry_variances_must_have_been_asked_for():
    moments = moments_of(symmetric(5), torch.ones(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="entrywise"):
        moments.entry_stderr()


def test_exact_columns():
    A = symmetric(130)  # three groups of columns
    diagonal, squares = exact_columns(DenseOperator(A))
    torch.testing.assert_close(diagonal, A.diagonal())
    torch.testing.assert_close(squares, A.square().sum(0))
