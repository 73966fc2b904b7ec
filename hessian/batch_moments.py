"""Second moments of the Hessian of a random batch, for the ways in which batches are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TypeGuard

from ..landscape.selection import near_names

SAMPLINGS = ("bernoulli", "without_replacement")


@dataclass(frozen=True)
class BatchMoments:
    r"""E[Ĥ X Ĥ] − H X H = c Σ_i H_i X H_i − p H X H for the Hessian Ĥ = (1/B) Σ_{i in batch} H_i.

    Attributes:
        own: c. centre: p.
    """

    own: float
    centre: float

    @classmethod
    def of(cls, num_examples: int, batch_size: float, sampling: str) -> BatchMoments:
        r"""The noise of batches from n examples.

        sampling="bernoulli": every example is in the batch with probability B / n, independently of the others, and the
        sum over the batch is divided by B whatever its size; c = (n/B − 1) / n², p = 0. "without_replacement": exactly
        B of them; p = (n − B) / (B (n − 1)), c = p / n.

        Raises:
            ValueError: unknown sampling; a batch size out of (0, n], or without replacement no whole number.

        Source: Dexter et al., A Precise Characterization of SGD Stability Using Loss Surface Geometry, 2024;
        without replacement: Mulayoff and Michaeli, Exact Mean Square Linear Stability Analysis for SGD, 2024.
        """
        n, b = num_examples, batch_size
        if sampling not in SAMPLINGS:
            raise ValueError(
                f"`sampling` is {sampling!r}; choose among {SAMPLINGS} (near: {near_names(str(sampling), SAMPLINGS)})"
            )
        if not (is_number(b) and 0 < b <= n):
            raise ValueError(f"`batch_size` is {b!r}; give a number in (0, {n}] for {n} examples")
        if sampling == "bernoulli":
            return cls((n / b - 1) / n**2, 0.0)
        if b != int(b):
            raise ValueError(
                f"`batch_size` is {b}; batches without replacement have a whole number of examples: round it, or take "
                "sampling='bernoulli'"
            )
        centre = (n - b) / (b * (n - 1)) if n > 1 else 0.0
        return cls(centre / n, centre)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
