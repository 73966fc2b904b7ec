"""Every optimizer with a threshold trains at its edge of stability, in its own geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..optimizers.adam_mini import AdamMini
from ..point import Point
from ..preconditioned_measurements import ThresholdRatio
from ..workloads.catalogue import workload
from .claim_numbers import listed
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study

GRADIENT_PAPER = "Cohen et al. 2021, section 3"
ADAPTIVE_PAPER = "Cohen et al. 2022, section 3"

# Learning rates so small that even the very first step is stable, whose second moment is that of a single gradient:
# where an entry of it happens to be tiny, so is P. Steps enough to see the edge reached and held. β₂ = 0.99 forgets the
# early gradients in a hundred steps, so that sharpening shows within thousands.
RUNS: dict[str, dict[str, Any]] = {
    "gradient descent": {"optimizer": "SGD", "options": {"lr": 0.3}, "steps": 1500},
    "heavy ball": {"optimizer": "SGD", "options": {"lr": 0.2, "momentum": 0.9}, "steps": 1500},
    "RMSprop": {"optimizer": "RMSprop", "options": {"lr": 9e-6, "alpha": 0.99}, "steps": 6500},
    "Adam": {"optimizer": "Adam", "options": {"lr": 7.5e-5, "betas": [0.9, 0.99]}, "steps": 5500},
    "Adam-mini": {"optimizer": "AdamMini", "options": {"lr": 4e-4, "betas": [0.9, 0.99]}, "steps": 1500},
}
NUM_EXAMPLES, MEASUREMENTS = 500, 100
START, END = 0.6, (0.8, 1.3)


def trained(optimizer: str, options: Mapping[str, Any], steps: int, num_examples: int, seed: int) -> dict[str, Any]:
    """The ratio of the coming step to its threshold along a full-batch training, and the loss."""
    torch.set_num_threads(1)
    task = workload("digits-mlp", seed=seed, num_examples=num_examples)
    objective, rule = task.objective(), _made(optimizer, task.model, options)
    measurement, every = ThresholdRatio(tol=1e-2), max(1, steps // MEASUREMENTS)
    state: dict[str, Any] = {}
    found: dict[str, Any] = {"step": [], "ratio": [], "loss": [], "converged": 0}
    for step in range(steps + 1):
        if step % every == 0:
            point = Point(step, objective, rule, state=state)
            [row] = measurement.measure(point)
            found["step"].append(step)
            found["ratio"].append(row.value)
            found["loss"].append(point.loss())
            found["converged"] += row.converged
        rule.zero_grad()
        task.loss(task.train).backward()
        rule.step()
    return found


def ends(ratios: Sequence[float]) -> tuple[float, float, float, float]:
    """First, mean of the last fifth, smallest, largest."""
    last = ratios[-(len(ratios) // 5) :]
    return ratios[0], math.fsum(last) / len(last), min(ratios), max(ratios)


def investigate(laboratory: Laboratory) -> tuple[list[Claim], list[Panel]]:
    seeds = [0] if laboratory.quick else [0, 1, 2]
    claims, panels = [], []
    for name, settings in RUNS.items():
        lines, found = [], []
        for seed in seeds:
            part = f"{name.replace(' ', '-')}-{seed}"
            steps = settings["steps"] * 2 // 3 if laboratory.quick else settings["steps"]
            run = laboratory.part(part, trained, **{**settings, "steps": steps}, num_examples=NUM_EXAMPLES, seed=seed)
            found.append(ends(run["ratio"]))
            lines.append(Line(f"seed {seed}", run["step"], run["ratio"]))
        claims.append(_claim(name, settings, found))
        options = ", ".join(f"{key} {value}" for key, value in settings["options"].items())
        panels.append(Panel(f"{name} ({options})", "step", "threshold ratio", lines, levels={"edge": 1.0}))
    return claims, panels


def _made(name: str, model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    if name == "AdamMini":
        return AdamMini(model.parameters(), model=model, **options)
    return getattr(torch.optim, name)(model.parameters(), **options)


def _claim(name: str, settings: Mapping[str, Any], found: Sequence[tuple[float, ...]]) -> Claim:
    starts, lasts, smallest, largest = ([run[i] for run in found] for i in range(4))
    plain = settings["optimizer"] == "SGD"
    return Claim(
        f"{name} sharpens until its steps are at the edge of stability, and stays there",
        "derived here" if name == "Adam-mini" else GRADIENT_PAPER if plain else ADAPTIVE_PAPER,
        f"threshold ratio below {START:g} before the first step, its mean over the last fifth in "
        f"[{END[0]:g}, {END[1]:g}]",
        f"starts at {listed(starts)}, ends at {listed(lasts)}; smallest {listed(smallest)}, largest {listed(largest)}",
        all(start < START and END[0] <= last <= END[1] for start, last in zip(starts, lasts, strict=True)),
        "" if plain else "the first step's second moment is that of one gradient, whose tiniest entries set the ratio",
    )


STUDY = Study(
    name="adaptive-edge",
    title="The edge of stability, in the geometry of each optimizer",
    paper="Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, 2021; "
    "Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022",
    setting="digits-mlp: 64-100-100-10 with tanh and squared error on 500 handwritten digits, full batch, "
    "float32; three initial weights (in the short version one, and two thirds of the steps). Learning rates of the "
    "adaptive methods were lowered until seeds 0 and 1 start below 0.6; seed 2 was then run once. Threshold ratio of "
    "the coming step, measured 100 times.",
    investigate=investigate,
)
