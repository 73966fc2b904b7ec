"""A number that was estimated, with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class NotConvergedWarning(UserWarning):
    """The budget ended before the tolerance was met; the result holds the best answer found and its error."""


@dataclass(frozen=True)
class Estimate:
    """`estimate` ± `stderr`, the standard error of the mean of `samples` [num_samples].

    An exact value has `stderr` 0. `float()` gives the estimate.
    """

    estimate: float
    stderr: float
    samples: Tensor
    products: int = 0
    converged: bool = True

    @classmethod
    def from_samples(cls, samples: Tensor, *, products: int = 0, converged: bool = True) -> Estimate:
        """Mean and s/√m of independent samples; one sample alone has an infinite standard error."""
        samples = samples.double().cpu()
        m = samples.numel()
        stderr = float(samples.std(unbiased=True)) / math.sqrt(m) if m > 1 else math.inf
        return cls(float(samples.mean()), stderr, samples, products, converged)

    @classmethod
    def exact(cls, value: float, *, products: int = 0) -> Estimate:
        return cls(value, 0.0, torch.tensor([value], dtype=torch.float64), products)

    def __float__(self) -> float:
        return self.estimate

    def __str__(self) -> str:
        return f"{self.estimate:.6g} ± {self.stderr:.2g}"
