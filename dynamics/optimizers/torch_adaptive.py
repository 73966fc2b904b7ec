"""Optimizers of torch.optim that divide the gradient itself: Adagrad, RMSprop, Adadelta, Adafactor."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Group
from .recurrences import recurrence_threshold
from .torch_geometry import NoPreconditionerError, TorchGeometry, working_dtype


class AdagradGeometry(TorchGeometry):
    """P = (1 + (t − 1) κ)(√s + ε) with the sum of squares s and κ = `lr_decay`; threshold 2/η.

    Source: Duchi, Hazan and Singer, Adaptive Subgradient Methods, 2011, in the form of torch.optim.Adagrad.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group, steps = self.group_of(p), self.steps_of(p, gradient)
        root = self._sum(p, gradient).sqrt() + float(group["eps"])
        return (1 + (steps - 1) * float(group["lr_decay"])) * root

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return self._sum(p, gradient) == 0

    def threshold_of_group(self, group: Group) -> float | None:
        return _gradient_threshold(group)

    def _sum(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        state = self.state_of(p)
        if gradient is None:
            return state["sum"].to(working_dtype(p, None))
        square = self.seen(p, gradient).square()
        return state["sum"].to(square.dtype) + square


class RMSpropGeometry(TorchGeometry):
    """P = √v + ε, without bias correction; centred, P = √(v − ḡ²) + ε with the average gradient ḡ.

    Momentum is heavy ball on P⁻¹ g: m ← μ m + P⁻¹ g. With P fixed its threshold is 2 (1 + μ) / η.

    Source: Hinton, Neural Networks for Machine Learning, 2012, lecture 6e; Graves, Generating Sequences with Recurrent
    Neural Networks, 2013, equations 38 to 41, for the centred form; ε as in torch.optim.RMSprop.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group, state = self.group_of(p), self.state_of(p)
        v, alpha = self._second_moment(p, gradient), float(group["alpha"])
        if group["centered"]:
            mean = state["grad_avg"].to(v.dtype) if "grad_avg" in state else torch.zeros_like(v)
            if gradient is not None:
                mean = torch.lerp(mean, self.seen(p, gradient), 1 - alpha)
            v = v - mean.square()
        return v.sqrt() + float(group["eps"])

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return self._second_moment(p, gradient) == 0

    def threshold_of_group(self, group: Group) -> float | None:
        if group["maximize"]:
            return None
        return recurrence_threshold(float(group["lr"]), beta=float(group["momentum"]))

    def _second_moment(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        return self.average_of_squares(p, gradient, "square_avg", float(self.group_of(p)["alpha"]))


class AdadeltaGeometry(TorchGeometry):
    """P = √(v + ε) / √(d + ε) with averages v of squared gradients and d of squared steps; threshold 2/η.

    A step changes d after using it, and what it was before cannot be told from the state: P of the last step is given
    with the d of now.

    Source: Zeiler, ADADELTA, 2012, algorithm 1.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        eps, state = float(self.group_of(p)["eps"]), self.state_of(p)
        v = self._second_moment(p, gradient)
        d = state["acc_delta"].to(v.dtype) if "acc_delta" in state else torch.zeros_like(v)
        return (v + eps).sqrt() / (d + eps).sqrt()

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return self._second_moment(p, gradient) == 0

    def threshold_of_group(self, group: Group) -> float | None:
        return _gradient_threshold(group)

    def _second_moment(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        return self.average_of_squares(p, gradient, "square_avg", float(self.group_of(p)["rho"]))


class AdafactorGeometry(TorchGeometry):
    """P = η c max(√V, ε₁) / α: V is the factored second moment r cᵀ / mean(r), α = max(ε₂, RMS(θ)) min(η, 1/√t) the
    relative step, c = max(1, RMS(g/√V)/d) the clipping. Threshold (2 − η λ)/η with decoupled weight decay λ.

    P depends on the weights and the gradient of its step, so that of the last step cannot be had afterwards.

    Source: Shazeer and Stern, Adafactor, 2018, algorithms 4 and 5, in the form of torch.optim.Adafactor.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group, V = self.group_of(p), self._second_moment(p, gradient)
        assert gradient is not None
        steps, lr = self.steps_of(p, gradient), float(group["lr"])
        smallest = self._smallest(p)
        root = V.clamp(min=smallest * smallest).sqrt()
        scaled = self.seen(p, gradient) / root
        clipping = max(1.0, float(scaled.norm()) / (scaled.numel() ** 0.5 * float(group["d"])))
        size = max(float(group["eps"][1]), float(p.detach().norm(2)) / p.numel() ** 0.5)
        # α/η = size · min(1, 1/(η √t)), which stays finite as η goes to 0.
        relative = size * min(1.0, 1 / (lr * steps**0.5)) if lr > 0 else size
        return root * (clipping / relative)

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        return self._second_moment(p, gradient) == 0

    def coupled_weight_decay(self, group: Group) -> float:
        return 0.0

    def threshold_of_group(self, group: Group) -> float | None:
        return _gradient_threshold(group, float(group["weight_decay"]))

    def _smallest(self, p: Tensor) -> float:
        given = self.group_of(p)["eps"][0]
        return torch.finfo(p.dtype).eps if given is None else float(given)

    def _second_moment(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise NoPreconditionerError(
                "Adafactor's preconditioner of the last step depends on the gradient and the weights it had: pass "
                "`gradient`, that of the next step"
            )
        state = self.state_of(p)
        g = self.seen(p, gradient)
        share = self.steps_of(p, gradient) ** float(self.group_of(p)["beta2_decay"])

        def averaged(key: str, new: Tensor) -> Tensor:
            old = state[key].to(new.dtype) if key in state else torch.zeros_like(new)
            return torch.lerp(old, new, share)

        if g.ndim < 2:
            return averaged("variance", g.square())
        rows = averaged("row_var", g.square().mean(-1, keepdim=True))
        columns = averaged("col_var", g.square().mean(-2, keepdim=True))
        return rows @ columns / rows.mean(-2, keepdim=True).clamp(min=self._smallest(p))


def _gradient_threshold(group: Group, weight_decay: float = 0.0) -> float | None:
    """Of a step along the gradient itself: (2 − η λ)/η."""
    if group["maximize"]:
        return None
    lr = float(group["lr"])
    return recurrence_threshold(lr, along_gradient=1.0, along_momentum=0.0, weight_decay=weight_decay)
