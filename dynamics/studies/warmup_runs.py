"""What the study of warmup measures: nets on digits, full batch, and exact statements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...hessian.curvature import Hessian
from ...hessian.eigs import top_eigenvalues
from ...hessian.tracking import EigenTracker
from ...kernels.accurate import dot
from ...landscape.objective import Objective
from ..optimizers.catapult import catapult_learning_rate
from ..optimizers.gi_adam import GIAdam
from ..optimizers.preconditioners import preconditioner_of
from ..optimizers.warmup import CatapultWarmup, LinearWarmup
from ..point import Point
from ..preconditioned_measurements import PreconditionedSharpness
from .digit_problems import digit_examples, fully_connected, half_squares, one_hot

NUM_DIGITS = 500
DIVERGED = 1e5
# 64-12-12-10: 1032 weights.
SMALL: dict[str, Any] = {"depth": 3, "width": 12, "activation": "tanh"}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Net:
    """A fully connected net on the first digits, one-hot targets, half squares averaged over examples and outputs."""

    def __init__(
        self, seed: int, *, depth: int = 4, width: int = 128, activation: str = "relu", zero_output: bool = False
    ) -> None:
        torch.set_num_threads(1)
        self.inputs, self.labels = digit_examples(NUM_DIGITS)
        self.targets = one_hot(self.labels)
        self.model = fully_connected(
            depth, width, activation=ACTIVATIONS[activation], zero_output=zero_output, seed=seed
        )

    def objective(self) -> Objective:
        return Objective.supervised(self.model, half_squares, (self.inputs, self.targets), check=False)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def backward(self) -> float:
        """The loss; leaves its gradients in `.grad`."""
        self.model.zero_grad()
        loss = half_squares(self.model(self.inputs), self.targets)
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def loss(self) -> float:
        return float(half_squares(self.model(self.inputs), self.targets))

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the digits it was trained on."""
        return float((self.model(self.inputs).argmax(1) == self.labels).double().mean())

    def sharpness(self, tol: float = 1e-3) -> float:
        return float(top_eigenvalues(Hessian(self.objective()), tol=tol).values[0])


def initial(seed: int, zero_output: bool) -> dict[str, float]:
    """Sharpness and loss at the first weights."""
    net = Net(seed, zero_output=zero_output)
    return {"sharpness": net.sharpness(1e-6), "loss": net.loss()}


# --- exact statements -----------------------------------------------------------------------------------------------


def first_step(seed: int) -> dict[str, Any]:
    """Preconditioned sharpness before the first step of Adam and GI-Adam, by the library and by the dense matrix."""
    net = Net(seed, **SMALL)
    objective = net.objective()
    gradient, dense = objective.gradient(), Hessian(objective).dense()
    found: dict[str, Any] = {"parameters": objective.num_parameters}
    rules = {
        "adam": GIAdam(net.parameters(), v0_scale=0.0),
        "gi": GIAdam(net.parameters()),
        "ri": GIAdam(net.parameters(), v0="random", seed=seed),
    }
    for name, rule in rules.items():
        P = preconditioner_of(rule, objective, gradient=gradient)
        value = float(top_eigenvalues(P.operator(Hessian(objective)), tol=1e-9).values[0])
        assert P.diagonal is not None
        root = P.diagonal.rsqrt()
        exact = float(torch.linalg.eigvalsh(root[:, None] * dense * root[None, :])[-1])
        found[name] = value
        found[f"{name}_error"] = abs(value - exact) / exact
        if name == "adam":
            closed = 0.1 * (gradient.abs() + 1e-8)
            found["P_error"] = float(((P.diagonal - closed) / closed).abs().max())
    return found


def equal_sizes(steps: int, seed: int) -> float:
    """Largest distance of GI-Adam from torch's Adam with rate η √(1 − β₂ᵗ), for gradients of constant size."""
    random, apart = torch.Generator().manual_seed(seed), 0.0
    start = torch.randn(5, generator=random, dtype=torch.float64)
    size = torch.rand(5, generator=random, dtype=torch.float64) + 1e-2
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gi, adam = GIAdam([mine], lr=1.0, eps=0.0), torch.optim.Adam([theirs], lr=1.0, eps=0.0, foreach=False)
    for t in range(1, steps + 1):
        sign = torch.randint(0, 2, (5,), generator=random) * 2 - 1
        mine.grad, theirs.grad = sign * size, sign * size
        adam.param_groups[0]["lr"] = math.sqrt(1 - 0.999**t)
        gi.step()
        adam.step()
        apart = max(apart, float((mine - theirs).detach().abs().max()))
    return apart


def companion_radius(share: float, beta: float = 0.9, lr: float = 0.01) -> float:
    """Spectral radius of momentum as an average at `share` of the threshold that the library states."""
    rule = GIAdam([nn.Parameter(torch.zeros(1))], lr=lr, betas=(beta, 0.999))
    threshold = rule.stability_threshold()
    assert threshold is not None
    h = share * threshold
    # (x, m) -> m' = β m + (1 − β) h x, x' = x − η m'
    step = np.array([[1 - lr * (1 - beta) * h, -lr * beta], [(1 - beta) * h, beta]])
    return float(np.abs(np.linalg.eigvals(step)).max())


# --- the search of the initial learning rate ------------------------------------------------------------------------


def search(seed: int, rule: str, delta: float, *, small: bool = False) -> dict[str, Any]:
    """η_c of gradient descent or Adam at the first weights, against the curvature there.

    Args:
        small: Of the tanh net with 1032 weights, instead of the ReLU net.
    """
    net = Net(seed, **SMALL) if small else Net(seed)
    objective = net.objective()
    make = torch.optim.SGD if rule == "SGD" else torch.optim.Adam
    start = 1e-4 if rule == "SGD" else 1e-6
    rate = catapult_learning_rate(objective, make(net.parameters(), lr=1.0), delta=delta, start=start)
    gradient = objective.gradient()
    curvature = float(dot(gradient, Hessian(objective) @ gradient))
    return {
        "lr": rate.lr,
        "passes": rate.forward_passes,
        "converged": rate.converged,
        "along_gradient": 2 * float(dot(gradient, gradient)) / curvature,
        "sharpest": 2 / net.sharpness(1e-6),
    }


def parabola(curvature: float, delta: float) -> dict[str, Any]:
    """η_c on l x²/2, whose loss ratio at η is (1 − ηl)²; the budget is wide enough to converge."""
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    objective = Objective.from_closure(lambda p: 0.5 * curvature * p.square().sum(), [x])
    rate = catapult_learning_rate(objective, torch.optim.SGD([x], lr=1.0), delta=delta, max_forward_passes=60)
    return {"lr": rate.lr, "low": 2 / curvature, "high": (1 + math.sqrt(1 + delta)) / curvature}


def reached(target: float, init: float, warmup_steps: int) -> int:
    """The first step with η_trgt, of a warmup that starts at η_init and rises at the rate of one from zero."""
    rule = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=target)
    schedule = LinearWarmup(rule, warmup_steps, init, keep_rate=True)
    for t in range(1, warmup_steps + 1):
        if rule.param_groups[0]["lr"] >= target * (1 - 1e-12):
            return t
        rule.step()
        schedule.step()
    return warmup_steps


# --- training -------------------------------------------------------------------------------------------------------


def warmed(
    seed: int,
    rate: float,
    warmup_steps: int,
    steps: int,
    *,
    init: float = 0.0,
    zero_output: bool = False,
    measure_every: int | None = None,
) -> dict[str, Any]:
    """Gradient descent with a linear warmup.

    Args:
        rate: η_trgt.
        init: η_init.
        measure_every: Of the sharpness; None measures it at the end only.

    Returns:
        Losses before each step and after the last, η λ_max and η at the end; "diverged"; and with `measure_every`
        records of "step", "sharpness" and "threshold" 2/η_t of the step about to be made.
    """
    net = Net(seed, zero_output=zero_output)
    rule = torch.optim.SGD(net.parameters(), lr=rate)
    schedule = LinearWarmup(rule, warmup_steps, init, keep_rate=init > 0)
    tracker, hessian = EigenTracker(tol=1e-2), Hessian(net.objective())
    found: dict[str, Any] = {"loss": [], "step": [], "sharpness": [], "threshold": []}
    for step in range(steps + 1):
        found["loss"].append(net.backward())
        found["diverged"] = not found["loss"][-1] <= DIVERGED
        if found["diverged"]:
            break
        lr = float(rule.param_groups[0]["lr"])
        if measure_every is not None and step % measure_every == 0:
            found["step"].append(step)
            found["sharpness"].append(float(tracker.measure(hessian).values[0]))
            found["threshold"].append(2 / lr)
        if step < steps:
            rule.step()
            schedule.step()
    if not found["diverged"]:
        found |= {"edge": rate * net.sharpness(), "accuracy": net.accuracy()}
    return found


def natural(seed: int, share: float, steps: int, every: int, zero_output: bool) -> dict[str, Any]:
    """Gradient descent at the constant rate `share` · 2/λ_0, as `warmed`, with the sharpness at its first two steps."""
    net = Net(seed, zero_output=zero_output)
    first = net.sharpness(1e-8)
    lr = share * 2 / first
    run = warmed(seed, lr, 1, steps, zero_output=zero_output, measure_every=every)
    net.backward()
    torch.optim.SGD(net.parameters(), lr=lr).step()
    return {**run, "first": first, "second": net.sharpness(1e-8)}


def boundary(seed: int, warmup_steps: int, shares: Sequence[float], steps: int) -> list[dict[str, Any]]:
    """Ends of warmed-up runs to η_trgt = c/λ_0, for each c of `shares`."""
    first = Net(seed).sharpness(1e-6)
    found = []
    for c in shares:
        run = warmed(seed, c / first, warmup_steps, steps)
        kept = {key: run.get(key) for key in ("diverged", "edge", "accuracy")}
        found.append({"c": c, **kept, "final": run["loss"][-1], "largest": max(run["loss"]), "initial": run["loss"][0]})
    return found


def persistent(seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Gradient descent that is warmed up by catapults all the way."""
    net = Net(seed)
    rule = torch.optim.SGD(net.parameters(), lr=rate)
    objective = net.objective()
    warmup = CatapultWarmup(
        rule, rate, lambda: catapult_learning_rate(objective, rule, target=rate, delta=0.1, start=1e-3).lr
    )
    losses, reached_at = [], None
    for step in range(steps + 1):
        losses.append(net.backward())
        if not losses[-1] <= DIVERGED:
            break
        warmup.step(losses[-1])
        reached_at = step if warmup.finished and reached_at is None else reached_at
        rule.step()
    return {"loss": losses, "reached": reached_at, "estimates": warmup.num_estimates}


def adaptive(
    method: str,
    seed: int,
    lr: float,
    steps: int,
    *,
    activation: str = "relu",
    zero_output: bool = False,
    measure_every: int | None = None,
) -> dict[str, Any]:
    """Adam or GI-Adam on the full batch.

    Returns:
        Losses before each step and after the last, "accuracy"; and with `measure_every` records of "step" and of the
        preconditioned sharpness of the coming step, with the "threshold" it has, 38/η.
    """
    net = Net(seed, activation=activation, zero_output=zero_output)
    rule: Optimizer = adam(method, net.parameters(), lr)
    measurement, state = PreconditionedSharpness(tol=1e-2), {}
    objective = net.objective()
    found: dict[str, Any] = {"loss": [], "step": [], "sharpness": [], "threshold": 38 / lr}
    for step in range(steps + 1):
        if measure_every is not None and step % measure_every == 0:
            rows = {row.quantity: row.value for row in measurement.measure(Point(step, objective, rule, state=state))}
            found["step"].append(step)
            found["sharpness"].append(rows["preconditioned_sharpness"])
        found["loss"].append(net.backward())
        if step < steps:
            rule.step()
    return {**found, "accuracy": net.accuracy()}


def adam(method: str, parameters: Sequence[Tensor], lr: float) -> Optimizer:
    """ "Adam" or "GI-Adam"."""
    made: Mapping[str, type[Optimizer]] = {"Adam": torch.optim.Adam, "GI-Adam": GIAdam}
    return made[method](parameters, lr=lr)  # type: ignore[call-arg]
