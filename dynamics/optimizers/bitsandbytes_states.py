"""The geometry of bitsandbytes' Adam and AdamW: their second moments, decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Group
from .recurrences import average_threshold
from .torch_adam import AdamGeometry

# Entries that share a scale.
BLOCK = 256


def adapt(optimizer: Optimizer) -> BitsandbytesGeometry | None:
    """What a bitsandbytes Adam or AdamW does to a gradient, in 8 or 32 bits, paged or not; None for other rules and for
    updates clipped by `max_unorm`."""
    adam = getattr(optimizer, "optimizer_name", None) == "adam"
    clipped = getattr(getattr(optimizer, "args", None), "max_unorm", 0.0) > 0
    return BitsandbytesGeometry(optimizer) if adam and not clipped else None


def second_moment(optimizer: Optimizer, p: Tensor) -> Tensor:
    """The second moment that bitsandbytes keeps of p, decoded, float32 [*p.shape].

    Raises:
        KeyError: there is none, as before the first step.
    """
    state = optimizer.state.get(p, {})
    kept = state["state2"]
    if kept.dtype != torch.uint8:
        return kept.float().view(p.shape)
    values = state["qmap2"].to(kept.device)[kept.reshape(-1).long()]
    scales = state["absmax2"].repeat_interleave(BLOCK)[: len(values)]
    return (values * scales).view(p.shape)


class BitsandbytesGeometry(AdamGeometry):
    """P = (1 − β₁ᵗ)(√(v / (1 − β₂ᵗ)) + ε) with v as it is kept: the step itself divides by the v before encoding.

    Weight decay is decoupled from the gradient in its Adam, too. Settings of single parameters that were made with its
    `GlobalOptimManager` are not read.
    """

    def state_of(self, p: Tensor) -> dict[str, Any]:
        state = super().state_of(p)
        return {"step": state["step"], "exp_avg_sq": second_moment(self.optimizer, p)} if "state2" in state else {}

    def threshold_of_group(self, group: Group) -> float | None:
        return average_threshold(float(group["lr"]), float(group["betas"][0]), float(group["weight_decay"]))

    def coupled_weight_decay(self, group: Group) -> float:
        return 0.0
