"""The curvature that minibatch steps feel along their own gradients."""

from __future__ import annotations

import math

import torch

from ..kernels.accurate import dot
from ..landscape.minibatches import minibatches
from ..landscape.objective import Objective
from .curvature import Hessian
from .estimate import Estimate


def batch_sharpness(objective: Objective, batch_size: int, *, num_batches: int = 32, seed: int = 0) -> Estimate:
    r"""Batch sharpness E_B[∇L_Bᵀ H_B ∇L_B] / E_B ‖∇L_B‖² over minibatches B of `batch_size` examples, H_B = ∇²L_B.

    Minibatch SGD at learning rate η is reported to train where this is about 2/η, as gradient descent does where the
    sharpness is. For the whole data as one batch it is the curvature along the gradient, gᵀHg / gᵀg, and exact.

    Each minibatch costs one gradient and one product with its own Hessian. The ratio of the two means over minibatches
    has the standard error of its linearisation, and a bias of the order 1 / num_batches.

    Args:
        batch_size: Examples of a minibatch, drawn without replacement; at most all.
        num_batches: Minibatches, drawn independently of each other.
        seed: Of their choice.

    Returns:
        In units of loss per squared parameter, with the Rayleigh quotient of each minibatch as `samples`. NaN where
        every gradient is 0.

    Raises:
        ValueError: as `minibatches`.

    Source: Andreyev, Beneventano, Edge of Stochastic Stability: Revisiting the Edge of Stability for SGD, 2024,
    definition of Batch Sharpness.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
    whole = objective._batches is not None and batch_size == objective.num_examples
    num = 1 if whole else num_batches
    bends, squares = torch.zeros(2, num, dtype=torch.float64)
    for i, part in enumerate(minibatches(objective, batch_size, num, seed=seed)):
        hessian = Hessian(part)
        g = hessian.start_vector()
        squares[i] = dot(g, g)
        if squares[i] > 0:
            unit = g / g.norm()  # a tiny gradient would make products of its own size
            bends[i] = squares[i] * dot(unit, hessian @ unit).cpu() / dot(unit, unit).cpu()
    ratio = float(bends.sum() / squares.sum())
    if whole:
        return Estimate.exact(ratio, products=1)
    stderr = float((bends - ratio * squares).std() / squares.mean()) / math.sqrt(num) if num > 1 else math.inf
    return Estimate(ratio, stderr, bends / squares, num)
