"""How far the gradients of single examples agree: cosines, diversity, confusion, share of opposed pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .per_example_noise import jackknife
from .per_example_rows import GradientRows

# Examples whose inner products with as many others are in hand at one time.
BLOCK = 512


@dataclass(frozen=True)
class Alignment:
    r"""Agreement between the gradients of examples, over all pairs i ≠ j whose gradients are not zero.

    Standard errors are the jackknife's over examples; NaN for fewer than three.

    Attributes:
        mean_cosine: Mean of g_i · g_j / (‖g_i‖ ‖g_j‖), with `mean_cosine_stderr`, which includes the sketch's part.
        diversity: Σ p_i² ‖g_i‖² / ‖Σ p_i g_i‖² with p_i the example's weight: 1/N where all agree, 1 where they are
            orthogonal, more where they oppose. N times it bounds the useful batch size. With `diversity_stderr`.
        negative_share: Share of the pairs with g_i · g_j < 0, with `negative_share_stderr`.
        confusion: max(0, −min g_i · g_j), the least η with g_i · g_j >= −η for all pairs; an extreme of these examples.
        least_cosine: The least cosine of all pairs.
        num_examples: That have a gradient other than zero.
        cosine_error: Largest standard error of one pair's cosine from the sketch; 0 where inner products are exact.
        undecided_share: Share of the pairs whose inner product lies within two such errors of 0, whose sign is open:
            0 where they are exact, else how far off `negative_share` may be.
        confusion_error: How far off the sketch may put `confusion`, about: its largest error over as many pairs.

    Source: Yin et al., Gradient Diversity: a Key Ingredient for Scalable Distributed Learning, 2018, definition 1;
    Sankararaman et al., The Impact of Neural Network Overparameterization on Gradient Confusion and Stochastic Gradient
    Descent, 2020, definition 2.1.
    """

    mean_cosine: float
    mean_cosine_stderr: float
    diversity: float
    diversity_stderr: float
    negative_share: float
    negative_share_stderr: float
    confusion: float
    least_cosine: float
    num_examples: int
    cosine_error: float
    undecided_share: float
    confusion_error: float


def alignment_of(rows: GradientRows, norms: Tensor, weights: Tensor, length: float | None) -> Alignment:
    """From what was kept of the gradients, ‖g_i‖ and w_i [N], and ‖ḡ‖² where it is known without inner products.

    Raises:
        ValueError: fewer than two gradients are not zero.
    """
    norms, p = norms.double().cpu(), weights.double().cpu() / float(weights.sum())
    there = norms > 0
    num = int(there.sum())
    if num < 2:
        raise ValueError(f"alignment needs at least two examples whose gradient is not zero; there are {num}")
    pairs = num * (num - 1)
    unit = torch.where(there, 1 / norms, 0.0)
    cosines, negative, along = torch.zeros_like(norms), torch.zeros_like(norms), torch.zeros_like(norms)
    least = least_cosine = math.inf
    error, cosine_error, undecided = 0.0, 0.0, 0.0
    for first in range(0, len(norms), BLOCK):
        some = slice(first, first + BLOCK)
        for second in range(0, len(norms), BLOCK):
            others = slice(second, second + BLOCK)
            inner = rows.inner_products(some, others)
            paired = there[some].unsqueeze(1) & there[others]
            if first == second:
                paired.fill_diagonal_(False)
                # Their own lengths are known without a sketch.
                inner.diagonal().copy_(norms[some].square())
            along[some] += inner @ p[others]
            cosine = inner * unit[some].unsqueeze(1) * unit[others]
            cosines[some] += (cosine * paired).sum(1)
            negative[some] += ((inner < 0) & paired).sum(1)
            least = min(least, float(inner.where(paired, math.inf).min()))
            least_cosine = min(least_cosine, float(cosine.where(paired, math.inf).min()))
            if not rows.exact:
                deviation = rows.variances(some, others).sqrt_()
                undecided += float(((inner.abs() < 2 * deviation) & paired).sum())
                error = max(error, float((deviation * paired).max()))
                deviation *= unit[some].unsqueeze(1) * unit[others]
                cosine_error = max(cosine_error, float((deviation * paired).max()))
    mean_cosine, cosine_stderr = _of_pairs(cosines[there], pairs)
    negative_share, negative_stderr = _of_pairs(negative[there], pairs)
    diversity, diversity_stderr = _diversity(p, norms.square(), along, float(p @ along) if length is None else length)
    return Alignment(
        mean_cosine=mean_cosine,
        mean_cosine_stderr=math.hypot(cosine_stderr, rows.pair_sum_error(unit) / pairs),
        diversity=diversity,
        diversity_stderr=diversity_stderr,
        negative_share=negative_share,
        negative_share_stderr=negative_stderr,
        confusion=max(0.0, -least),
        least_cosine=least_cosine,
        num_examples=num,
        cosine_error=cosine_error,
        undecided_share=undecided / pairs,
        confusion_error=error * math.sqrt(2 * math.log(pairs)),
    )


def _of_pairs(sums: Tensor, pairs: int) -> tuple[float, float]:
    """Mean over ordered pairs i ≠ j from Σ_j h_ij [m], with its standard error: leaving out i takes its pairs away."""
    num, total = len(sums), float(sums.sum())
    if num < 3:
        return total / pairs, math.nan
    return total / pairs, jackknife((total - 2 * sums) / ((num - 1) * (num - 2)))


def _diversity(p: Tensor, squares: Tensor, along: Tensor, length: float) -> tuple[float, float]:
    """Σ p_i² ‖g_i‖² / ‖ḡ‖² from ‖g_i‖², g_i · ḡ and ‖ḡ‖²."""
    own = p.square() * squares
    total = float(own.sum())
    if length <= 0:
        return math.inf, math.nan
    if len(p) < 3:
        return total / length, math.nan
    return total / length, jackknife((total - own) / (length - 2 * p * along + own))
