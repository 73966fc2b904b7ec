"""Options of optimizers: what they may be, and what is said when they are not."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise unless `value` is a finite number in the stated range; a tensor with one element will do."""
    rule = _rule(least, above, most, below)
    if isinstance(value, bool) or not (
        isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    ):
        raise TypeError(f"`{name}` is {value!r}; it must be a number {rule}")
    number = float(value)
    good = math.isfinite(number)
    good = good and (least is None or number >= least) and (above is None or number > above)
    good = good and (most is None or number <= most) and (below is None or number < below)
    if not good:
        raise ValueError(f"`{name}` is {number:g}; it must be finite and {rule}")


def check_betas(betas: Any, name: str = "betas") -> None:
    """Raise unless `betas` holds two numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"`{name}` is {betas!r}; give two numbers in [0, 1), such as (0.9, 0.999)")
    for i, beta in enumerate(betas):
        check_number(f"{name}[{i}]", beta, least=0, below=1)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}; it must be True or False")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _rule(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    parts = [(">=", least), (">", above), ("<=", most), ("<", below)]
    return " and ".join(f"{sign} {bound:g}" for sign, bound in parts if bound is not None) or "of any size"
