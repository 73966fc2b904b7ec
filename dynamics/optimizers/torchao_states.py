"""The geometry of torchao's low-bit Adam: their second moments, decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Group
from .recurrences import average_threshold
from .torch_adam import AdamGeometry

MODULE = "torchao.optim.adam"


def adapt(optimizer: Optimizer) -> TorchaoGeometry | None:
    """What a torchao optimizer does to a gradient; None for classes other than its Adam and AdamW (4, 8, fp8 bits)."""
    known = type(optimizer).__module__ == MODULE and hasattr(optimizer, "is_adamw")
    return TorchaoGeometry(optimizer) if known else None


def second_moment(optimizer: Optimizer, p: Tensor, name: str = "exp_avg_sq") -> Tensor:
    """The moment that torchao keeps of p, decoded, float32 [*p.shape].

    Raises:
        KeyError: there is none of that name, as before the first step.
    """
    kept = optimizer.state.get(p, {})[name]
    # A tensor too small for codes is kept as it is; every torch.Tensor has a method `dequantize`.
    low_bit = hasattr(kept, "__tensor_flatten__")
    return (kept.dequantize(torch.float32) if low_bit else kept.float()).view(p.shape)


class TorchaoGeometry(AdamGeometry):
    """P = (1 − β₁ᵗ)(√(v / (1 − β₂ᵗ)) + ε) with v as it is kept: the step itself divides by the v before encoding.

    Weight decay is decoupled in AdamW, part of the gradient in Adam.
    """

    def state_of(self, p: Tensor) -> dict[str, Any]:
        state = dict(super().state_of(p))
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            if name in state:
                state[name] = second_moment(self.optimizer, p, name)
        return state

    def threshold_of_group(self, group: Group) -> float | None:
        decay = float(group["weight_decay"]) if self._is_decoupled() else 0.0
        return average_threshold(float(group["lr"]), float(group["betas"][0]), decay)

    def coupled_weight_decay(self, group: Group) -> float:
        return 0.0 if self._is_decoupled() else float(group["weight_decay"])

    def _is_decoupled(self) -> bool:
        return bool(getattr(self.optimizer, "is_adamw"))  # noqa: B009
