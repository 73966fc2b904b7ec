"""The curvature at which an update rule stops being stable."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from .adapters import known_geometry
from .base import BaseOptimizer
from .wrapper import Wrapper


def stability_threshold_of(optimizer: Optimizer) -> float | None:
    r"""Largest eigenvalue of P⁻¹ H at which the optimizer's next step θ ← θ − η P⁻¹ m is stable on a quadratic.

    For torch.optim.SGD, where P is the identity, it is a Hessian eigenvalue, in units of the sharpness. On the
    eigenvector with eigenvalue h the gradient that the rule sees is a·x with a = h + λ (λ: `weight_decay`). The
    iteration x_t is a linear recurrence, stable when the roots of its characteristic polynomial lie inside the unit
    circle, which is so for 0 < a < a*; the threshold is a* − λ. With learning rate η, momentum μ and dampening τ:

    - gradient descent, x ← x − η a x: z = 1 − η a, so a* = 2/η;
    - heavy ball, b ← μ b + (1 − τ) a x, x ← x − η b: z² − (1 + μ − η (1 − τ) a) z + μ = 0,
      so a* = 2 (1 + μ) / (η (1 − τ));
    - Nesterov, b ← μ b + a x, x ← x − η (a x + μ b): z² − (1 + μ)(1 − η a) z + μ (1 − η a) = 0,
      so a* = 2 (1 + μ) / (η (1 + 2μ)).

    For others it is a preconditioned eigenvalue, of P⁻¹ (H + λ I) where weight decay is part of the gradient: the P of
    `preconditioner_of`, held fixed, has the bias correction of the momentum in it. So Adam and AdamW with β₁ and
    decoupled weight decay λ have (2 − η λ)(1 + β₁) / ((1 − β₁) η), 38/η by default; RMSprop 2 (1 + μ)/η. See
    `threshold_of_group` of each optimizer here, and `adapted` for others.

    The learning rate is read now: under a schedule the answer is that of this step.

    Returns:
        The threshold, or None where there is no single one: an optimizer that is not known and has no
        `stability_threshold()` method of its own; steps that keep their length, as those of sign methods and Muon;
        LBFGS; parameter groups with different thresholds; a learning rate of zero; maximization, μ >= 1 or τ >= 1,
        for which no threshold exists.

    Source: for gradient descent and both momenta Cohen et al., Gradient Descent on Neural Networks Typically Occurs
    at the Edge of Stability, 2021, section 2 and appendix B; for preconditioned ones Cohen et al., Adaptive Gradient
    Methods at the Edge of Stability, 2022, section 2; dampening and weight decay from the polynomials above. The
    conditions on a second-order polynomial are Jury's: z² + p z + q is stable when |q| < 1 and |p| < 1 + q.
    """
    own: Any = optimizer
    if not isinstance(optimizer, BaseOptimizer) and hasattr(optimizer, "stability_threshold"):
        return own.stability_threshold()
    geometry = known_geometry(optimizer)
    if geometry is None:
        return None
    plain = steps_along_gradient(optimizer)
    thresholds = set()
    for group in optimizer.param_groups:
        threshold = geometry.threshold_of_group(group)
        if threshold is not None and plain:
            threshold -= geometry.coupled_weight_decay(group)
        thresholds.add(threshold)
    return thresholds.pop() if len(thresholds) == 1 else None


def sharpness_threshold_of(optimizer: Optimizer) -> float | None:
    """`stability_threshold_of` where it is a threshold of the sharpness λ_max(H) itself, P being the identity.

    None for preconditioned steps, whose threshold lies in their own geometry.
    """
    return stability_threshold_of(optimizer) if steps_along_gradient(optimizer) else None


def steps_along_gradient(optimizer: Optimizer) -> bool:
    """Whether P is the identity; an optimizer of which nothing is known but its threshold has it for the sharpness."""
    rule: Any = type(optimizer)
    if isinstance(optimizer, Wrapper):
        return rule.preconditioner is Wrapper.preconditioner and steps_along_gradient(optimizer.base)
    if isinstance(optimizer, BaseOptimizer):
        return rule.preconditioner is BaseOptimizer.preconditioner
    return rule is torch.optim.SGD or (hasattr(rule, "stability_threshold") and not hasattr(rule, "preconditioner"))
