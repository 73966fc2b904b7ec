"""Generic Adam: any learning rate, any averaging of the second moment, one condition for all of them.

Source: Zou, Shen, Jie, Zhang, Liu, A Sufficient Condition for Convergences of Adam and RMSProp, CVPR 2019,
algorithm 1; Chen, Shen, Zou, Liu, Towards Practical Adam, JMLR 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, counted, gradients, group_of, missing_gradient, moment_dtype, step_of
from .option_checks import check_number
from .recurrences import average_threshold
from .schedules import Schedule, plain, schedule_of


class GenericAdam(BaseOptimizer):
    r"""Adam and RMSProp with schedules in the place of their constants.

        v_t = θ_t v_(t−1) + (1 − θ_t) g_t²         v_0 = v0
        m_t = β_t m_(t−1) + (1 − β_t) g_t
        x ← x − α_t m_t / (√v_t + eps)             α_t = lr · lr_schedule(t)

    There is no bias correction: with θ_1 near 1 and v0 tiny the first step is α_1 (1 − β_1) / √(1 − θ_1), for Adam's
    constants 3.2 α_1. θ = "corrected=0.999" and lr_schedule = "momentum=0.9" make it Adam. A constant θ is RMSProp
    (β = 0) or Adam without correction; θ = "r=1" with lr_schedule = "s=0.5" is AdaGrad. `check_sufficient_condition`
    tells whether given schedules converge.

    A schedule is a number, a text such as "r=0.25", an object of `schedules` or any function of the step number
    t = 1, 2, ... Options keep texts, so that a state dictionary holds plain values. Each parameter counts its own
    steps.

    Args:
        lr: Base of α_t; schedulers of torch act on it.
        theta: θ_t, each in [0, 1). 0 forgets everything before.
        beta: β_t, each in [0, 1).
        lr_schedule: Factor on `lr`.
        v0: v_0. The paper's eps; it is averaged away, as the product of all θ_t.
        eps: Added to the root. 0 is the paper's algorithm, in which a coordinate whose gradient is always 0 ends at 0/0
            where θ_1 = 0 or once v underflows; the default is that of Adam, of which v0 = eps² is the counterpart.
        weight_decay: λ, added to the gradient as λ x.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        theta: float | str | Schedule | Any = 0.999,
        beta: float | str | Schedule | Any = 0.9,
        lr_schedule: float | str | Schedule | Any = 1.0,
        *,
        v0: float = 1e-16,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        schedules = {"theta": theta, "beta": beta, "lr_schedule": lr_schedule}
        super().__init__(params, {"lr": lr, **schedules, "v0": v0, "eps": eps, "weight_decay": weight_decay})

    def check_group(self, group: Group) -> None:
        for option in ("lr", "v0", "eps", "weight_decay"):
            check_number(option, group[option], least=0)
        for option in ("theta", "beta", "lr_schedule"):
            group[option] = plain(option, group[option])
            if option != "lr_schedule" and isinstance(group[option], float | int):
                check_number(option, group[option], least=0, below=1)

    def update(self, group: Group) -> None:
        eps, decay = float(group["eps"]), float(group["weight_decay"])
        for p, gradient in gradients(group):
            state = self.state[p]
            if "exp_avg" not in state:
                dtype = moment_dtype(p)
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.full_like(state["exp_avg"], float(group["v0"]))
            alpha, beta, theta = rates(group, counted(state))
            m, v = state["exp_avg"], state["exp_avg_sq"]
            gradient = gradient.to(m.dtype)
            if decay:
                gradient = gradient.add(p, alpha=decay)
            m.lerp_(gradient, 1 - beta)
            v.mul_(theta).addcmul_(gradient, gradient, value=1 - theta)
            p.add_((m / v.sqrt().add_(eps)).to(p.dtype), alpha=-alpha)

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """√v_t + eps, of p's shape. `gradient` is to be without the weight decay, which is added here."""
        group, state = group_of(self, p), self.state.get(p, {})
        if gradient is not None:
            gradient = gradient.detach().to(moment_dtype(p)) + float(group["weight_decay"]) * p.detach()
            _, _, theta = rates(group, step_of(state) + 1)
            before = state["exp_avg_sq"] if "exp_avg_sq" in state else float(group["v0"])
            v = theta * before + (1 - theta) * gradient.square()
        elif step_of(state):
            v = state["exp_avg_sq"].clone()
        else:
            raise missing_gradient(self)
        return v.sqrt_() + float(group["eps"])

    def threshold_of_group(self, group: Group) -> float | None:
        """2 (1 + β) / ((1 − β) α) with α and β of the next step; None where parameters of the group are at different
        steps and a schedule tells them apart.

        With curvature h along an eigenvector of P⁻¹(H + λ), x ← x − α m and m ← β m + (1 − β) h x have the polynomial
        z² − (1 + β − (1 − β) α h) z + β; by Jury's conditions it is stable while positive at z = −1.
        """
        found = set()
        for t in {step_of(self.state.get(p, {})) + 1 for p in group["params"]}:
            alpha, beta, _ = rates(group, t)
            found.add(average_threshold(alpha, beta))
        return found.pop() if len(found) == 1 else None

    def coupled_weight_decay(self, group: Group) -> float:
        return float(group["weight_decay"])


def rates(group: Group, t: int) -> tuple[float, float, float]:
    """α_t, β_t and θ_t of a group.

    Raises:
        ValueError: a schedule leaves its range at this step.
    """
    factor, beta, theta = (schedule_of(group[option])(t) for option in ("lr_schedule", "beta", "theta"))
    if not (factor >= 0 and 0 <= beta < 1 and 0 <= theta < 1):
        raise ValueError(
            f"at step {t} the schedules give lr_schedule = {factor:g}, beta = {beta:g}, theta = {theta:g}; the first "
            "must be >= 0, the others in [0, 1): change them"
        )
    return float(group["lr"]) * factor, beta, theta
