"""Heavy-tailed noise: gradient descent driven by a Lévy process."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .base import Group, moment_dtype
from .noisy import Noisy
from .option_checks import check_flag, check_number
from .stable import check_alpha, positive_stable, stable
from .streams import generator

SHARED = -1  # number of the stream that all parameters of a step have in common


class HeavyTailedSGD(Noisy):
    r"""θ ← base step + σ η^(1/α) ξ with ξ symmetric α-stable: the Euler scheme of dθ = −∇L dt + σ dL^α.

    E exp(i u·ξ) = exp(−‖u‖^α), so ξ is normal with variance 2 at α = 2, and σ = √T is then Langevin noise at
    temperature T. The variance is infinite below that, the mean absolute value at α <= 1.

    - isotropic: ξ is rotationally invariant over all parameters that have made the same number of steps, √(2A) G with
      one A for all of them: a large jump moves every weight.
    - else every weight has its own, independent ξ; E exp(i u·ξ) = exp(−Σ|u_j|^α).

    On a one-dimensional quadratic the stationary law is `stable_ou_scale`.

    Args:
        params: Parameters, for torch.optim.SGD with the options below; or an optimizer, whose step comes first.
        lr: η, for parameters only. The noise reads the learning rate of each group at each step.
        alpha: Tail index in (0, 2]; smaller is heavier. The theory is for 1 < α < 2. Groups may have their own.
        sigma: Noise level σ >= 0, in units of θ per time^(1/α). 0 is the base bit for bit. Groups may have their own.
        isotropic: As above.
        momentum, weight_decay: As in torch.optim.SGD, for parameters only. Noise does not pass through the momentum.
        seed: Of the noise.

    Source: Raj, Zhu, Gürbüzbalaban, Simsekli, Algorithmic Stability of Heavy-Tailed SGD with General Loss Functions,
    2023: the stochastic differential equation of section 2 and its Euler discretisation.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        lr: float | None = None,
        *,
        alpha: float,
        sigma: float,
        isotropic: bool = True,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        options = {"alpha": alpha, "sigma": sigma, "isotropic": isotropic, "seed": seed}
        super().__init__(params, lr, momentum, weight_decay, options)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_alpha(group["alpha"])
        check_number("sigma", group["sigma"], least=0)
        check_flag("isotropic", group["isotropic"])

    def noise(self, p: Tensor, number: int, step: int, group: Group) -> Tensor | None:
        alpha = float(group["alpha"])
        scale = float(group["sigma"]) * float(group["lr"]) ** (1 / alpha)
        if scale == 0:
            return None
        stream = generator(group["seed"], number, step, p.device)
        if not group["isotropic"]:
            return scale * stable(p.shape, alpha, generator=stream, device=p.device).to(moment_dtype(p))
        # On the CPU, so that parameters on several devices share it.
        A = positive_stable((), alpha / 2, generator=generator(group["seed"], SHARED, step, "cpu"))
        return (
            scale * float(2 * A) ** 0.5 * torch.randn(p.shape, generator=stream, dtype=moment_dtype(p), device=p.device)
        )
