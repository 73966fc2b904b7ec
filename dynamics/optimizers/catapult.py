"""The learning rate at which a step begins to raise the loss, found with forward passes only.

Source: Kalra and Barkeshli, Why Warmup the Learning Rate? Underlying Mechanisms and Improvements, NeurIPS 2024, the
section on the choice of the initial learning rate, and its appendix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...landscape.objective import Objective
from .option_checks import check_number


@dataclass(frozen=True)
class CatapultRate:
    """
    Attributes:
        lr: η_c, the upper end of the bracket: one step with it ends at a loss in [L₀, (1 + δ) L₀].
        lower: The lower end, where one step lowers the loss.
        initial_loss: L₀.
        loss: After one step with `lr`.
        forward_passes: Losses evaluated, that of L₀ too.
        found: False where the loss still fell at `target`, which `lr` then is.
        converged: False where the budget ended first: `lr` is above η_c, `loss` above (1 + δ) L₀.
    """

    lr: float
    lower: float
    initial_loss: float
    loss: float
    forward_passes: int
    found: bool
    converged: bool


class _Budget(Exception):
    pass


def catapult_learning_rate(
    objective: Objective,
    optimizer: Optimizer | Callable[[list[Tensor]], Optimizer],
    *,
    target: float = math.inf,
    start: float = 1e-4,
    growth: float = 2.0,
    delta: float = 0.1,
    max_forward_passes: int = 20,
) -> CatapultRate:
    """The instability threshold η_c of the next step: the smallest learning rate found to raise the loss.

    Exponential search from `start` until a step raises the loss, then bisection until it does so by at most δ. One
    gradient serves all trials: each is one step of a copy of the optimizer, with the state it has now, and one loss. On
    the quadratic l x²/2 gradient descent has the loss ratio (1 − ηl)², hence η_c in (2/l, (1 + √(1 + δ))/l].

    Weights, gradients, the optimizer, its state and random streams are left as found. A loss that is not finite counts
    as raised. If already `start` raises the loss, the search goes down from there, which the paper leaves open.

    Args:
        objective: The loss; of the full data or of one batch.
        optimizer: On (some of) the objective's parameters, at any point of training, without closure. Its groups keep
            the ratios of their learning rates, the largest of which is searched. Or a function from parameters to a new
            optimizer.
        target: Stop here when the loss still falls.
        start, growth: η_0, and the factor of the exponential search.
        delta: δ; the paper takes 0.1 for gradient descent and 0.01 for Adam.
        max_forward_passes: Budget.

    Returns:
        The rate, and what it took.
    """
    check_number("start", start, above=0)
    check_number("growth", growth, above=1)
    check_number("delta", delta, above=0)
    check_number("max_forward_passes", max_forward_passes, least=3)
    if not target > 0:
        raise ValueError(f"`target` is {target}; it must be above 0")
    trials = _Trials(objective, optimizer, max_forward_passes)
    with trials.weights_kept():
        return _search(trials, min(start, target), target, growth, delta)


def _search(trials: _Trials, start: float, target: float, growth: float, delta: float) -> CatapultRate:
    initial = trials.initial_loss
    losses = {0.0: initial}
    lower, upper = 0.0, math.inf

    def falls(rate: float) -> bool:
        losses[rate] = trials.loss_after(rate)
        return losses[rate] < initial

    try:
        rate = start
        if falls(rate):
            lower = rate
            while rate < target:
                rate = min(rate * growth, target)
                if not falls(rate):
                    upper = rate
                    break
                lower = rate
            else:
                return trials.result(target, target, losses[target], found=False, converged=True)
        else:
            while not lower:
                upper, rate = rate, rate / growth
                lower = rate if falls(rate) else 0.0
        while not losses[upper] <= initial + delta * abs(initial):
            middle = (lower + upper) / 2
            if falls(middle):
                lower = middle
            else:
                upper = middle
    except _Budget:
        best = upper if math.isfinite(upper) else max(losses)
        return trials.result(best, lower, losses[best], found=math.isfinite(upper), converged=False)
    return trials.result(upper, lower, losses[upper], found=True, converged=True)


class _Trials:
    """Losses after one step at different rates, from the same weights, gradient and optimizer state."""

    def __init__(
        self, objective: Objective, optimizer: Optimizer | Callable[[list[Tensor]], Optimizer], budget: int
    ) -> None:
        self._objective = objective
        params = objective.parameters
        self._optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizer(list(params.values()))
        gradients = objective.unflatten(objective.gradient())
        self._gradients = {params[name]: g.to(params[name].dtype) for name, g in gradients.items()}
        groups = self._optimizer.param_groups
        self._params = [p for group in groups for p in group["params"]]
        if not any(p in self._gradients for p in self._params):
            raise ValueError("`optimizer` holds no parameter of `objective`; make it of the same model")
        rates = [float(group["lr"]) for group in groups]
        self._ratios = [rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates]
        self._kept = [p.detach().clone() for p in self._params]
        self._left = budget
        self._passes = 0
        self.initial_loss = self._loss()

    def loss_after(self, rate: float) -> float:
        self._set(self._kept)
        trial = copy.deepcopy(self._optimizer)
        moved = [p for group in trial.param_groups for p in group["params"]]
        for group, ratio in zip(trial.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
        for p, original in zip(moved, self._params, strict=True):
            gradient = self._gradients.get(original)
            p.grad = None if gradient is None else gradient.clone()
        trial.step()
        self._set(moved)
        return self._loss()

    def result(self, lr: float, lower: float, loss: float, *, found: bool, converged: bool) -> CatapultRate:
        return CatapultRate(lr, lower, self.initial_loss, loss, self._passes, found, converged)

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._set(self._kept)

    def _loss(self) -> float:
        if not self._left:
            raise _Budget
        self._left -= 1
        self._passes += 1
        try:
            return self._objective.loss()
        except ValueError:
            # An objective refuses weights at which its loss is not finite.
            if self._passes == 1:
                raise
            return math.inf

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for p, value in zip(self._params, values, strict=True):
            p.copy_(value)
