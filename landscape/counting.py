"""How many terms a batch's mean loss is a mean of: what makes 32 + 32 + 6 examples equal one batch of 70."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Criteria whose mean runs over every element of the target.
ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
ELEMENTWISE_FUNCTIONS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)
# Criteria whose mean runs over the class labels that are not ignored, weighted by class.
LABELLED = (nn.CrossEntropyLoss, nn.NLLLoss)
LABELLED_FUNCTIONS = (F.cross_entropy, F.nll_loss)


def reduction_of(criterion: Any) -> str:
    """ "mean" or "sum", as a criterion declares it.

    Raises:
        ValueError: reduction="none": the loss would not be a scalar.
    """
    reduction = getattr(criterion, "reduction", "mean")
    if reduction == "none":
        raise ValueError("`criterion` has reduction='none' and yields no scalar; use reduction='mean' or 'sum'")
    return "sum" if reduction == "sum" else "mean"


def target_count(criterion: Any, target: Any) -> float | None:
    """Terms behind the mean of a known criterion on `target`, or None for an unknown criterion.

    Cross-entropy: labels other than `ignore_index`, each counted with its class weight. Elementwise losses: elements.
    """
    if not isinstance(target, Tensor):
        return None
    if isinstance(criterion, ELEMENTWISE) or criterion in ELEMENTWISE_FUNCTIONS:
        return float(target.numel())
    if isinstance(criterion, LABELLED) or criterion in LABELLED_FUNCTIONS:
        if target.is_floating_point():  # class probabilities [b, C, ...]
            return float(target.numel() // target.shape[1]) if target.ndim > 1 else 1.0
        kept = target[target != getattr(criterion, "ignore_index", -100)]
        weight = getattr(criterion, "weight", None)
        return float(kept.numel()) if weight is None else float(weight.to(torch.float64)[kept.to(weight.device)].sum())
    return None
