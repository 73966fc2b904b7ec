"""When a step with momentum is stable on a quadratic."""

from __future__ import annotations


def recurrence_threshold(
    lr: float,
    *,
    beta: float = 0.0,
    gain: float = 1.0,
    along_gradient: float = 0.0,
    along_momentum: float = 1.0,
    weight_decay: float = 0.0,
) -> float | None:
    r"""Largest h at which m ← β m + κ h x, x ← (1 − η λ) x − η (c_g h x + c_m m) is stable.

    With d = 1 − η λ and a = η h the characteristic polynomial is
    z² − (d + β − a (c_g + c_m κ)) z + β (d − a c_g). Jury: z² + p z + q is stable when |q| < 1 and |p| < 1 + q. The
    root that leaves the unit circle first as a grows does so at z = −1, where
    a (c_g (1 + β) + c_m κ) = (1 + β) (1 + d), so h* = (1 + β) (2 − η λ) / (η (c_g (1 + β) + c_m κ)).

    Args:
        lr: η.
        beta: β of the momentum.
        gain: κ, what the momentum takes in of a gradient: 1 − β for an average, 1 for heavy ball.
        along_gradient, along_momentum: c_g and c_m. A plain gradient step has (1, 0), heavy ball (0, 1), Nesterov's
            form of heavy ball (1, β).
        weight_decay: λ, decoupled; what is added to the gradient instead belongs to h.

    Returns:
        h*, or None where no step is stable: η = 0, β >= 1, η λ >= 2, or a step that is not downhill.

    Source: Jury, Theory and Application of the z-Transform Method, 1964; 2/η, 2 (1 + β)/η and 2 (1 + β)/((1 − β) η)
    are in Cohen et al. 2021, section 2, and Cohen et al. 2022, section 2.
    """
    slope = along_gradient * (1 + beta) + along_momentum * gain
    if lr <= 0 or not 0 <= beta < 1 or lr * weight_decay >= 2 or slope <= 0:
        return None
    return (1 + beta) * (2 - lr * weight_decay) / slope / lr


def average_threshold(lr: float, beta: float, weight_decay: float = 0.0) -> float | None:
    """`recurrence_threshold` of a momentum that is an average, as in Adam: (2 − η λ)(1 + β) / ((1 − β) η)."""
    return recurrence_threshold(lr, beta=beta, gain=1 - beta, weight_decay=weight_decay)
