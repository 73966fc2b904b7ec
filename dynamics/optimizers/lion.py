"""Lion: signs of an interpolated momentum."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, counted, gradients, group_of, missing_gradient
from .option_checks import check_betas
from .sign import averaged, check_sign_group, gradient_is_gone, magnitude, momentum_of, sign_step


class Lion(BaseOptimizer):
    r"""θ ← (1 − η λ) θ − η sign(u) with u = β₁ m + (1 − β₁) g, after which m ← β₂ m + (1 − β₂) g; m starts at zero.

    No bias correction and no eps: the first step is −η sign(g). One buffer, half the memory of AdamW.

    The directions are an average of a corrected gradient,

        u_{t+1} = β₂ u_t + (1 − β₂) (g_{t+1} + c (g_{t+1} − g_t)) with c = (β₂ − β₁) / (1 − β₂),

    since u_{t+1} − β₂ u_t = β₁ (m_t − β₂ m_{t−1}) + (1 − β₁)(g_{t+1} − β₂ g_t) = β₁ (1 − β₂) g_t +
    (1 − β₁)(g_{t+1} − β₂ g_t). As g_{t+1} − g_t ≈ H (θ_{t+1} − θ_t), Lion approximates the gradient at θ + c (θ −
    θ_prev) without going there; see `SignMomentum2`, which goes. Limits: β₁ = β₂ is Signum (c = 0), β₁ = 0 is signSGD
    whatever β₂ is.

    Like every sign method it has no stability threshold, see `SignSGD`.

    Args:
        lr: η, the distance each coordinate moves; 3 to 10 times below that of AdamW.
        betas: (β₁, β₂); (0.95, 0.98) is steadier.
        weight_decay: λ, decoupled; what counts is η λ, so 3 to 10 times above that of AdamW.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, program 1. The identity: derived above;
    the reading as transport: Sun et al., Rethinking SIGN Training, 2023.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def check_group(self, group: Group) -> None:
        check_sign_group(group)
        check_betas(group["betas"])

    def update(self, group: Group) -> None:
        beta1, beta2 = group["betas"]
        for p, g in gradients(group):
            state = self.state[p]
            counted(state)
            m = momentum_of(state, p)
            sign_step(p, averaged(m, g, beta1), group["lr"], group["weight_decay"])
            state["momentum"] = averaged(m, g, beta2)

    def effective_extrapolation(self) -> list[float]:
        """c = (β₂ − β₁) / (1 − β₂) of each group: how many last steps ahead the gradient is extrapolated, 9 by default.

        Full transport would be β₂ / (1 − β₂).
        """
        return [(beta2 - beta1) / (1 - beta2) for beta1, beta2 in (group["betas"] for group in self.param_groups)]

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """diag(|u|), so that P⁻¹ u = sign(u); ∞ where u = 0, which is where nothing moves.

        Args:
            p: A parameter of this optimizer.
            gradient: What the next step will see.

        Raises:
            NoPreconditionerError: a ValueError; `gradient` is None: the u of the last step is not kept.
        """
        if gradient is None:
            raise gradient_is_gone(self) if p in self.state else missing_gradient(self)
        return magnitude(averaged(momentum_of(self.state.get(p, {}), p), gradient, group_of(self, p)["betas"][0]))
