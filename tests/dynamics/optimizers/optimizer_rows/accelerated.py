"""Accelerated SGD against AccSGD of pytorch_optimizer, which states it as Kidambi et al. do, and at γ = δ against SGD.

Their κ, ξ and constant r stand for β = r² ξ / κ, γ = r ξ δ, α = r / (r + β).
"""

import torch
from sharpscope.dynamics.optimizers.accelerated import AcceleratedSGD

from .row import OptimizerRow

LR, KAPPA, XI, CONSTANT = 0.01, 50.0, 4.0, 0.7
BETA = CONSTANT**2 * XI / KAPPA
OPTIONS = {"lr": LR, "gamma": CONSTANT * XI * LR, "beta": BETA, "alpha": CONSTANT / (CONSTANT + BETA)}


def acc_sgd(params):
    from pytorch_optimizer import AccSGD

    return AccSGD(params, lr=LR, kappa=KAPPA, xi=XI, constant=CONSTANT, weight_decay=0.02, foreach=False)


ROWS = [
    OptimizerRow(
        "AcceleratedSGD",
        AcceleratedSGD,
        {"lr": 0.1, "gamma": 0.5, "beta": 0.05},
        coasts=True,
        make=lambda params: AcceleratedSGD(params, **OPTIONS, weight_decay=0.02),
        oracle=acc_sgd,
        # The rest of the group's options follows on both sides: γ keeps its ratio to the first learning rate.
        second_group={"weight_decay": 0.1},
        tolerance=1e-12,
        package="pytorch_optimizer",
    ),
    OptimizerRow(
        "AcceleratedSGD at gamma = lr",
        AcceleratedSGD,
        {"lr": 0.05, "gamma": 0.05, "beta": 0.3, "alpha": 0.4, "weight_decay": 0.02},
        oracle=lambda params: torch.optim.SGD(params, lr=0.05, weight_decay=0.02),
        second_group={"weight_decay": 0.1},
    ),
    OptimizerRow(
        "AcceleratedSGD with tail average",
        AcceleratedSGD,
        {"lr": 0.1, "gamma": 0.5, "beta": 0.05, "average_from": 20},
        coasts=True,
        note="test_accelerated.py judges the average",
    ),
]
