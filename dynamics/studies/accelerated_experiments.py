"""Experiments on accelerated SGD: its modes, its exact risk, simulated runs, and a network on digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..data_order import DataOrder
from ..eigen_response import EigenResponse
from ..linear_risk import linear_risk, sampled_linear_risk, second_moment_radius
from ..optimizers.accelerated import AcceleratedSGD, NesterovForm, accelerated_options
from ..point import Point
from ..spectra_measurements import Sharpness
from ..workloads.catalogue import workload
from .character_training import single_thread

DIM, PSI, KT, NOISE = 60, 3.0, 5, 0.01
SPECTRUM: NDArray[np.float64] = 1 / np.arange(1, DIM + 1, dtype=np.float64) ** 2
RULE = accelerated_options(SPECTRUM.tolist(), KT, PSI)
RULES: dict[str, dict[str, Any]] = {"ASGD": RULE, "SGD": {**RULE, "gamma": RULE["lr"]}}
PROBES = (1.0, 0.1, 0.01, 1e-4)


def response() -> EigenResponse:
    """Of the reference rule."""
    alpha, beta = RULE["alpha"], RULE["beta"]
    c, q = alpha * (1 - beta), alpha * RULE["lr"] + (1 - alpha) * RULE["gamma"]
    return EigenResponse(NesterovForm(c, RULE["lr"], q))


def direction(k: int | None) -> NDArray[np.float64]:
    """The unit vector of the k-th eigenvalue, from 1; zero for None."""
    return np.zeros(DIM) if k is None else np.eye(DIM)[k - 1]


def modes() -> dict[str, Any]:
    """Eigenvalues of the update of (w, v), against the roots of the recursion of y and against plain SGD.

    Returns:
        "difference": largest between the two, over all λ; "moduli" and "plain" at `PROBES`; "range" of λ with complex
        roots; "even": λ from which on SGD is faster; "slow": (q − cδ)/(1 − c) over (γ + δ)/2, less 1; "faster": those k
        in the range at which ASGD is faster than SGD; "below": those with λ_k below "even"; "form": c, δ, q.
    """
    delta, gamma, beta, alpha = (RULE[key] for key in ("lr", "gamma", "beta", "alpha"))
    found = response()
    apart = 0.0
    for value in (*SPECTRUM, *PROBES):
        to_y = np.array([alpha, 1 - alpha])
        update = np.array([(1 - delta * value) * to_y, (beta - gamma * value) * to_y + [0, 1 - beta]])
        values, roots = np.linalg.eigvals(update), found.roots(value)
        apart = max(apart, min(float(np.abs(values - pair).max()) for pair in (roots, roots[::-1])))
    low, high = found.complex_range or (np.nan, np.nan)
    inside = np.flatnonzero((low < SPECTRUM) & (high > SPECTRUM))
    plain = np.abs(1 - delta * SPECTRUM)
    return {
        "difference": apart,
        "moduli": found.modulus(PROBES).tolist(),
        "plain": [abs(1 - delta * value) for value in PROBES],
        "range": [low, high],
        "even": found.even_eigenvalue,
        "slow": found.slow_step / ((gamma + delta) / 2) - 1,
        "faster": [int(k) + 1 for k in inside if found.modulus(SPECTRUM)[k] < plain[k]],
        "below": [int(k) + 1 for k in inside if SPECTRUM[k] < found.even_eigenvalue],
        "form": list(found.form),
    }


def exact_risks(steps: int, average_from: int) -> dict[str, Any]:
    """Risk curves of ASGD and SGD from an error along e_1 ("head"), e_10 ("tail"), and from noise ("variance").

    Returns:
        By case and rule: "curve" [steps + 1] and "average", the risk of the tail average at the end; "ratios": ASGD
        over SGD after `steps` for an error along each e_k; "early": the same after 200 steps.
    """
    found: dict[str, Any] = {}
    for case, start, noise in (("head", 1, 0.0), ("tail", 10, 0.0), ("variance", None, NOISE)):
        for name, rule in RULES.items():
            curve = linear_risk(SPECTRUM, direction(start), noise, steps, **rule).risk
            average = linear_risk(SPECTRUM, direction(start), noise, steps, **rule, average_from=average_from)
            found[f"{case}-{name}"] = {"curve": curve.tolist(), "average": float(average.risk[-1])}
    ratios = []
    for k in range(1, DIM + 1):
        both = [linear_risk(SPECTRUM, direction(k), 0.0, steps, **rule).risk[[200, -1]] for rule in RULES.values()]
        ratios.append((both[0] / both[1]).tolist())
    return {**found, "early": [ratio[0] for ratio in ratios], "ratios": [ratio[1] for ratio in ratios]}


def growth(factors: list[float]) -> dict[str, list[float]]:
    """Spectral radii of mean and second moments with γ times each factor."""
    found: dict[str, list[float]] = {"mean": [], "second": []}
    for factor in factors:
        rule: dict[str, Any] = {**RULE, "gamma": factor * RULE["gamma"]}
        q = rule["alpha"] * rule["lr"] + (1 - rule["alpha"]) * rule["gamma"]
        form = NesterovForm(response().form.momentum, rule["lr"], q)
        found["mean"].append(float(EigenResponse(form).modulus(SPECTRUM).max()))
        found["second"].append(second_moment_radius(SPECTRUM, **rule))
    return found


def simulated(seed: int, runs: int, steps: int) -> list[dict[str, float | str]]:
    """Simulated and exact risks, of w and of the average over the second half, for the cases of `exact_risks`."""
    found: list[dict[str, float | str]] = []
    for case, start, noise in (("head", 1, 0.0), ("tail", 10, 0.0), ("variance", None, NOISE)):
        for name, rule in RULES.items():
            for average_from in (None, steps // 2):
                options: dict[str, Any] = {**rule, "average_from": average_from}
                exact = linear_risk(SPECTRUM, direction(start), noise, steps, **options).risk[-1]
                options |= {"runs": runs, "seed": 1000 * seed + len(found)}
                sample = sampled_linear_risk(SPECTRUM, direction(start), noise, steps, **options)
                label = f"{case} {name}" + (" averaged" if average_from else "")
                found.append({"case": label, "exact": float(exact), "sampled": sample.risk, "error": sample.error})
    return found


def recursions(seed: int, steps: int) -> dict[str, float]:
    """Largest differences on one stream of examples of the reference instance.

    Returns:
        "torch": between `AcceleratedSGD` on a linear model and the recursion in NumPy; "reduced": between the recursion
        with γ = δ, over several β, and plain SGD.
    """
    random = np.random.default_rng(seed)
    x = random.standard_normal((steps, DIM)) * np.sqrt(SPECTRUM)
    labels = x @ random.standard_normal(DIM) + NOISE**0.5 * random.standard_normal(steps)
    model = nn.Linear(DIM, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(random.standard_normal((1, DIM))))
    start = model.weight.detach().numpy()[0].copy()
    optimizer = AcceleratedSGD.from_spectrum(model.parameters(), SPECTRUM.tolist(), KT, PSI)
    path = _path(x, labels, start, **RULE)
    apart = 0.0
    with single_thread():
        for t in range(steps):
            optimizer.zero_grad()
            residual = model(torch.from_numpy(x[t])) - labels[t]
            (0.5 * residual.square()).sum().backward()
            optimizer.step()
            with optimizer.swap_to_output():
                apart = max(apart, float(np.abs(model.weight.detach().numpy()[0] - path[t]).max()))
    plain, w = [], start
    for features, label in zip(x, labels, strict=True):
        w = w - RULE["lr"] * (features @ w - label) * features
        plain.append(w)
    reduced = 0.0
    for beta in (0.0, RULE["beta"], 0.3, 1.0):
        same = _path(x, labels, start, RULE["lr"], RULE["lr"], beta, 1 / (1 + beta))
        reduced = max(reduced, float(np.abs(same - np.stack(plain)).max()))
    return {"torch": apart, "reduced": reduced}


def _path(
    x: NDArray[np.float64],
    labels: NDArray[np.float64],
    start: NDArray[np.float64],
    lr: float,
    gamma: float,
    beta: float,
    alpha: float,
) -> NDArray[np.float64]:
    """w after each example, [steps, d]."""
    w = v = start
    found = []
    for features, label in zip(x, labels, strict=True):
        y = alpha * w + (1 - alpha) * v
        gradient = (features @ y - label) * features
        w, v = y - lr * gradient, beta * y + (1 - beta) * v - gamma * gradient
        found.append(w)
    return np.stack(found)


def digits_run(rule: str, lr: float, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Trains "digits-mlp" on 500 digits in batches of 50, with γ/δ and β of the reference rule at another δ.

    Returns:
        "step"; "loss" and "sharpness" of the output w on all 500 at these; "threshold": of a full-batch step.
    """
    with single_thread():
        task = workload("digits-mlp", seed=seed, num_examples=500)
        objective, order = task.objective(), DataOrder(task.train.num, 50, seed)
        gamma = lr * RULES[rule]["gamma"] / RULE["lr"]
        optimizer = AcceleratedSGD(task.model.parameters(), lr=lr, gamma=gamma, beta=RULE["beta"])
        measurement, state = Sharpness(tol=1e-2), {}
        found: dict[str, Any] = {"step": [], "loss": [], "sharpness": []}
        for step in range(steps + 1):
            if step % every == 0:
                with optimizer.swap_to_output():
                    point = Point(step, objective, state=state)
                    found["step"].append(step)
                    found["loss"].append(point.loss())
                    found["sharpness"].append(next(iter(measurement.measure(point))).value)
            optimizer.zero_grad()
            task.loss(task.train.chosen(order.at(step))).backward()
            optimizer.step()
    return {**found, "threshold": optimizer.stability_threshold()}
