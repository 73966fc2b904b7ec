"""GI-Adam: Adam whose second moment starts at the squared gradient instead of zero.

Source: Kalra and Barkeshli, Why Warmup the Learning Rate? Underlying Mechanisms and Improvements, NeurIPS 2024,
section 6 and its appendix on random initial moments (RI-Adam).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, counted, gradients, group_of, missing_gradient, moment_dtype, step_of
from .option_checks import check_betas, check_choice, check_number
from .recurrences import average_threshold
from .streams import generator, tensor_numbers


class GIAdam(BaseOptimizer):
    r"""Adam with v₀ = scale · g₀² and the usual bias corrections kept.

        v₀ = scale · g₁²
        m_t = β₁ m_(t−1) + (1 − β₁) g_t        v_t = β₂ v_(t−1) + (1 − β₂) g_t²
        θ ← (1 − ηλ) θ − η · m_t / (1 − β₁ᵗ) / (√(v_t / (1 − β₂ᵗ)) + eps)

    A second moment that starts at g₀² needs no correction; to keep it multiplies the step by about √(1 − β₂ᵗ), a warmup
    of 1 / (1 − β₂) steps. The preconditioned sharpness at the first step is √(1 − β₂) times that of Adam.

    g₀ is the gradient of the first step; `initialise()` takes another one. The published script draws one batch more
    for it; on the full batch both agree.

    Args:
        lr: η.
        betas: β₁ and β₂, each in [0, 1).
        eps: Added to the root.
        weight_decay: λ, decoupled as in AdamW.
        v0: "gradient", or "random" for RI-Adam: squares of a Gaussian vector, scaled to the sum of the squared
            gradient of its tensor, so that size and not direction is what both have in common.
        v0_scale: Factor on v₀. With 0 this is AdamW.
        seed: Of the random v₀.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        v0: str = "gradient",
        v0_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "v0": v0, "v0_scale": v0_scale, "seed": seed})

    def check_group(self, group: Group) -> None:
        check_betas(group["betas"])
        for option in ("lr", "eps", "weight_decay", "v0_scale"):
            check_number(option, group[option], least=0)
        check_choice("v0", group["v0"], ("gradient", "random"))
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise TypeError(f"`seed` is {group['seed']!r}; give a whole number")

    @torch.no_grad()
    def initialise(self) -> None:
        """Takes v₀ from the gradients that the parameters hold now; without it the first step does so.

        Raises:
            ValueError: a parameter has already made a step.
        """
        for group in self.param_groups:
            for p, gradient in gradients(group):
                if step_of(self.state[p]):
                    raise ValueError(
                        f"a parameter has made {step_of(self.state[p])} steps; initialise() comes before the first one"
                    )
                self._start(group, p, self.state[p], gradient)

    def update(self, group: Group) -> None:
        lr, eps = float(group["lr"]), float(group["eps"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        for p, gradient in gradients(group):
            state = self.state[p]
            if "exp_avg" not in state:
                self._start(group, p, state, gradient)
            t = counted(state)
            m, v = state["exp_avg"], state["exp_avg_sq"]
            gradient = gradient.to(m.dtype)
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(eps)
            p.mul_(1 - lr * float(group["weight_decay"]))
            p.add_((m / denominator).to(p.dtype), alpha=-lr / (1 - beta1**t))

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """(1 − β₁ᵗ) (√(v_t / (1 − β₂ᵗ)) + eps), of p's shape; source as above, equation of the preconditioned
        sharpness, with the root that the printed formula lacks and the code has."""
        group = group_of(self, p)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        state: dict[str, Any] = self.state.get(p, {})
        t = step_of(state)
        if gradient is not None:
            gradient = gradient.detach().to(moment_dtype(p))
            before = state["exp_avg_sq"] if "exp_avg_sq" in state else self._first_v(group, p, gradient)
            v, t = beta2 * before + (1 - beta2) * gradient.square(), t + 1
        elif t:
            v = state["exp_avg_sq"]
        else:
            raise missing_gradient(self)
        return (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + float(group["eps"]))

    def threshold_of_group(self, group: Group) -> float | None:
        """(2 − ηλ)(1 + β₁) / ((1 − β₁) η).

        With curvature h along one eigenvector of P⁻¹H, x ← (1 − ηλ) x − η m and m ← β₁ m + (1 − β₁) h x have the
        polynomial z² − (1 − ηλ + β₁ − (1 − β₁) η h) z + β₁ (1 − ηλ); by Jury's conditions it is stable while positive
        at z = −1. Without decay: Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022, section 2.
        """
        return average_threshold(float(group["lr"]), float(group["betas"][0]), float(group["weight_decay"]))

    def _start(self, group: Group, p: Tensor, state: dict[str, Any], gradient: Tensor) -> None:
        state["exp_avg"] = torch.zeros_like(p, dtype=moment_dtype(p), memory_format=torch.preserve_format)
        state["exp_avg_sq"] = self._first_v(group, p, gradient.to(moment_dtype(p)))

    def _first_v(self, group: Group, p: Tensor, gradient: Tensor) -> Tensor:
        squares = gradient.square()
        if group["v0"] == "random":
            stream = generator(int(group["seed"]), tensor_numbers(self)[p], 0, p.device)
            noise = torch.randn(p.shape, generator=stream, dtype=squares.dtype, device=p.device).square()
            squares = noise * (squares.sum() / noise.sum())
        return squares.mul_(float(group["v0_scale"]))
