"""Fieller's interval: the set that it is defined by, its coverage, and its infinite cases."""

import math

import pytest
import torch
from sharpscope.landscape.intervals import ratio_interval, student_quantile

CASES = [
    (3.0, 2.0, 0.1, 0.05, 0.02),
    (3.0, 2.0, 0.1, 0.05, -0.06),
    (0.1, 2.0, 0.1, 0.05, 0.0),  # 0 is inside
    (-1.0, 2.0, 0.01, 0.05, 0.0),  # negative for sure
    (3.0, 0.3, 0.1, 0.05, 0.02),  # no upper limit
    (3.0, -0.3, 0.1, 0.05, 0.02),
    (3.0, 0.3, 9.0, 0.05, 0.02),  # nothing told
    (3.0, 1.96 * 0.05**0.5, 0.1, 0.05, 0.02),  # where the upper limit becomes infinite
]


@pytest.mark.parametrize("case", CASES)
def test_it_holds_what_the_definition_allows(case):
    top, bottom, top_var, bottom_var, covariance = case
    low, high = ratio_interval(*case, 1.96)
    for r in torch.logspace(-3, 4, 3000, dtype=torch.float64).tolist():
        variance = top_var - 2 * r * covariance + r * r * bottom_var
        allowed = (top - r * bottom) ** 2 <= 1.96**2 * variance
        if abs(r / max(low, 1e-9) - 1) > 1e-6 and (high == math.inf or abs(r / max(high, 1e-9) - 1) > 1e-6):
            assert not allowed or low <= r <= high
            if high < math.inf:
                assert allowed == (low <= r <= high)


def test_coverage_where_the_normal_interval_fails():
    """The lower mean is three standard errors from 0."""
    runs, true = 4000, 5.0
    random = torch.Generator().manual_seed(0)
    bottom = 0.3 + 0.1 * torch.randn(runs, generator=random, dtype=torch.float64)
    top = 1.5 + 0.2 * torch.randn(runs, generator=random, dtype=torch.float64)
    found = [
        ratio_interval(t, b, 0.04, 0.01, 0.0, 1.959964) for t, b in zip(top.tolist(), bottom.tolist(), strict=True)
    ]
    covered = sum(low <= true <= high for low, high in found) / runs
    assert covered == pytest.approx(0.95, abs=0.014)  # four standard errors
    assert any(high == math.inf for _, high in found)


def test_what_is_not_finite_tells_nothing():
    assert ratio_interval(1.0, 2.0, math.inf, 0.1, 0.0, 2.0) == (0.0, math.inf)


def test_student_quantile():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 4.5, 60):
        assert student_quantile(freedom, 0.9) == pytest.approx(stats.t.ppf(0.95, freedom))
