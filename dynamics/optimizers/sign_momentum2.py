"""A sign method with gradient transport: momentum of gradients taken ahead of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Closure, Group, counted, gradients, group_of, missing_gradient, moment_dtype
from .option_checks import check_number
from .sign import (
    averaged,
    check_sign_group,
    magnitude,
    momentum_of,
    sign_step,
)


class SignMomentum2(BaseOptimizer):
    r"""m_t = θ m_{t−1} + (1 − θ) g(y_t), w_{t+1} = (1 − γ λ) w_t − γ sign(m_t), with the gradient taken at the
    look-ahead y_t = w_t + θ/(1 − θ) (w_t − w_{t−1}).

    To second order in the step, the old gradients in m, each shifted by its look-ahead, average to the gradient at w_t:
    the bias of plain momentum is gone and only noise is averaged. Where the gradient is linear and free of noise,
    m_t = g(w_t) − θ^{t+1} g(w_0) exactly.

    **The parameters are y, the weights w are in the state.** Between steps the model holds the look-ahead, so that an
    ordinary loop works: zero_grad, forward and backward (at y), `step()`; so does `step(closure)`. Before the first
    step y = w. Inside `with optimizer.swap_to_output():` the model holds w, to evaluate, measure or save it; `step()`
    is refused there. A run saved between steps (model and `state_dict()`) goes on exactly. BatchNorm's running
    statistics are those seen at y. Setting the parameters by hand after the first step has no effect on w.

    A look-ahead of θ/(1 − θ) steps is 99 γ √n long for θ = 0.99; where that is too far at first, raise `momentum` of
    the groups over time: each step uses its present value.

    Like every sign method it has no stability threshold, see `SignSGD`.

    Args:
        lr: γ, the distance each coordinate of w moves.
        momentum: θ in [0, 1). At 0 this is signSGD.
        weight_decay: λ, decoupled.

    Source: Sun et al., Rethinking SIGN Training: Provable Nonconvex Acceleration without First- and Second-Order
    Gradient Lipschitz, 2023; transport is that of Cutkosky and Mehta, Momentum Improves Normalized SGD, 2020.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        self._at_output = False
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def check_group(self, group: Group) -> None:
        check_sign_group(group)
        check_number("momentum", group["momentum"], least=0, below=1)

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step from gradients taken at the look-ahead; see `BaseOptimizer.step`.

        Raises:
            RuntimeError: inside `swap_to_output()`, where gradients would be those of another point.
        """
        if self._at_output:
            raise RuntimeError("the model holds the weights, not the look-ahead: leave swap_to_output() before a step")
        return super().step(closure)

    def update(self, group: Group) -> None:
        theta = group["momentum"]
        for p, g in gradients(group):
            state = self.state[p]
            counted(state)
            before = state["weights"] if "weights" in state else kept(p)
            state["momentum"] = averaged(momentum_of(state, p), g, theta)
            after = before.clone()
            sign_step(after, state["momentum"], group["lr"], group["weight_decay"])
            state["weights"] = after
            p.copy_(after + theta / (1 - theta) * (after - before))

    @contextmanager
    def swap_to_output(self) -> Iterator[None]:
        """Inside, the parameters are the weights w; after it they are the look-ahead again, bit for bit."""
        found = {p: p.detach().clone() for p, state in self.state.items() if "weights" in state}
        inside = self._at_output
        self._at_output = True
        with torch.no_grad():
            for p in found:
                p.copy_(self.state[p]["weights"])
        try:
            yield
        finally:
            self._at_output = inside
            with torch.no_grad():
                for p, y in found.items():
                    p.copy_(y)

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """diag(|m|), so that P⁻¹ m = sign(m); ∞ where m = 0, which is where nothing moves.

        Args:
            p: A parameter of this optimizer.
            gradient: What the next step will see, at the look-ahead. None: P of the last step.

        Raises:
            ValueError: `gradient` is None and no step was made.
        """
        state = self.state.get(p, {})
        if gradient is not None:
            return magnitude(averaged(momentum_of(state, p), gradient, group_of(self, p)["momentum"]))
        if "momentum" not in state:
            raise missing_gradient(self)
        return magnitude(state["momentum"])


def kept(p: Tensor) -> Tensor:
    return p.detach().to(moment_dtype(p), copy=True)
