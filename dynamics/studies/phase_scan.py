"""Early training of fully connected networks on digits, scanned over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from ...hessian.curvature import Hessian
from ...hessian.tracking import EigenTracker
from ...landscape.objective import Objective
from ..critical_constants import EarlyRun, critical_constants, learning_rate_from_c
from .character_training import single_thread
from .descent import descend
from .digit_problems import digit_examples, fully_connected, half_squares, one_hot

EARLY_STEPS = 10
# Steps more in which a training that diverges is given time to do so.
LATE_STEPS = 40
# Of eigenvalues: a fifth of the rise that counts as one.
TOL, PROOF = 2e-4, 10
# Of the segment from the first weights to those after the early steps: barriers near its beginning are narrow.
PATH_STEPS = 100
CONSTANTS = ("c_loss", "c_sharp", "c_barrier", "c_max")


def digits_data(num: int = 500, *, shuffled: bool = False) -> tuple[Tensor, Tensor]:
    """The first `num` digits and one-hot labels, `shuffled` those of other digits."""
    inputs, labels = digit_examples(num)
    if shuffled:
        labels = labels[torch.randperm(num, generator=torch.Generator().manual_seed(0))]
    return inputs, one_hot(labels)


def digits_problem(
    depth: int, width: int, seed: int, data: tuple[Tensor, Tensor], *, zero_output: bool = False
) -> tuple[nn.Sequential, Objective]:
    """A network at its initial weights and its squared error on all of `data`."""
    model = fully_connected(depth, width, zero_output=zero_output, seed=seed)
    return model, Objective.supervised(model, half_squares, data)


def early_runs(
    depth: int, width: int, seed: int, cs: Sequence[float], zero_output: bool = False, risen: Sequence[str] = ()
) -> dict[str, Any]:
    """Trainings of one network at ascending learning rates, and what the first ten steps make of its sharpness.

    Learning rates are tried in turn up to the first at which the training diverges. The sharpness of every step and the
    path are measured up to the first c at which they rise.

    Args:
        risen: Those of "sharpness" and "path" that rise at a c below all of `cs`.

    Returns:
        "lambda_0", "loss_0"; "runs", what `EarlyRun` takes; "risen" after them; and for each c tried "c", "sharpness",
        λ_10 / λ_0, and "active", the share of the last hidden units that act on an example at the end, None where the
        run diverged.
    """
    runs: list[EarlyRun] = []
    known = set(risen)
    found: dict[str, Any] = {"c": [], "sharpness": [], "active": []}
    with single_thread():
        data = digits_data()
        model, objective = digits_problem(depth, width, seed, data, zero_output=zero_output)
        start = _weights(model)
        initial = learning_rate_from_c(objective, 1.0, tol=TOL, seed=seed).sharpness
        for c in cs:
            model.load_state_dict(start)
            optimizer = SGD(model.parameters(), lr=c / initial)
            every = None if "sharpness" in known else 1
            run = descend(model, objective, optimizer, EARLY_STEPS, measure_every=every, tol=TOL, proof_every=PROOF)
            path, diverged, last, active = None, run["diverged"], None, None
            if not diverged:
                last = (run["sharpness"][-1] if every else _sharpness(objective)) / initial
                if "path" not in known:
                    path = _path(model, data, start)
                diverged = descend(model, objective, optimizer, LATE_STEPS, measure_every=None)["diverged"]
                active = float((model[:-1](data[0]) > 0).double().mean())
            runs.append(EarlyRun(c, run["loss"], run.get("sharpness"), diverged, path))
            for name, value in (("c", c), ("sharpness", last), ("active", active)):
                found[name].append(None if diverged and name != "c" else value)
            if diverged:
                break
            alone = critical_constants(runs[-1:], steps=EARLY_STEPS)
            rises = {"sharpness": alone.c_sharp is not None, "path": alone.has_barrier}
            known |= {name for name, rising in rises.items() if rising}
    return {
        "lambda_0": initial,
        "loss_0": runs[0].loss[0],
        "runs": [asdict(run) for run in runs],
        "risen": sorted(known),
        **found,
    }


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The critical constants of one network from its `early_runs`, the learning rates of one part after the other.

    Returns:
        "lambda_0", "loss_0"; "constants" by name, None beyond the grid; "c", "sharpness" and "active" of all parts.
    """
    constants = critical_constants([EarlyRun(**run) for part in parts for run in part["runs"]], steps=EARLY_STEPS)
    return {
        **{name: parts[0][name] for name in ("lambda_0", "loss_0")},
        "constants": {name: getattr(constants, name) for name in CONSTANTS},
        **{name: [value for part in parts for value in part[name]] for name in ("c", "sharpness", "active")},
    }


def saturation(depth: int, width: int, seed: int, cs: Sequence[float], time: float) -> dict[str, Any]:
    """λ_τ / λ_0 at the step τ = time / c of trainings at every c.

    Returns:
        "ratio" by c, of the sharpness at τ and at the start.
    """
    ratios = []
    with single_thread():
        model, objective = digits_problem(depth, width, seed, digits_data())
        start = _weights(model)
        initial = learning_rate_from_c(objective, 1.0, tol=TOL, seed=seed).sharpness
        for c in cs:
            model.load_state_dict(start)
            steps = max(1, round(time / c))
            run = descend(model, objective, SGD(model.parameters(), lr=c / initial), steps, measure_every=None)
            ratios.append(math.nan if run["diverged"] else _sharpness(objective) / initial)
    return {"ratio": ratios}


def long_run(
    depth: int, width: int, seed: int, c: float, num: int, stages: Sequence[Sequence[int]], shuffled: bool = False
) -> dict[str, Any]:
    """Loss and sharpness along one training at η = c / λ_0.

    Args:
        stages: Pairs (steps, steps from record to record), one after the other.

    Returns:
        "step", "loss", "sharpness", and "threshold", 2/η.
    """
    found: dict[str, Any] = {"step": [], "loss": [], "sharpness": []}
    with single_thread():
        model, objective = digits_problem(depth, width, seed, digits_data(num, shuffled=shuffled))
        lr = learning_rate_from_c(objective, c, tol=TOL, seed=seed).lr
        begin = 0
        for steps, every in stages:
            run = descend(model, objective, SGD(model.parameters(), lr=lr), steps, measure_every=every)
            new = 1 if begin else 0  # the first record is the last of the stage before
            found["step"] += [begin + step for step in run["step"][new:]]
            for name in ("loss", "sharpness"):
                found[name] += run[name][new:]
            begin += steps
            if run["diverged"]:
                break
    return {**found, "threshold": 2 / lr}


@torch.no_grad()
def _path(model: nn.Module, data: tuple[Tensor, Tensor], start: dict[str, Tensor]) -> list[float]:
    """Loss on the segment from the weights `start` to the present ones."""
    inputs, targets = data
    losses = []
    for i in range(PATH_STEPS + 1):
        weights = {name: start[name].lerp(p, i / PATH_STEPS) for name, p in model.named_parameters()}
        losses.append(float(half_squares(functional_call(model, weights, (inputs,)), targets)))
    return losses


def _sharpness(objective: Objective) -> float:
    return float(EigenTracker(tol=TOL).measure(Hessian(objective)).values[0])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
