"""What the gradients of single examples tell: their scatter, signal against noise, the gradient noise scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, overload

import torch
from torch import Tensor

from .layout import Layout
from .selection import near_names

SNR_KINDS = ("element", "parameter", "whole")


@dataclass(frozen=True)
class NoiseScale:
    """`estimate` = `trace` / `squared_norm`, in examples; `stderr` is NaN where it was not estimated."""

    estimate: float
    stderr: float
    trace: float  # of the covariance of single examples' gradients
    squared_norm: float  # of the true gradient, unbiased: it may be negative

    def __float__(self) -> float:
        return self.estimate

    def __str__(self) -> str:
        return f"{self.estimate:.6g} ± {self.stderr:.2g}"


@dataclass(frozen=True)
class PerExampleStatistics:
    r"""Sums over the gradients g_i of N examples with weights w_i; made by `per_example_statistics`.

    Attributes:
        mean: Σ w_i g_i [n], the gradient of the objective.
        second_moment: Σ w_i g_i² [n], the diagonal of the empirical Fisher matrix.
        norms: ‖g_i‖ [N], in the order of the data; of all ranks.
        weights: w_i [N], float64; their sum is 1 for a mean.
        layout: Names and shapes behind [n].
        method: What computed them.
        gradients: g_i [N, n] when asked for, else None; this rank's.
    """

    mean: Tensor
    second_moment: Tensor
    norms: Tensor
    weights: Tensor
    layout: Layout
    method: str
    gradients: Tensor | None = field(default=None, repr=False)

    @property
    def num_examples(self) -> int:
        return len(self.norms)

    def variance(self) -> Tensor:
        r"""Unbiased variance of a single example's gradient, entry by entry [n].

        (Σ p_i g_i² − ḡ²) / (1 − Σ p_i²) with p_i = w_i / Σ w and ḡ = Σ p_i g_i; for equal weights the sum of squares
        over N − 1. Differences below the rounding of Σ p_i g_i² are not resolved.

        Raises:
            ValueError: there is only one example.
        """
        total = float(self.weights.sum())
        variance = self.second_moment / total - (self.mean / total).square_()
        return variance.clamp_(min=0).div_(1 - self._concentration())

    @overload
    def snr(self, by: Literal["element"]) -> Tensor: ...
    @overload
    def snr(self, by: Literal["parameter"]) -> dict[str, float]: ...
    @overload
    def snr(self, by: Literal["whole"] = ...) -> float: ...

    def snr(self, by: str = "whole") -> Tensor | dict[str, float] | float:
        r"""Gradient signal-to-noise ratio ḡ² / Var g of single examples, with the unbiased variance.

        by="element": entry by entry [n]. "parameter": Σ ḡ² / Σ Var g over each parameter's entries, by name. "whole":
        the same over all entries. For the mean of B independent examples it is B times as large. Where ḡ is 0 it is 0.

        Raises:
            ValueError: unknown `by`; there is only one example.
        """
        if by not in SNR_KINDS:
            raise ValueError(f"`by` is {by!r}; choose among {SNR_KINDS} (near: {near_names(str(by), SNR_KINDS)})")
        signal = (self.mean / float(self.weights.sum())).square_()
        noise = self.variance()
        if by == "element":
            return torch.where(signal > 0, signal / noise, 0.0)
        if by == "whole":
            return _ratio(_total(signal), _total(noise))
        parts = zip(self.layout.unflatten(signal).items(), self.layout.unflatten(noise).values(), strict=True)
        return {name: _ratio(_total(s), _total(v)) for (name, s), v in parts}

    def noise_scale(self) -> NoiseScale:
        r"""Simple gradient noise scale tr Σ / |G|², in examples: the batch size at which noise and signal are equal.

        Σ is the covariance of single examples' gradients, G the true gradient; both are estimated without bias,
        |G|² = ‖ḡ‖² − Σ_i p_i² tr Σ. Infinite where that is not positive: there are too few examples to tell the
        gradient from 0. The standard error is the jackknife's over examples, which needs `gradients`
        (`per_example_gradients=True`); without them it is NaN.

        Raises:
            ValueError: there is only one example.

        Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, equation 2.9 and appendix A.1.
        """
        p = self.weights / self.weights.sum()
        squares = self.norms.double().cpu().square()
        mean = self.mean.double() / self.weights.sum().to(self.mean.device)
        length = _total(mean.square())
        trace, squared_norm = _unbiased(float(p @ squares), length, self._concentration())
        stderr = math.nan
        if self.gradients is not None and len(self.gradients) == self.num_examples > 2:
            along = torch.stack([(row.double() @ mean).cpu() for row in self.gradients])
            stderr = _jackknife(p, squares, along, length)
        return NoiseScale(_scale(trace, squared_norm), stderr, trace, squared_norm)

    def _concentration(self) -> float:
        """Σ p_i²."""
        if self.num_examples < 2:
            raise ValueError("the scatter of gradients needs at least two examples; there is one")
        return float((self.weights / self.weights.sum()).square().sum())


def _unbiased(mean_square: float, length: float, concentration: float) -> tuple[float, float]:
    """tr Σ and |G|² from Σ p_i ‖g_i‖², ‖ḡ‖² and Σ p_i²."""
    trace = (mean_square - length) / (1 - concentration)
    return trace, length - concentration * trace


def _scale(trace: float, squared_norm: float) -> float:
    return trace / squared_norm if squared_norm > 0 else math.inf


def _jackknife(p: Tensor, squares: Tensor, along: Tensor, length: float) -> float:
    """Standard error from the estimates without each example; `along` is g_i · ḡ [N]."""
    scales = []
    for own, square, inner in zip(p.tolist(), squares.tolist(), along.tolist(), strict=True):
        left = 1 - own
        mean_square = (float(p @ squares) - own * square) / left
        without = (length - 2 * own * inner + own**2 * square) / left**2
        concentration = (float(p @ p) - own**2) / left**2
        scales.append(_scale(*_unbiased(mean_square, without, concentration)))
    found = torch.tensor(scales, dtype=torch.float64)
    return math.sqrt((len(p) - 1) / len(p) * float((found - found.mean()).square().sum()))


def _total(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))


def _ratio(signal: float, noise: float) -> float:
    if noise > 0:
        return signal / noise
    return math.inf if signal > 0 else 0.0
