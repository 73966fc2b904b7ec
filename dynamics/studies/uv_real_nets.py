"""Nets on digits at and beyond the largest learning rate that converges: what they share with the UV model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...hessian.curvature import Hessian
from ...hessian.eigs import top_eigenvalues
from ...landscape.objective import Objective
from ..bifurcation import detect_period
from .descent import descend
from .digit_problems import digit_examples, fully_connected, half_squares, one_hot

NUM_DIGITS, HIDDEN = 200, 32
# A small initial output, from which the sharpness rises all the way to the edge.
SCALE = 0.3
DIVERGED = 100.0
# Cycles per step from which on an oscillation counts as one of period two.
ALTERNATING = 0.45
# η λ_max of a net without active units.
DEAD = 1e-6


class Net:
    """A net on its digits: "label" is tanh 64-32-1 onto the standardised label, "classes" tanh 64-32-10 onto one-hot
    labels, "autoencoder" ReLU 64-32-64."""

    def __init__(self, task: str, seed: int) -> None:
        self.inputs, labels = digit_examples(NUM_DIGITS)
        self.targets, activation = self.inputs, nn.ReLU
        if task == "label":
            numbers = labels.double()[:, None]
            self.targets, activation = (numbers - numbers.mean()) / numbers.std(correction=0), nn.Tanh
        elif task == "classes":
            self.targets, activation = one_hot(labels), nn.Tanh
        self.model = fully_connected(2, HIDDEN, outputs=self.targets.shape[1], activation=activation, seed=seed)
        with torch.no_grad():
            for p in self.model.parameters():
                p *= SCALE

    def objective(self) -> Objective:
        return Objective.supervised(self.model, half_squares, (self.inputs, self.targets), check=False)

    def gradients(self) -> tuple[float, list[Tensor]]:
        """The loss and its gradients."""
        loss = half_squares(self.model(self.inputs), self.targets)
        return float(loss.detach()), list(torch.autograd.grad(loss, list(self.model.parameters())))

    @torch.no_grad()
    def move(self, gradients: Sequence[Tensor], lr: float) -> None:
        for p, gradient in zip(self.model.parameters(), gradients, strict=True):
            p -= lr * gradient

    def train(self, lr: float, steps: int) -> list[float]:
        """Losses before each step of gradient descent, up to the first above `DIVERGED`."""
        losses = []
        for _ in range(steps):
            loss, gradients = self.gradients()
            losses.append(loss)
            if not loss <= DIVERGED:
                break
            self.move(gradients, lr)
        return losses


def late(task: str, seed: int, lr: float, burn_in: int, keep: int) -> dict[str, Any]:
    """Loss and η λ_max at the last steps; "alternating" and "period" are of the loss.

    A net that lost all its ReLUs has a sharpness of zero; its "fate" is "dead".
    """
    net = Net(task, seed)
    if not net.train(lr, burn_in)[-1] <= DIVERGED:
        return {"lr": lr, "fate": "diverged"}
    rule = torch.optim.SGD(net.model.parameters(), lr=lr)
    run = descend(net.model, net.objective(), rule, keep, diverged=DIVERGED)
    if run["diverged"]:
        return {"lr": lr, "fate": "diverged"}
    edge = [lr * value for value in run["sharpness"]]
    if max(edge) < DEAD:
        return {"lr": lr, "fate": "dead"}
    changes = np.diff(run["loss"])
    return {
        "lr": lr,
        "fate": "trains",
        "loss": run["loss"],
        "edge": edge,
        "mean": float(np.mean(edge)),
        "alternating": float((changes[1:] * changes[:-1] < 0).mean()),
        "period": detect_period(run["loss"], 1e-6 * max(run["loss"])),
        "period_two": power_of_period_two(edge),
        "projection": projection_signs(net, lr),
    }


def power_of_period_two(series: Sequence[float]) -> float:
    """Share of the variance at frequencies near one half, of the series without its straight trend."""
    x, t = np.asarray(series, dtype=float), np.arange(len(series))
    x = x - np.polyval(np.polyfit(t, x, 1), t)
    power = np.abs(np.fft.fft(x * np.hanning(len(x)))) ** 2
    power[0] = 0.0
    total = float(power.sum())
    return float(power[np.abs(np.fft.fftfreq(len(x))) >= ALTERNATING].sum()) / total if total > 0 else 0.0


def projection_signs(net: Net, lr: float, steps: int = 24) -> float:
    """Share of successive steps between which the gradient along the top eigenvector changes its sign."""
    top = top_eigenvalues(Hessian(net.objective()), tol=1e-6).vectors[:, 0]
    along = []
    for _ in range(steps):
        gradients = net.gradients()[1]
        along.append(float(torch.cat([piece.flatten() for piece in gradients]) @ top))
        net.move(gradients, lr)
    return float(np.mean([a * b < 0 for a, b in pairwise(along)]))


def largest_convergent(task: str, seed: int, steps: int, start: float, factor: float) -> float:
    """The last of the rates start, factor · start, ... before the first whose loss rises in the last half of the steps.

    From below: far above it a net may catapult to where it is flat, and converge again.

    Raises:
        ValueError: that is the case at `start`.
    """
    lr, found = start, None
    while _converges(Net(task, seed).train(lr, steps), steps):
        lr, found = lr * factor, lr
    if found is None:
        raise ValueError(f"`start` is {start}, where the loss rises in the last half of {steps} steps; start lower")
    return found


def _converges(losses: Sequence[float], steps: int) -> bool:
    return len(losses) == steps and not (np.diff(losses[steps // 2 :]) > 0).any()


def sharpening(task: str, seed: int, lr: float, steps: int, every: int) -> dict[str, Any]:
    """Loss and η λ_max from the first step on."""
    net = Net(task, seed)
    rule = torch.optim.SGD(net.model.parameters(), lr=lr)
    run = descend(net.model, net.objective(), rule, steps, measure_every=every, diverged=DIVERGED)
    kept = len(run["step"]) - run["diverged"]
    return {"step": run["step"][:kept], "loss": run["loss"][:kept], "edge": [lr * v for v in run["sharpness"][:kept]]}
