"""Numbers of several seeds as claims show them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def listed(values: Sequence[float | None], form: str = ".3g") -> str:
    """One after the other; None is what never happened."""
    return ", ".join("never" if value is None else format(value, form) for value in values)


def paired(values: Sequence[float], errors: Sequence[float], form: str = ".4f") -> str:
    """Each with its error."""
    return ", ".join(f"{value:{form}} ± {error:{form}}" for value, error in zip(values, errors, strict=True))


def with_spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and, of several, standard deviation."""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
