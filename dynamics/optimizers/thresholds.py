"""The sharpness at which an update rule stops being stable."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


def stability_threshold_of(optimizer: Optimizer) -> float | None:
    r"""Largest Hessian eigenvalue at which the optimizer's next step is stable on a quadratic.

    On the eigenvector with eigenvalue h the gradient that the rule sees is a·x with a = h + λ (λ: `weight_decay`).
    The iteration x_t is a linear recurrence, stable when the roots of its characteristic polynomial lie inside the
    unit circle, which is so for 0 < a < a*; the threshold is a* − λ. For torch.optim.SGD with learning rate η,
    momentum μ and dampening τ:

    - gradient descent, x ← x − η a x: z = 1 − η a, so a* = 2/η;
    - heavy ball, b ← μ b + (1 − τ) a x, x ← x − η b: z² − (1 + μ − η (1 − τ) a) z + μ = 0,
      so a* = 2 (1 + μ) / (η (1 − τ));
    - Nesterov, b ← μ b + a x, x ← x − η (a x + μ b): z² − (1 + μ)(1 − η a) z + μ (1 − η a) = 0,
      so a* = 2 (1 + μ) / (η (1 + 2μ)).

    The learning rate is read now: under a schedule the answer is that of this step.

    Returns:
        The threshold in units of the sharpness, or None where there is no single one: an optimizer other than
        torch.optim.SGD itself without a `stability_threshold()` method of its own; parameter groups with different
        thresholds; a learning rate of zero; maximization, μ >= 1 or τ >= 1, for which no threshold exists.

    Source: for gradient descent and both momenta Cohen et al., Gradient Descent on Neural Networks Typically Occurs
    at the Edge of Stability, 2021, section 2 and appendix B; dampening and weight decay from the polynomials above.
    The conditions on a second-order polynomial are Jury's: z² + p z + q is stable when |q| < 1 and |p| < 1 + q.
    """
    if hasattr(optimizer, "stability_threshold"):
        own: Any = optimizer
        return own.stability_threshold()
    # A subclass may have another update rule under the same options.
    if type(optimizer) is not torch.optim.SGD:
        return None
    thresholds = {_sgd_threshold(group) for group in optimizer.param_groups}
    return thresholds.pop() if len(thresholds) == 1 else None


def _sgd_threshold(group: dict[str, Any]) -> float | None:
    lr, momentum, weight_decay = (float(group[option]) for option in ("lr", "momentum", "weight_decay"))
    if group["maximize"] or lr == 0 or momentum >= 1:
        return None
    if momentum == 0:  # torch then ignores dampening and nesterov
        limit = 2 / lr
    elif group["nesterov"]:  # torch then insists on zero dampening
        limit = 2 * (1 + momentum) / (lr * (1 + 2 * momentum))
    else:
        dampening = float(group["dampening"])
        if dampening >= 1:
            return None
        limit = 2 * (1 + momentum) / (lr * (1 - dampening))
    return limit - weight_decay
