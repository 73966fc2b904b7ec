"""Experiments on sign methods: exact statements, theoretical rates, a skewed slope, digits, quadratics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ..data_order import DataOrder
from ..optimizers.lion import Lion
from ..optimizers.sign import SignSGD, theoretical_rates
from ..optimizers.sign_momentum2 import SignMomentum2
from ..workloads.digits import digits
from ..workloads.models import digits_mlp
from .character_training import single_thread, trained, tuned

SIZE, NOISE = 200, 1.0
QUADRATIC, STEP = (1.0, 3.0, 10.0), 0.02


def exact_statements() -> dict[str, float | None]:
    """Largest deviations over all steps from what holds exactly; None where there is no lion-pytorch."""
    gen = torch.Generator().manual_seed(0)
    gradients = torch.randn(200, 50, generator=gen, dtype=torch.float64)
    found = {"identity": identity_error(gradients), "transport": transport_error(gradients[:50])}
    parity = parity_error(gradients) if importlib.util.find_spec("lion_pytorch") is not None else None
    return {**found, "parity": parity}


def parity_error(gradients: Tensor) -> float:
    """Largest difference of the weights between Lion and that of lion-pytorch, with weight decay."""
    from lion_pytorch import Lion as TheirLion  # type: ignore[import-not-found]

    p, q = (torch.nn.Parameter(torch.zeros_like(gradients[0])) for _ in range(2))
    ours, theirs = Lion([p], lr=1e-3, weight_decay=0.1), TheirLion([q], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    apart = 0.0
    for g in gradients:
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
        apart = max(apart, float((p.detach() - q.detach()).abs().max()))
    return apart


def identity_error(gradients: Tensor) -> float:
    """Largest difference between Lion's u, from its own momentum, and the average of extrapolated gradients."""
    p = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    lion = Lion([p], lr=1e-3)
    c = lion.effective_extrapolation()[0]
    m, u, apart = torch.zeros_like(gradients[0]), 0.1 * gradients[0], 0.0
    for t, g in enumerate(gradients):
        if t > 0:
            u = 0.99 * u + (1 - 0.99) * (g + c * (g - gradients[t - 1]))
        apart = max(apart, float((u - (0.9 * m + (1 - 0.9) * g)).abs().max()))
        p.grad = g.clone()
        lion.step()
        m = lion.state[p]["momentum"].clone()
    return apart


def transport_error(A: Tensor) -> float:
    """Largest |m_t − (g(w_t) − θ^(t+1) g(w_0))| of the transport method on the quadratic with Hessian AᵀA/n."""
    H = A.T @ A / len(A)
    p = torch.nn.Parameter(A[0].clone())
    optimizer = SignMomentum2([p], lr=1e-2, momentum=0.9)
    first, largest = H @ A[0], 0.0
    for t in range(200):
        w = optimizer.state[p]["weights"].clone() if t else p.detach().clone()
        p.grad = H @ p.detach()
        optimizer.step()
        expected = H @ w - 0.9 ** (t + 1) * first
        largest = max(largest, float((optimizer.state[p]["momentum"] - expected).abs().max()))
    return largest


def mean_gradient_norm(method: str, steps: int, seeds: int) -> list[float]:
    """Mean over a run of the l1 norm of the true gradient of Σ λ_i √(1 + w_i²), per seed.

    λ runs evenly from 0.01 to 1, w starts at one, gradients have standard normal noise; rates as the theory sets them.
    """
    lambdas = torch.linspace(0.01, 1, SIZE, dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones(seeds, SIZE, dtype=torch.float64))
    optimizer = theoretical_optimizer(method, p, steps)
    streams = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    total = torch.zeros(seeds, dtype=torch.float64)
    with single_thread():
        for _ in range(steps):
            y = p.detach()
            # Of the transport method the parameters are the look-ahead.
            w = optimizer.state[p].get("weights", y)
            total += (lambdas * w / (1 + w * w).sqrt()).abs().sum(1)
            noise = torch.stack([torch.randn(SIZE, generator=gen, dtype=torch.float64) for gen in streams])
            p.grad = lambdas * y / (1 + y * y).sqrt() + NOISE * noise
            optimizer.step()
    return (total / steps).tolist()


def theoretical_optimizer(method: str, p: torch.nn.Parameter, steps: int) -> Optimizer:
    """One of `METHODS` with the rates of its theory for a run of that length; Lion has those of transport."""
    gamma, theta = theoretical_rates(steps, 1)
    gamma2, theta2 = theoretical_rates(steps, 2)
    makers: dict[str, Callable[[], Optimizer]] = {
        "signSGD": lambda: SignSGD([p], lr=gamma),
        "Signum": lambda: SignSGD([p], lr=gamma, momentum=theta),
        "transport": lambda: SignMomentum2([p], lr=gamma2, momentum=theta2),
        "Lion": lambda: Lion([p], lr=gamma2, betas=(1 - steps ** (-2 / 7), theta2)),
    }
    return makers[method]()


def skewed_runs(momentum: float, steps: int, runs: int) -> list[list[float]]:
    """Independent runs on 0.25 w with the gradient 4 (probability 1/4) or −1, steps of 1e-3.

    Returns:
        w at 101 equally spaced steps [101, runs].
    """
    gen = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(runs, dtype=torch.float64))
    optimizer = SignSGD([p], lr=1e-3, momentum=momentum)
    path = [p.detach().tolist()]
    with single_thread():
        for t in range(1, steps + 1):
            up = torch.rand(runs, generator=gen, dtype=torch.float64) < 0.25
            p.grad = torch.where(up, 4.0, -1.0).double()
            optimizer.step()
            if t % (steps // 100) == 0:
                path.append(p.detach().tolist())
    return path


def digits_run(optimizer: str, options: dict[str, Any], seed: int, steps: int, select: bool) -> dict[str, float]:
    """One training of the digits network on batches of 64.

    Args:
        select: Train on 1200 images and test on the other 300; else on all 1500, tested on the held-out 297.

    Returns:
        "accuracy" in points; "rms": largest |RMS of an update / lr − 1| over the steps, without decay, corrected for
        exact zeros.
    """
    data = digits()
    x, y = data.train
    train, test = ((x[:1200], y[:1200]), (x[1200:], y[1200:])) if select else ((x, y), data.held_out)
    order = DataOrder(len(train[0]), 64, seed)
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_mlp()
        params = list(model.parameters())
        made: Optimizer = Lion(params, **options) if optimizer == "Lion" else torch.optim.AdamW(params, **options)
        apart = 0.0
        for step in range(steps):
            chosen = order.at(step)
            made.zero_grad()
            F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
            before = [p.detach().clone() for p in params]
            made.step()
            if not options["weight_decay"]:
                moves = torch.cat([(p.detach() - q).flatten() for p, q in zip(params, before, strict=True)])
                moved = moves[moves != 0]
                apart = max(apart, abs(float(moved.double().square().mean().sqrt()) / options["lr"] - 1))
        with torch.no_grad():
            right = (model(test[0]).argmax(1) == test[1]).double().mean()
    return {"accuracy": 100 * float(right), "rms": apart}


def digits_tuned(optimizer: str, lrs: list[float], decays: list[float], seeds: int, steps: int) -> dict[str, Any]:
    """The best of all pairs on 300 images kept aside, two seeds each, and its accuracies on those held out."""
    table = {}
    for lr in lrs:
        for decay in decays:
            options = {"lr": lr, "weight_decay": decay}
            runs = [digits_run(optimizer, options, 100 + seed, steps, True) for seed in range(2)]
            table[lr, decay] = sum(run["accuracy"] for run in runs) / 2
    lr, decay = max(table, key=lambda pair: table[pair])
    chosen = {"lr": lr, "weight_decay": decay}
    return {
        **chosen,
        "accuracies": [digits_run(optimizer, chosen, seed, steps, False)["accuracy"] for seed in range(seeds)],
        "rms": digits_run(optimizer, {"lr": lr, "weight_decay": 0.0}, 0, steps, False)["rms"],
    }


def text_tuned(optimizer: str, lrs: list[float], decays: list[float], seeds: int, steps: int) -> dict[str, Any]:
    """The best of all pairs by train loss on the first seed, and its held-out losses in nats per character.

    Returns:
        "lr", "weight_decay", "losses" per seed; "at_edge": whether the best lr is the smallest or largest one tried.
    """
    table = {decay: tuned(optimizer, {"weight_decay": decay}, lrs, seeds=[0], steps=steps) for decay in decays}
    decay = min(table, key=lambda decay: table[decay]["train"][0])
    best = table[decay]
    options = {"lr": best["lr"], "weight_decay": decay}
    others = [trained(optimizer, options, seed=seed, steps=steps)["held_out"] for seed in range(1, seeds)]
    return {**options, "losses": [*best["losses"], *others], "at_edge": best["at_edge"]}


def quadratic_run(rotation: int | None, steps: int) -> dict[str, Any]:
    """signSGD with a constant step on the quadratic diag(1, 3, 10), in a random orthogonal basis for a seed.

    Returns:
        "losses"; "late": largest loss of the last hundred steps; "period2": whether w repeats after two steps;
        "largest": largest |w_i| of the last hundred steps.
    """
    H = torch.diag(torch.tensor(QUADRATIC, dtype=torch.float64))
    if rotation is not None:
        gen = torch.Generator().manual_seed(rotation)
        Q = torch.linalg.qr(torch.randn(3, 3, generator=gen, dtype=torch.float64)).Q
        H = Q @ H @ Q.T
    p = torch.nn.Parameter(torch.tensor([1.013, -0.771, 0.389], dtype=torch.float64))
    optimizer = SignSGD([p], lr=STEP)
    losses, path = [], []
    for _ in range(steps):
        p.grad = H @ p.detach()
        optimizer.step()
        w = p.detach().clone()
        losses.append(float(0.5 * w @ H @ w))
        path.append(w)
    late = torch.stack(path[-100:])
    return {
        "losses": losses,
        "late": max(losses[-100:]),
        "period2": bool((late[-1] - late[-3]).abs().max() < 1e-12),
        "largest": float(late.abs().max()),
    }
