"""The gradient noise scale from single examples, with its error and interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .intervals import ratio_interval, student_quantile

Number = TypeVar("Number", float, Tensor)
# Sums of more terms are formed in blocks, whose errors hardly add up.
BLOCK_OF_TERMS = 1024


def moment_rounding(eps: float, num: int) -> float:
    """Relative error that may stand in a second moment over `num` examples at machine epsilon `eps`.

    That of a sum of positive terms, half an epsilon for each, and at least that of the terms. Examples that are all
    alike come near it: their errors have one sign.

    Source: Higham, The Accuracy of Floating Point Summation, 1993, section 2.
    """
    return eps * max(8.0, min(num, BLOCK_OF_TERMS) / 2)


@dataclass(frozen=True)
class NoiseScale:
    """A noise scale in examples, `trace` / `squared_norm`.

    Attributes:
        estimate: Infinite where `squared_norm` is not positive.
        stderr: Of the jackknife over examples; NaN where it was not estimated, or is infinite without some example.
        trace: tr Σ of single examples' gradients, at least 0, or tr HΣ.
        squared_norm: |G|² of the true gradient, or GᵀHG; unbiased, so it may be negative.
        low, high: Interval for the true ratio, no narrower than rounding; `high` is infinite where |G|² is not told
            from 0.
        confidence: Probability with which it covers the true ratio.
    """

    estimate: float
    stderr: float
    trace: float
    squared_norm: float
    low: float = math.nan
    high: float = math.nan
    confidence: float = 0.95

    def __float__(self) -> float:
        return self.estimate

    def __str__(self) -> str:
        return f"{self.estimate:.6g} ± {self.stderr:.2g} [{self.low:.4g}, {self.high:.4g}]"


def noise_scale_of(
    weights: Tensor,
    squares: Tensor,
    length: float,
    along: Tensor | None,
    confidence: float,
    *,
    eps: float = torch.finfo(torch.float64).eps,
    definite: bool = True,
) -> NoiseScale:
    r"""From w_i [N], g_i · g_i [N], ḡ · ḡ and, for the error, g_i · ḡ [N]; or the same with H between them.

    With p_i = w_i / Σ w: tr Σ = (Σ p_i g_i · g_i − ḡ · ḡ) / (1 − Σ p_i²) and |G|² = ḡ · ḡ − Σ p_i² tr Σ, both
    unbiased. Leaving out example i changes the three sums in closed form, which gives the jackknife's covariance C of
    the two, and with it the interval of their ratio (`ratio_interval`). Where |G|² is hardly told from 0, C₂₂ is up to
    twice too large and the interval too wide.

    The interval is never narrower than the rounding of tr Σ, and holds the estimate. A negative tr Σ is taken as 0: it
    can be rounding only, unless an indefinite H (`definite` False) stands between the gradients.

    Args:
        eps: Machine epsilon of what the numbers were computed in.
        definite: Whether products of a gradient with itself cannot be negative.

    Source: Efron, Stein, The Jackknife Estimate of Variance, 1981.
    """
    p = weights / weights.sum()
    mean_square, concentration = float(p @ squares), float(p @ p)
    trace, squared_norm = _unbiased(mean_square, length, concentration)
    num = len(p)
    rounding = moment_rounding(eps, num) * float(p @ squares.abs()) / (1 - concentration)
    if definite or trace >= -rounding:
        trace = max(trace, 0.0)
    estimate = trace / squared_norm if squared_norm > 0 else math.inf
    if along is None or num < 3:
        return NoiseScale(estimate, math.nan, trace, squared_norm, confidence=confidence)
    left = 1 - p
    without = (
        (mean_square - p * squares) / left,
        (length - 2 * p * along + p.square() * squares) / left.square(),
        (concentration - p.square()) / left.square(),
    )
    pair = torch.stack(_unbiased(*without))
    ratios = torch.where(pair[1] > 0, pair[0] / pair[1], math.inf)
    C = (num - 1) * torch.cov(pair, correction=0)
    of_trace, of_norm, both = float(C[0, 0]), float(C[1, 1]), float(C[0, 1])
    quantile = student_quantile(num - 1, confidence)
    low, high = ratio_interval(trace, squared_norm, of_trace, of_norm, both, quantile)
    if squared_norm > 0:
        low = min(low, max(trace - rounding, min(trace, 0.0)) / squared_norm)
        high = max(high, (trace + rounding) / squared_norm)
    return NoiseScale(estimate, jackknife(ratios), trace, squared_norm, low, high, confidence)


def jackknife(without: Tensor) -> float:
    """Standard error from the estimates without each of N examples [N]; NaN where one of them is not finite."""
    return math.sqrt((len(without) - 1) * float((without - without.mean()).square().mean()))


def _unbiased(mean_square: Number, length: Number, concentration: Number) -> tuple[Number, Number]:
    """tr Σ and |G|² from Σ p_i ‖g_i‖², ‖ḡ‖² and Σ p_i²."""
    trace = (mean_square - length) / (1 - concentration)
    return trace, length - concentration * trace
