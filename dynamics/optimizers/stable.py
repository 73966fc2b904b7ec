r"""Symmetric α-stable random numbers, E exp(i u·ξ) = exp(−‖u‖^α), and what is known of them in closed form.

At α = 2 they are normal with variance 2, at α = 1 Cauchy. Moments exist below the order α only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .option_checks import check_number


def stable(
    shape: torch.Size | tuple[int, ...],
    alpha: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Independent symmetric α-stable numbers, float64.

    sin(αV) / cos(V)^(1/α) · (cos((1−α)V) / E)^((1−α)/α) with V uniform on (−π/2, π/2) and E exponential.

    Args:
        shape: Of the result.
        alpha: Tail index in (0, 2].

    Source: Chambers, Mallows, Stuck, A Method for Simulating Stable Random Variables, 1976, at β = 0.
    """
    check_alpha(alpha)
    V = math.pi * (_uniform(shape, generator, device) - 0.5)
    E = torch.empty(shape, dtype=torch.float64, device=device).exponential_(generator=generator)
    return (
        torch.sin(alpha * V) / torch.cos(V) ** (1 / alpha) * (torch.cos((1 - alpha) * V) / E) ** ((1 - alpha) / alpha)
    )


def positive_stable(
    shape: torch.Size | tuple[int, ...],
    beta: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Independent positive numbers A with E exp(−s A) = exp(−s^β), float64; all 1 at β = 1.

    sin(βU) / sin(U)^(1/β) · (sin((1−β)U) / E)^((1−β)/β) with U uniform on (0, π) and E exponential.

    Args:
        shape: Of the result.
        beta: In (0, 1].

    Source: Kanter, Stable Densities under Change of Scale and Total Variation Inequalities, 1975, section 4.
    """
    check_number("beta", beta, above=0, most=1)
    U = math.pi * _uniform(shape, generator, device)
    E = torch.empty(shape, dtype=torch.float64, device=device).exponential_(generator=generator)
    if beta == 1:
        return torch.ones_like(U)
    return torch.sin(beta * U) / torch.sin(U) ** (1 / beta) * (torch.sin((1 - beta) * U) / E) ** ((1 - beta) / beta)


def isotropic_stable(
    num: int,
    dim: int,
    alpha: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Rotationally invariant α-stable vectors [num, dim], float64: √(2A) G with A positive (α/2)-stable, G normal.

    E exp(i u·ξ) = E exp(−A ‖u‖²) = exp(−‖u‖^α). The entries of one vector are dependent: they are large together.

    Source: Samorodnitsky, Taqqu, Stable Non-Gaussian Random Processes, 1994, section 2.5.
    """
    check_alpha(alpha)
    A = positive_stable((num, 1), alpha / 2, generator=generator, device=device)
    return (2 * A).sqrt() * torch.randn(num, dim, dtype=torch.float64, generator=generator, device=device)


def stable_abs_mean(alpha: float) -> float:
    r"""E|ξ| = (2/π) Γ(1 − 1/α) in one dimension, for 1 < α <= 2; infinite for α <= 1.

    Source: Samorodnitsky, Taqqu, 1994, section 1.2.
    """
    check_alpha(alpha)
    return 2 / math.pi * math.gamma(1 - 1 / alpha) if alpha > 1 else math.inf


def stable_ou_scale(alpha: float, curvature: float, sigma: float = 1.0, lr: float | None = None) -> float:
    r"""Scale s of the stationary law of gradient descent with α-stable noise on a θ²/2: E exp(iuθ) = exp(−(s|u|)^α).

    - the equation dθ = −a θ dt + σ dL: s = σ (α a)^(−1/α);
    - its Euler scheme θ ← (1 − ηa) θ + σ η^(1/α) ξ: s^α = σ^α η / (1 − |1 − ηa|^α).

    At α = 2 the variance is 2 s².

    Args:
        alpha: Tail index in (0, 2].
        curvature: a > 0.
        sigma: Noise level σ >= 0.
        lr: η of the Euler scheme; None for the equation.

    Raises:
        ValueError: η a >= 2, where nothing is stationary.
    """
    check_alpha(alpha)
    check_number("curvature", curvature, above=0)
    check_number("sigma", sigma, least=0)
    if lr is None:
        return sigma * (alpha * curvature) ** (-1 / alpha)
    check_number("lr", lr, above=0)
    contraction = abs(1 - lr * curvature)
    if contraction >= 1:
        raise ValueError(
            f"`lr` is {lr:g} on curvature {curvature:g}; nothing is stationary unless lr < {2 / curvature:g}"
        )
    return sigma * (lr / (1 - contraction**alpha)) ** (1 / alpha)


def check_alpha(alpha: float) -> None:
    check_number("alpha", alpha, above=0, most=2)


def _uniform(shape, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """On (0, 1) without its ends, where the formulas divide 0 by 0."""
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device).clamp_(2.0**-54, 1 - 2.0**-53)
