"""Where the critical constants are known: one linear unit, two linear layers on one example, scans put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from ...landscape.objective import Objective
from ..critical_constants import EarlyRun, critical_constants
from ..uv_model import UVModel, uv_map, uv_sharpness
from .character_training import single_thread
from .descent import descend
from .digit_problems import half_squares

STEPS = 10


def linear_unit(seeds: Sequence[int], cs: Sequence[float]) -> dict[str, Any]:
    """w·x on one example: L_t / L_0 = (1 − c)^(2t), so that c_loss is 2 and the sharpness stays.

    Returns:
        "brackets" of c_loss and "c_sharp" by seed; "error", the largest relative one of the losses.
    """
    brackets, sharp, error = [], [], 0.0
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 6, generator=random, dtype=torch.float64)
        y = torch.randn(1, 1, generator=random, dtype=torch.float64)
        model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        objective = Objective.supervised(model, half_squares, (x, y))
        runs = []
        for c in cs:
            with torch.no_grad():
                model.weight.copy_(torch.linspace(-1, 1, 6)[None])
            lr = c / float(x.square().sum())
            run = descend(model, objective, SGD(model.parameters(), lr=lr), STEPS)
            runs.append(EarlyRun(c, run["loss"], run["sharpness"], run["diverged"]))
            exact = run["loss"][0] * (1.0 - c) ** (2 * np.arange(STEPS + 1))
            error = max(error, _difference(run["loss"], exact))
        found = critical_constants(runs, steps=STEPS)
        brackets.append(found.bracket("c_loss"))
        sharp.append(found.c_sharp)
    return {"brackets": brackets, "c_sharp": sharp, "error": error}


def two_layers(width: int, seeds: Sequence[int], cs: Sequence[float], late_steps: int) -> dict[str, Any]:
    """vᵀ U x / √n on one example, trained and by its closed map.

    Returns:
        By seed "trained" and "mapped", the critical constants; "loss" and "sharpness", their largest relative
        differences in the runs up to c = 3.
    """
    found: dict[str, Any] = {"trained": [], "mapped": [], "loss": 0.0, "sharpness": 0.0}
    with single_thread():
        for seed in seeds:
            pairs = [_both(width, seed, c, late_steps) for c in cs]
            for i, name in enumerate(("loss", "sharpness")):
                found[name] = max(found[name], *(error[i] for c, (_, error) in zip(cs, pairs, strict=True) if c <= 3))
            for i, name in enumerate(("trained", "mapped")):
                constants = critical_constants([pair[i] for pair, _ in pairs], steps=STEPS)
                found[name].append([constants.c_loss, constants.c_sharp, constants.c_max])
    return found


def _both(width: int, seed: int, c: float, late_steps: int) -> tuple[tuple[EarlyRun, EarlyRun], tuple[float, float]]:
    """One run of the network and one of the map at η = c / λ_0, and how far loss and sharpness differ."""
    model = UVModel(width, 6, seed=seed)
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y, a = 1.0, float(x.square().sum()) / model.N
    lr = c / model.sharpness_exact(x[0], y)
    F, L, Y = model.scaled(x[0], y, lr)
    objective = Objective.supervised(model, half_squares, (x, torch.full((1,), y, dtype=torch.float64)))
    optimizer = SGD(model.parameters(), lr=lr)
    run = descend(model, objective, optimizer, STEPS)
    diverged = run["diverged"]
    if not diverged:
        diverged = descend(model, objective, optimizer, late_steps, measure_every=None)["diverged"]
    loss, sharpness = [], []
    for _ in range(STEPS + late_steps + 1):
        loss.append(0.5 * (F - Y) ** 2 / (lr**2 * a))
        sharpness.append(float(uv_sharpness(F, L, Y)) / lr)
        if not loss[-1] <= 1e5:
            break
        F, L = uv_map(F, L, Y)
    mapped = EarlyRun(c, loss[: STEPS + 1], sharpness[: STEPS + 1], not loss[-1] <= 1e5)
    error = (_difference(run["loss"], loss), _difference(run["sharpness"], sharpness))
    return (EarlyRun(c, run["loss"], run["sharpness"], diverged), mapped), error


def _difference(measured: Sequence[float], exact: Sequence[float]) -> float:
    """Largest difference, relative to the exact value or, where that is larger, to the first one."""
    a, b = (np.asarray(values[: STEPS + 1], dtype=float) for values in (measured, exact))
    n = min(len(a), len(b))
    return float(np.nanmax(np.abs(a[:n] - b[:n]) / np.maximum(b[:n], b[0])))


def recovered(num: int, seed: int) -> int:
    """Of `num` scans put together around critical constants drawn at random, from how many these are found again."""
    random = np.random.default_rng(seed)
    grid = 2.0 ** (0.2 * np.arange(26))
    right = 0
    for _ in range(num):
        at = np.sort(random.integers(1, len(grid), 4))
        c_loss, c_sharp, c_barrier, c_diverged = grid[at]
        runs = []
        for c in random.permutation(grid):
            falling, rising = np.linspace(1, 0.3, STEPS + 1), np.linspace(1, 1 + random.uniform(0.01, 5), STEPS + 1)
            bump = np.ones(STEPS + 1)
            bump[random.integers(1, STEPS + 1)] = 1 + random.uniform(0.01, 5)
            loss = bump if c >= c_loss else falling
            sharpness = (bump if random.random() < 0.5 else rising) if c >= c_sharp else falling
            path = rising if c >= c_barrier else falling
            scales = random.uniform(0.1, 10, 2)
            loss, sharpness = (scales[0] * loss).tolist(), (scales[1] * sharpness).tolist()
            runs.append(EarlyRun(float(c), loss, sharpness, bool(c >= c_diverged), (scales[0] * path).tolist()))
        found = critical_constants(runs, steps=STEPS)
        c_max = grid[at[3] - 1]
        # No path is looked at where training diverged.
        expected = (c_loss, c_sharp, c_barrier if c_barrier < c_diverged else c_max, c_max)
        right += (found.c_loss, found.c_sharp, found.c_barrier, found.c_max) == expected
    return right
