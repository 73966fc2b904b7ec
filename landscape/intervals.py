"""Confidence intervals: Student's quantile, and the ratio of two means whose lower one may hardly differ from zero."""

from __future__ import annotations

import math


def ratio_interval(
    top: float, bottom: float, top_var: float, bottom_var: float, covariance: float, quantile: float
) -> tuple[float, float]:
    r"""Fieller's interval for the ratio r >= 0 of the expectations of two estimates, as (low, high).

    All r with (top − r · bottom)² <= q² Var(top − r · bottom), which are the roots' interval of a quadratic. `high` is
    infinite where `bottom` is not told from 0: no upper limit can be given then. A ratio is taken to be positive, so
    that what lies below 0 is cut off; the interval is (0, inf) where the estimates tell nothing.

    Args:
        top, bottom: The estimates.
        top_var, bottom_var, covariance: Of the estimates.
        quantile: q, two-sided: 1.96 for 95 % of a normal law.

    Source: Fieller, Some Problems in Interval Estimation, 1954.
    """
    square = quantile**2
    a = bottom**2 - square * bottom_var
    b = top * bottom - square * covariance
    c = top**2 - square * top_var
    if not all(math.isfinite(x) for x in (a, b, c)):
        return 0.0, math.inf
    spread = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0 and bottom > 0:
        return max((b - spread) / a, 0.0), max((b + spread) / a, 0.0)
    if c <= 0 or b * b - a * c <= 0:
        return 0.0, math.inf
    # The smallest r > 0 that the estimates allow; c > 0 says that 0 is not one. Written so that it stays at a = 0.
    return (c / (b + spread) if b + spread > 0 else 0.0), math.inf


def student_quantile(freedom: float, confidence: float) -> float:
    """The two-sided quantile of Student's law: 1.96 for 95 % and infinitely many degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + confidence) / 2))
