"""Accelerated SGD in its four-parameter form, which is what the theory of least squares is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, counted, gradients, moment_dtype, step_of
from .option_checks import check_number


class NesterovForm(NamedTuple):
    """y_{t+1} = (1 + c) y_t − c y_{t−1} − q g_t + c δ g_{t−1}, with y_{−1} − δ g_{−1} = y_0 at the start.

    Attributes:
        momentum: c.
        lr: δ, the step at the look-ahead.
        step_size: q, the step of the recursion.
    """

    momentum: float
    lr: float
    step_size: float


class AcceleratedSGD(BaseOptimizer):
    r"""A short step δ and a long step γ, averaged; g is the gradient at y.

    1. w_{t+1} = y_t − δ g_t
    2. v_{t+1} = y_t β + (1 − β) v_t − γ g_t
    3. y_{t+1} = α w_{t+1} + (1 − α) v_{t+1}

    The parameters are at y, where gradients are taken; the output is w, or its tail average, see `swap_to_output`.
    All three start at the parameters. γ = δ is SGD bit for bit, for any α and β. γ keeps its ratio to δ when a schedule
    changes `lr`, as an acceleration is a matter of the ratio.

    Kept per parameter: v, in at least float32, and the tail average where asked for; w = (y − (1 − α) v) / α.

    Args:
        params: Parameters or groups; groups may have any option of their own.
        lr: δ.
        gamma: γ at the `lr` that stands beside it, usually several times that. A group with an `lr` of its own and no
            `gamma` keeps the ratio too.
        beta: β in [0, 1].
        alpha: α in (0, 1]; None for 1 / (1 + β).
        weight_decay: λ, added to the gradient as λ y.
        average_from: s >= 1 to keep the mean of w_s, w_{s+1}, ..., counted in steps of the parameter; None keeps none.

    Source: Jain, Kakade, Kidambi, Netrapalli, Sidford, Accelerating Stochastic Gradient Descent, 2018, algorithm 1; Li,
    Deng, Wu, Zhou, Gu, Risk Bounds of Accelerated SGD for Overparameterized Linear Regression, 2024, whose letters
    these are.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        gamma: float,
        beta: float,
        alpha: float | None = None,
        weight_decay: float = 0.0,
        *,
        average_from: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "gamma": gamma, "beta": beta, "alpha": alpha, "weight_decay": weight_decay}
        check_number("lr", lr, least=0)
        super().__init__(params, {**defaults, "gamma_lr": float(lr), "average_from": average_from})

    @classmethod
    def from_spectrum(
        cls, params: ParamsT, eigenvalues: Sequence[float] | Tensor, kt: int, psi: float = 3.0, **options: Any
    ) -> AcceleratedSGD:
        """With the parameters of `accelerated_options`; `options` are further arguments of the class."""
        return cls(params, **accelerated_options(eigenvalues, kt, psi), **options)

    def check_group(self, group: Group) -> None:
        check_number("lr", group["lr"], least=0)
        check_number("gamma", group["gamma"], least=0)
        check_number("beta", group["beta"], least=0, most=1)
        check_number("weight_decay", group["weight_decay"], least=0)
        if group["alpha"] is not None:
            check_number("alpha", group["alpha"], above=0, most=1)
        first = group["average_from"]
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            raise ValueError(
                f"`average_from` is {first!r}; give the step, at least 1, from which w is averaged, or None"
            )

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and "gamma" in param_group:
            lr = param_group.get("lr", self.defaults["lr"])
            check_number("lr", lr, least=0)
            param_group.setdefault("gamma_lr", float(lr))
        super().add_param_group(param_group)

    def update(self, group: Group) -> None:
        delta, gamma, beta, alpha = _parameters(group)
        for p, g in gradients(group):
            state = self.state[p]
            t = counted(state)
            if "v" not in state:
                state["v"] = p.detach().to(moment_dtype(p), copy=True)
            v = state["v"]
            if group["weight_decay"]:
                g = g.add(p, alpha=group["weight_decay"])
            # v moves by differences, so that it stays at y where γ = δ.
            v.add_(p.to(v.dtype) - v, alpha=beta).add_(g, alpha=-gamma)
            p.add_(g, alpha=-delta)
            if group["average_from"] is not None and t >= group["average_from"]:
                self._average(state, p, t - group["average_from"] + 1)
            p.add_((v - p) * (1 - alpha))

    @staticmethod
    def _average(state: dict[str, Any], w: Tensor, count: int) -> None:
        if "average" not in state:
            state["average"] = torch.zeros_like(state["v"])
        state["average"].add_(w.to(state["v"].dtype) - state["average"], alpha=1 / count)

    @contextmanager
    def swap_to_output(self, average: bool | None = None) -> Iterator[None]:
        """Inside, the parameters are the output; after it they are at y again, bit for bit.

        Args:
            average: True for the tail average of w, False for w; None for the average where there is one.

        Raises:
            ValueError: the average is asked for and a parameter that has stepped has none.
        """
        outputs = {p: self._output(p, group, average) for group in self.param_groups for p in group["params"]}
        found = {p: p.detach().clone() for p in outputs}
        with torch.no_grad():
            for p, output in outputs.items():
                p.copy_(output)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, y in found.items():
                    p.copy_(y)

    def _output(self, p: Tensor, group: Group, average: bool | None) -> Tensor:
        state = self.state.get(p, {})
        if step_of(state) == 0:
            return p.detach().clone()
        if "average" in state and average is not False:
            return state["average"]
        if average:
            raise ValueError(
                f"`average` is True, but after {step_of(state)} steps nothing is averaged (`average_from` is "
                f"{group['average_from']}); pass False for w"
            )
        alpha = _parameters(group)[3]
        y, v = p.detach().to(state["v"].dtype), state["v"]
        return v + (y - v) / alpha

    def nesterov_form(self) -> list[NesterovForm]:
        """The same iteration with a momentum and two step sizes, for each group.

        c = α (1 − β), q = α δ + (1 − α) γ. torch.optim.SGD with nesterov=True and momentum c is the case q = δ (1 + c).
        """
        forms = []
        for group in self.param_groups:
            delta, gamma, beta, alpha = _parameters(group)
            forms.append(NesterovForm(alpha * (1 - beta), delta, alpha * delta + (1 - alpha) * gamma))
        return forms

    def threshold_of_group(self, group: Group) -> float | None:
        r"""2 (1 + c) / (q + c δ), with c and q of `nesterov_form`; 2/δ where γ = δ. None at a learning rate of zero.

        On an eigenvector with eigenvalue a of H + λ: x² − (1 + c − q a) x + c (1 − δ a) = 0. Jury's conditions are
        c (1 − δ a) > −1, a (q − c δ) > 0 and 2 (1 + c) > (q + c δ) a. The last is the sharpest, since
        q − c δ = (1 − α) γ + α β δ >= 0; where that is zero a root stays at 1 and nothing diverges before. It concerns
        the mean: the variance of stochastic gradients may grow earlier where γ is large.
        """
        delta, gamma, beta, alpha = _parameters(group)
        c, q = alpha * (1 - beta), alpha * delta + (1 - alpha) * gamma
        return 2 * (1 + c) / (q + c * delta) if delta > 0 else None

    def coupled_weight_decay(self, group: Group) -> float:
        return float(group["weight_decay"])


def accelerated_options(eigenvalues: Sequence[float] | Tensor, kt: int, psi: float = 3.0) -> dict[str, float]:
    r"""δ = 1 / (2ψ Σλ), γ = 1 / (2ψ Σ_{i>k̃} λ_i), β = δ / (ψ k̃ γ), α = 1 / (1 + β), as options of `AcceleratedSGD`.

    For batches of one example of a linear regression with E xxᵀ of these eigenvalues.

    Args:
        eigenvalues: λ >= 0, in any order.
        kt: k̃ >= 1, how many leading directions are the head; fewer than there are positive eigenvalues.
        psi: ψ with E xxᵀAxxᵀ <= ψ tr(HA) H; 3 for normal x.

    Source: Li et al. 2024, whose choice this is.
    """
    spectrum = torch.as_tensor(eigenvalues, dtype=torch.float64).reshape(-1).sort(descending=True).values
    if len(spectrum) == 0 or not bool(torch.isfinite(spectrum).all()) or float(spectrum[-1]) < 0:
        raise ValueError("`eigenvalues` must be finite and not negative, and there must be some")
    positive = int((spectrum > 0).sum())
    if isinstance(kt, bool) or not isinstance(kt, int) or not 1 <= kt < positive:
        raise ValueError(
            f"`kt` is {kt!r} with {positive} positive eigenvalues; it must be an integer from 1 to {positive - 1}"
        )
    check_number("psi", psi, above=0)
    delta = 1 / (2 * psi * float(spectrum.sum()))
    gamma = 1 / (2 * psi * float(spectrum[kt:].sum()))
    beta = delta / (psi * kt * gamma)
    return {"lr": delta, "gamma": gamma, "beta": beta, "alpha": 1 / (1 + beta)}


def _parameters(group: Group) -> tuple[float, float, float, float]:
    """δ, γ, β, α."""
    beta = float(group["beta"])
    alpha = 1 / (1 + beta) if group["alpha"] is None else float(group["alpha"])
    delta, gamma, reference = float(group["lr"]), float(group["gamma"]), float(group["gamma_lr"])
    if delta == 0:
        gamma = 0.0
    elif reference > 0:
        gamma = gamma / reference * delta  # in this order it is δ exactly where γ was
    return delta, gamma, beta, alpha
