"""Adam and its relatives in torch.optim: a momentum that is an average, divided by a root of averaged squares."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Group
from .recurrences import average_threshold, recurrence_threshold
from .torch_geometry import TorchGeometry, working_dtype


class AdamGeometry(TorchGeometry):
    """P = (1 − β₁ᵗ)(√(v / (1 − β₂ᵗ)) + ε); AMSGrad takes the largest v so far. Adam and AdamW.

    The recurrence of m and θ with P fixed has the threshold (2 − η λ)(1 + β₁) / ((1 − β₁) η), where λ is decoupled
    weight decay, as in AdamW.

    Source: Kingma and Ba, Adam, 2015, algorithm 1; Cohen et al. 2022, section 2, for P and the threshold.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group = self.group_of(p)
        (beta1, beta2), eps, steps = _betas(group), float(group["eps"]), self.steps_of(p, gradient)
        corrected = self._second_moment(p, gradient).sqrt() / (1 - beta2**steps) ** 0.5
        return (1 - beta1**steps) * (corrected + eps)

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return self._second_moment(p, gradient) == 0

    def threshold_of_group(self, group: Group) -> float | None:
        if group["maximize"]:
            return None
        return average_threshold(float(group["lr"]), _betas(group)[0], _decoupled(group))

    def _second_moment(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        group, state = self.group_of(p), self.state_of(p)
        v = self.average_of_squares(p, gradient, "exp_avg_sq", _betas(group)[1])
        if not group.get("amsgrad") or "max_exp_avg_sq" not in state:
            return v
        return torch.maximum(state["max_exp_avg_sq"].to(v.dtype), v)


class NAdamGeometry(AdamGeometry):
    r"""P = √(v / (1 − β₂ᵗ)) + ε, which divides c_g g + c_m m for c_g = (1 − μ_t) / (1 − Π_t) and
    c_m = μ_(t+1) / (1 − Π_(t+1)), with μ_t = β₁ (1 − 0.96^(ψ t) / 2) and their product Π_t.

    With these held fixed the threshold is (1 + β₁)(2 − η λ) / (η (c_g (1 + β₁) + c_m (1 − β₁))), λ being decoupled
    weight decay. It is that of the next step, and moves as the weights do; there is none where the parameters of a
    group have made different numbers of steps.

    Source: Dozat, Incorporating Nesterov Momentum into Adam, 2016, algorithm 8, in the form of torch.optim.NAdam.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group = self.group_of(p)
        corrected = self._second_moment(p, gradient) / (1 - _betas(group)[1] ** self.steps_of(p, gradient))
        return corrected.sqrt() + float(group["eps"])

    def threshold_of_group(self, group: Group) -> float | None:
        states = [self.state_of(p) for p in group["params"]]
        counts = {(int(s["step"]), float(s["mu_product"])) for s in states if "step" in s} or {(0, 1.0)}
        if group["maximize"] or len(counts) > 1:
            return None
        along_gradient, along_momentum = nadam_weights(group, *counts.pop())
        beta1 = _betas(group)[0]
        return recurrence_threshold(
            float(group["lr"]),
            beta=beta1,
            gain=1 - beta1,
            along_gradient=along_gradient,
            along_momentum=along_momentum,
            weight_decay=_decoupled(group),
        )


def nadam_weights(group: Group, steps: int, mu_product: float) -> tuple[float, float]:
    """c_g and c_m of the step after so many, with the product of the μ until then."""
    beta1, decay = _betas(group)[0], float(group["momentum_decay"])
    mu, following = (beta1 * (1 - 0.5 * 0.96 ** ((steps + i) * decay)) for i in (1, 2))
    product = mu_product * mu
    return (1 - mu) / (1 - product), following / (1 - product * following)


class RAdamGeometry(AdamGeometry):
    """P = (1 − β₁ᵗ)(√v + ε) / (r_t √(1 − β₂ᵗ)) with the rectification r_t, and (1 − β₁ᵗ) I as long as ρ_t <= 5.

    Threshold as for Adam. Source: Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020,
    algorithm 2, in the form of torch.optim.RAdam, which adds ε to √v.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group, steps = self.group_of(p), self.steps_of(p, gradient)
        (beta1, beta2), rectified = _betas(group), self._rectification(group, steps)
        if rectified is None:
            return torch.full_like(p, 1 - beta1**steps, dtype=working_dtype(p, gradient))
        root = self._second_moment(p, gradient).sqrt() + float(group["eps"])
        return (1 - beta1**steps) / (rectified * (1 - beta2**steps) ** 0.5) * root

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        if self._rectification(self.group_of(p), self.steps_of(p, gradient)) is None:
            return torch.zeros_like(p, dtype=torch.bool)
        return super().is_idle(p, gradient)

    @staticmethod
    def _rectification(group: Group, steps: int) -> float | None:
        """r_t, or None while the step is not adapted."""
        beta2 = _betas(group)[1]
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * steps * beta2**steps / (1 - beta2**steps)
        if length <= 5:
            return None
        return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5


class AdamaxGeometry(TorchGeometry):
    """P = (1 − β₁ᵗ) u with u ← max(β₂ u, |g| + ε). Threshold as for Adam.

    Source: Kingma and Ba, Adam, 2015, algorithm 2.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return (1 - _betas(self.group_of(p))[0] ** self.steps_of(p, gradient)) * self._largest(p, gradient)

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return self._largest(p, gradient) <= float(self.group_of(p)["eps"])

    def threshold_of_group(self, group: Group) -> float | None:
        return None if group["maximize"] else average_threshold(float(group["lr"]), _betas(group)[0])

    def _largest(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        self.steps_of(p, gradient)  # raises before the first step
        group, state = self.group_of(p), self.state_of(p)
        if gradient is None:
            return state["exp_inf"].to(working_dtype(p, None))
        new = self.seen(p, gradient).abs() + float(group["eps"])
        return torch.maximum(_betas(group)[1] * state["exp_inf"].to(new.dtype), new) if "exp_inf" in state else new


def _betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


def _decoupled(group: Group) -> float:
    return float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0
