"""Langevin noise: gradient descent that samples at a temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .base import Group, moment_dtype
from .noisy import Noisy
from .option_checks import check_number
from .streams import generator


class LangevinSGD(Noisy):
    r"""θ ← base step + √(2ηT) ξ with ξ normal: the Euler-Maruyama scheme of dθ = −∇L dt + √(2T) dW.

    On gradient descent with small steps it samples exp(−L/T). On curvature h the stationary variance is
    T / (h (1 − ηh/2)). The noise of the minibatch, with covariance C for one example and batches of B, acts like
    η C / (2B) in the place of T where it is white; nothing is subtracted for it.

    The noise does not pass through a momentum. With heavy-ball momentum μ the stationary variance is
    T/h · ((1 + μ)(1 − μ)² + 2μηh) / ((1 − μ)(1 + μ − ηh/2)), which is T (1 − μ) / h while ηh is far below
    (1 − μ)²: there a `temperature` of T / (1 − μ) samples at T.

    Args:
        params: Parameters, for torch.optim.SGD with the options below; or an optimizer, whose step comes first.
        lr: η, for parameters only. The noise reads the learning rate of each group at each step.
        temperature: T >= 0, in units of the loss. 0 is the base bit for bit. Groups may have their own.
        momentum, weight_decay: As in torch.optim.SGD, for parameters only.
        seed: Of the noise.

    Source: Welling, Teh, Bayesian Learning via Stochastic Gradient Langevin Dynamics, 2011, equation 4 with
    ε = 2ηT and the loss divided by T.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        lr: float | None = None,
        *,
        temperature: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, {"temperature": temperature, "seed": seed})

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_number("temperature", group["temperature"], least=0)

    def noise(self, p: Tensor, number: int, step: int, group: Group) -> Tensor | None:
        scale = math.sqrt(2 * float(group["lr"]) * float(group["temperature"]))
        if scale == 0:
            return None
        stream = generator(group["seed"], number, step, p.device)
        return scale * torch.randn(p.shape, generator=stream, dtype=moment_dtype(p), device=p.device)
