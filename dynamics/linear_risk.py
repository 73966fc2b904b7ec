"""The exact risk of SGD and accelerated SGD on Gaussian least squares, in each eigendirection of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .optimizers.option_checks import check_number

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinearRisk:
    """Excess risk ½ E (w − w*)ᵀ H (w − w*) of the output along a run, that of the loss ½ (w·x − y)².

    Attributes:
        eigenvalues: λ of H = E xxᵀ, [d], in the order given.
        bias: ½ λ_k E (w_k − w*_k)² due to the initial error, [steps + 1, d], with the gradient noise that it causes.
        variance: What is due to the noise of the labels, [steps + 1, d].
    """

    eigenvalues: Array
    bias: Array
    variance: Array

    @property
    def risk(self) -> Array:
        """Of all directions together, [steps + 1]."""
        return (self.bias + self.variance).sum(1)


@dataclass(frozen=True)
class SampledRisk:
    """Mean over simulated runs of ½ λ_k (w_k − w*_k)².

    Attributes:
        directions: [d].
        risk: Their sum.
        error: Standard error of `risk`.
        runs: How many.
    """

    directions: Array
    risk: float
    error: float
    runs: int


def linear_risk(
    eigenvalues: ArrayLike,
    initial_error: ArrayLike,
    noise_variance: float,
    steps: int,
    *,
    lr: float,
    gamma: float | None = None,
    beta: float = 0.0,
    alpha: float | None = None,
    batch_size: int = 1,
    average_from: int | None = None,
) -> LinearRisk:
    r"""The risk of `AcceleratedSGD` with these options on y = w*·x + ε, after 0, 1, ..., `steps` fresh batches.

    In the eigenbasis of H let P_k be the second moment of (w_k − w*_k, v_k − w*_k), e_k that of the point y of the
    gradient, A_k the mean map and p = (δ, γ). For x ~ N(0, H), whose E[xxᵀ M xxᵀ] = 2 HMH + tr(HM) H, the P_k close:

        P_k <- A_k P_k A_kᵀ + (λ_k² e_k + λ_k Σ_j λ_j e_j + σ² λ_k) / B · p pᵀ

    This is affine in P, so that bias and variance add up exactly. The average over w_s..w_t needs E[w_i w_j] between
    times in addition, for which E[u_{t+1} | u_t] = A u_t suffices.

    Args:
        eigenvalues: λ_k >= 0, [d].
        initial_error: w_0 − w* in the eigenbasis, [d]; w_0 = v_0.
        noise_variance: σ² of ε, independent of x.
        steps: At least 0.
        lr: δ.
        gamma: γ; None for δ, which is SGD.
        beta: β.
        alpha: α; None for 1 / (1 + β).
        batch_size: B examples a step.
        average_from: s >= 1 for the mean of w_s, ..., w_t as the output of step t >= s, and w_t before; None for w_t.

    Returns:
        `LinearRisk`; huge, infinite or NaN where the second moments diverge, see `second_moment_radius`.

    Raises:
        ValueError: shapes disagree, or a value is outside its range.

    Source: derived here from the update of Jain et al. 2018, algorithm 1, and the moments of a normal x; Li, Deng, Wu,
    Zhou, Gu, Risk Bounds of Accelerated SGD for Overparameterized Linear Regression, 2024, bound the same quantity.
    """
    spectrum, error = _spectrum(eigenvalues), np.asarray(initial_error, dtype=np.float64)
    if error.shape != spectrum.shape or not np.isfinite(error).all():
        raise ValueError(f"`initial_error` has shape {error.shape} for {len(spectrum)} eigenvalues; give finite [d]")
    check_number("noise_variance", noise_variance, least=0)
    _check_count("steps", steps, 0)
    if average_from is not None:
        _check_count("average_from", average_from, 1)
    rule = _Rule(spectrum, lr, gamma, beta, alpha, batch_size)
    moments = np.zeros((2, len(spectrum), 2, 2))  # bias and variance
    moments[0] = (error**2)[:, None, None]
    noise = np.array([0.0, noise_variance])
    outputs = [moments[:, :, 0, 0]]
    total, with_total = np.zeros((2, len(spectrum))), np.zeros((2, len(spectrum), 2))  # E S², E u S; S = Σ w
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, steps + 1):
            moments = rule.step(moments, noise)
            if average_from is None or step < average_from:
                outputs.append(moments[:, :, 0, 0])
                continue
            ahead = np.einsum("kij,ckj->cki", rule.mean, with_total)
            total = total + 2 * ahead[:, :, 0] + moments[:, :, 0, 0]
            with_total = ahead + moments[:, :, :, 0]
            outputs.append(total / (step - average_from + 1) ** 2)
        bias, variance = 0.5 * spectrum * np.stack(outputs, axis=1)
    return LinearRisk(spectrum, bias, variance)


def second_moment_radius(
    eigenvalues: ArrayLike,
    *,
    lr: float,
    gamma: float | None = None,
    beta: float = 0.0,
    alpha: float | None = None,
    batch_size: int = 1,
) -> float:
    """Spectral radius of the map of the second moments in `linear_risk`: above 1 the risk diverges.

    The mean may be stable there: gradients of few examples have noise in proportion to the error itself. The arguments
    are those of `linear_risk`. Only what moves w counts: not v where α = 1, nor a v apart from w where γ = δ. Time is
    cubic in the number of eigenvalues.
    """
    spectrum = _spectrum(eigenvalues)
    rule, num = _Rule(spectrum, lr, gamma, beta, alpha, batch_size), len(spectrum)
    index = np.arange(num)
    if rule.alpha == 1 or rule.gamma == rule.delta:  # SGD: v is not heard, or is w
        basis = np.zeros((num, num, 2, 2))
        basis[index, index] = 1
        matrix = rule.step(basis, np.zeros(num))[:, :, 0, 0]
    else:
        basis = np.zeros((3 * num, num, 2, 2))
        basis[index, index, 0, 0] = basis[num + index, index, 1, 1] = 1
        basis[2 * num + index, index, 0, 1] = basis[2 * num + index, index, 1, 0] = 1
        images = rule.step(basis, np.zeros(3 * num))
        matrix = np.concatenate([images[:, :, 0, 0], images[:, :, 1, 1], images[:, :, 0, 1]], axis=1)
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def sampled_linear_risk(
    eigenvalues: ArrayLike,
    initial_error: ArrayLike,
    noise_variance: float,
    steps: int,
    *,
    runs: int,
    seed: int,
    lr: float,
    gamma: float | None = None,
    beta: float = 0.0,
    alpha: float | None = None,
    average_from: int | None = None,
) -> SampledRisk:
    """Simulates what `linear_risk` computes, one normal example a step; the risk of the output after `steps`.

    Args:
        runs: Independent ones.
        seed: Of the examples.

    The others are those of `linear_risk`.
    """
    spectrum, error = _spectrum(eigenvalues), np.asarray(initial_error, dtype=np.float64)
    _check_count("runs", runs, 2)
    rule = _Rule(spectrum, lr, gamma, beta, alpha, 1)
    random = np.random.default_rng(seed)
    w, v = np.tile(error, (runs, 1)), np.tile(error, (runs, 1))
    total, count = np.zeros_like(w), 0
    for step in range(1, steps + 1):
        y = rule.alpha * w + (1 - rule.alpha) * v
        x = random.standard_normal(w.shape) * np.sqrt(spectrum)
        residual = (x * y).sum(1) - math.sqrt(noise_variance) * random.standard_normal(runs)
        gradient = residual[:, None] * x
        w, v = y - rule.delta * gradient, rule.beta * y + (1 - rule.beta) * v - rule.gamma * gradient
        if average_from is not None and step >= average_from:
            total, count = total + w, count + 1
    directions = 0.5 * spectrum * (total / count if count else w) ** 2
    risks = directions.sum(1)
    return SampledRisk(directions.mean(0), float(risks.mean()), float(risks.std(ddof=1)) / math.sqrt(runs), runs)


class _Rule:
    """One step of the second moments of (w, v); `mean` [d, 2, 2] is that of the means."""

    def __init__(
        self,
        spectrum: Array,
        lr: float,
        gamma: float | None,
        beta: float,
        alpha: float | None,
        batch_size: int,
    ) -> None:
        check_number("lr", lr, least=0)
        check_number("beta", beta, least=0, most=1)
        self.delta, self.gamma = float(lr), float(lr) if gamma is None else float(gamma)
        self.beta, self.alpha = float(beta), 1 / (1 + beta) if alpha is None else float(alpha)
        check_number("gamma", self.gamma, least=0)
        check_number("alpha", self.alpha, above=0, most=1)
        _check_count("batch_size", batch_size, 1)
        self._spectrum, self._batch_size = spectrum, batch_size
        self._to_y, self._pull = np.array([self.alpha, 1 - self.alpha]), np.array([self.delta, self.gamma])
        still = np.array([self._to_y, self.beta * self._to_y + [0, 1 - self.beta]])
        self.mean = still - spectrum[:, None, None] * np.outer(self._pull, self._to_y)

    def step(self, moments: Array, noise: Array) -> Array:
        """[C, d, 2, 2] and σ² [C] -> [C, d, 2, 2]."""
        at_y = np.einsum("i,ckij,j->ck", self._to_y, moments, self._to_y)
        shared = at_y @ self._spectrum + noise
        scatter = self._spectrum * (self._spectrum * at_y + shared[:, None]) / self._batch_size
        return self.mean @ moments @ self.mean.swapaxes(1, 2) + scatter[..., None, None] * np.outer(
            self._pull, self._pull
        )


def _spectrum(eigenvalues: ArrayLike) -> Array:
    spectrum = np.asarray(eigenvalues, dtype=np.float64)
    if spectrum.ndim != 1 or len(spectrum) == 0 or not np.isfinite(spectrum).all() or (spectrum < 0).any():
        raise ValueError("`eigenvalues` must be finite and not negative, [d] with d >= 1: those of E xxᵀ")
    return spectrum


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}")
