"""How heavy the tails of samples are: the index α of the stable law that they belong to, or of their power law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .intervals import student_quantile
from .selection import near_names

TAIL_METHODS = ("logmoment", "hill")
GROUPS = 16  # independent estimates behind one interval, at most
LEAST_SAMPLES = 16
WORKING_ENTRIES = 1 << 22  # float64 numbers in hand at a time


@dataclass(frozen=True)
class TailIndex:
    """A tail index α with its confidence interval; smaller is heavier.

    Attributes:
        estimate: α̂ of all columns together. Not cut at 2: scatter may lead above it.
        low, high: Ends of the interval; `high` is infinite where 1/α is not told from 0.
        columns: Of each column that varies [d' <= d]; their median is the robust summary where α differs among them.
        confidence: Probability with which the interval covers α, where the samples are of the kind that is assumed.
        method: "logmoment" or "hill".
        size: Terms of a sum (K₁), or largest values (k).
    """

    estimate: float
    low: float
    high: float
    columns: Tensor
    confidence: float
    method: str
    size: int

    @property
    def median(self) -> float:
        """Median of the columns' estimates."""
        return float(self.columns.median())

    def __float__(self) -> float:
        return self.estimate

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def tail_index(
    samples: Tensor,
    *,
    method: str = "logmoment",
    size: int | None = None,
    confidence: float = 0.95,
    shuffles: int = 8,
    seed: int = 0,
) -> TailIndex:
    r"""Tail index of independent samples, which are first centred at the mean of their middle half.

    method="logmoment" takes them for α-stable and compares sums Y of K₁ samples with single samples X:

        1/α̂ = (mean log|Y| − mean log|X|) / log K₁.

    The samples are dealt into at most 16 groups at random; within each of them sums are formed `shuffles` times, each
    sample with a random sign. The interval is Student's for the mean of the groups' estimates of 1/α. Signs make any
    law symmetric and leave α as it is; without them an error in the centre would grow K₁-fold in Y.

    A law of finite variance reads 2 only if it is normal: 1/α̂ tends to 1/2 as slowly as (E log|σN| − E log|X|) / log K₁
    with N normal, which makes 1.8 of an exponential and 2.15 of a uniform law at K₁ = 200, at any number of samples. A
    value below 2 is no proof of infinite variance.

    method="hill" looks at the k largest of |X_(1)| >= |X_(2)| >= … only:

        α̂ = k / Σ_(i<=k) log(|X_(i)| / |X_(k+1)|),

    with the interval that is exact for a power law beyond |X_(k+1)|, where α Σ is Gamma(k) distributed. A stable law
    with α near 2 reaches its power law so late that this reads far above α.

    Several columns are put together as the mean of their 1/α̂, which no column's scale enters. Columns may depend on
    each other: the groups are groups of rows, and Hill's interval is that of one column, too wide where they do not.

    Args:
        samples: [N] or [N, d], N >= 16 independent rows; for gradient noise one row per example or minibatch, with the
            parameters as columns.
        method: As above.
        size: K₁ >= 2, by default √N; or k, by default N/50 but 10 at least.
        confidence: Of the interval, between 0 and 1.
        shuffles: How often sums are formed anew.
        seed: Of dealing, shuffling and signs.

    Raises:
        ValueError: fewer than 16 rows, entries that are not finite, a `size` or `shuffles` that is no integer or does
            not fit, no column that can be used. A constant one cannot; "logmoment" leaves out those with a sample or a
            sum exactly at the centre too, such as columns that are mostly 0.

    Source: Mohammadi, Mohammadpour, Ogata, On Estimating the Tail Index and the Spectral Measure of Multivariate
    α-Stable Distributions, 2015, corollary 2.4; Hill, A Simple General Approach to Inference About the Tail of a
    Distribution, 1975, section 2. Groups and signs: derived here.
    """
    rows = _checked(samples, method, size, confidence, shuffles)
    estimate = _log_moment if method == "logmoment" else _hill
    return estimate(rows, size, confidence, shuffles, seed)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(samples: Tensor, method: str, size: int | None, confidence: float, shuffles: int) -> Tensor:
    """The samples as [N, d]."""
    if method not in TAIL_METHODS:
        near = near_names(str(method), TAIL_METHODS)
        raise ValueError(f"`method` is {method!r}; choose among {TAIL_METHODS} (near: {near})")
    if not isinstance(samples, Tensor) or samples.ndim not in (1, 2) or samples.numel() == 0:
        shape = list(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"`samples` is {shape}; give a tensor [N] or [N, d] with a row for each sample")
    if len(samples) < LEAST_SAMPLES:
        raise ValueError(f"`samples` has {len(samples)} rows; a tail index needs at least {LEAST_SAMPLES}")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}; give a probability between 0 and 1, such as 0.95")
    if not _is_integer(shuffles) or shuffles < 1:
        raise ValueError(f"`shuffles` is {shuffles!r}; give an integer: sums must be formed at least once")
    if size is not None and not _is_integer(size):
        raise ValueError(f"`size` is {size!r}; give an integer, a number of samples, or None")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("`samples` holds NaN or infinities; leave out what diverged")
    return samples.detach().reshape(len(samples), -1)


def _log_moment(rows: Tensor, size: int | None, confidence: float, shuffles: int, seed: int) -> TailIndex:
    num = len(rows)
    terms = round(math.sqrt(num)) if size is None else size
    if not 2 <= terms <= num // 4:
        raise ValueError(f"`size` is {terms} for {num} samples; sums take from 2 to {num // 4} of them")
    groups = min(GROUPS, num // (2 * terms))
    random = torch.Generator().manual_seed(seed)
    dealt = torch.randperm(num, generator=random)[: num - num % groups].reshape(groups, -1)
    sums = [_signed_sums(dealt, terms, random) for _ in range(shuffles)]
    found = []
    for X in _centred_columns(rows):
        each = X[dealt.to(X.device)].abs().log_().mean(dim=1)  # [groups, d]
        whole = torch.zeros_like(each)
        for members, signs in sums:
            Y = (X[members.to(X.device)] * signs.to(X.device).unsqueeze(-1)).sum(dim=2)  # [groups, sums, d]
            whole += Y.abs_().log_().mean(dim=1) / shuffles
        inverse = (whole - each) / math.log(terms)
        found.append(inverse[:, torch.isfinite(inverse).all(dim=0)].cpu())
    inverse = _together(found)  # [groups, d']
    of_groups = inverse.mean(dim=1)
    mean = float(of_groups.mean())
    half = student_quantile(groups - 1, confidence) * float(of_groups.std()) / math.sqrt(groups)
    low, high = _inverse(mean + half), _inverse(mean - half)
    columns = inverse.mean(dim=0).clamp_(min=0).reciprocal_()
    return TailIndex(_inverse(mean), low, high, columns, confidence, "logmoment", terms)


def _signed_sums(dealt: Tensor, terms: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which samples the sums of each group take, and with which signs [groups, sums, terms]."""
    groups, members = dealt.shape
    order = torch.rand(groups, members, generator=random).argsort(dim=1)[:, : members - members % terms]
    chosen = dealt.gather(1, order).reshape(groups, -1, terms)
    return chosen, 2.0 * torch.randint(0, 2, chosen.shape, generator=random, dtype=torch.float64) - 1


def _hill(rows: Tensor, size: int | None, confidence: float, shuffles: int, seed: int) -> TailIndex:
    from scipy.special import gammaincinv

    num = len(rows)
    largest = max(10, num // 50) if size is None else size
    if not 1 <= largest < num:
        raise ValueError(f"`size` is {largest} for {num} samples; the tail takes from 1 to {num - 1} of them")
    found = []
    for X in _centred_columns(rows):
        top = X.abs_().topk(largest + 1, dim=0).values.log_()
        inverse = (top[:-1] - top[-1]).mean(dim=0, keepdim=True)
        found.append(inverse[:, torch.isfinite(inverse[0]) & (inverse[0] > 0)].cpu())
    inverse = _together(found)  # [1, d']
    mean = float(inverse.mean())
    low, high = (float(gammaincinv(largest, (1 + side * confidence) / 2)) / (largest * mean) for side in (-1, 1))
    return TailIndex(1 / mean, low, high, inverse[0].reciprocal(), confidence, "hill", largest)


def _centred_columns(rows: Tensor) -> Iterator[Tensor]:
    """The columns in float64 about the means of their middle halves, as many at a time as fit the working memory.

    The mean of all samples scatters as widely as they do: at α near 1 one of them decides it.
    """
    quarter, step = len(rows) // 4, max(1, WORKING_ENTRIES // len(rows))
    for first in range(0, rows.shape[1], step):
        X = rows[:, first : first + step].double()
        yield X - X.sort(dim=0).values[quarter : len(rows) - quarter].mean(dim=0)


def _together(found: list[Tensor]) -> Tensor:
    inverse = torch.cat(found, dim=1)
    if inverse.shape[1] == 0:
        raise ValueError(
            "`samples` has no column with a tail: each is constant, or has samples or sums exactly at its centre, "
            "whose logarithm is infinite; give samples that vary, or use method='hill'"
        )
    return inverse


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf
