"""Generic Adam against the members of its family that torch has."""

import torch
from sharpscope.dynamics.optimizers.generic_adam import GenericAdam

from .row import OptimizerRow

ADAM = {"theta": "corrected=0.99", "beta": 0.85, "lr_schedule": "momentum=0.85"}

ROWS = [
    OptimizerRow(
        name="GenericAdam",
        by_options=GenericAdam,
        descent={"lr": 0.01, "theta": "r=0.5", "lr_schedule": "s=0.1"},
        make=lambda params: GenericAdam(params, lr=3e-3, weight_decay=0.1, **ADAM),
        oracle=lambda params: torch.optim.Adam(params, lr=3e-3, betas=(0.85, 0.99), weight_decay=0.1, foreach=False),
        second_group={"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
        tolerance=1e-12,
        note="as Adam, by the schedules that absorb its corrections",
    ),
    OptimizerRow(
        name="GenericAdam-RMSprop",
        by_options=GenericAdam,
        descent={"lr": 1e-3, "theta": 0.99, "beta": 0.0},
        make=lambda params: GenericAdam(params, lr=3e-3, theta=0.99, beta=0.0, v0=0.0, weight_decay=0.1),
        oracle=lambda params: torch.optim.RMSprop(params, lr=3e-3, alpha=0.99, weight_decay=0.1, foreach=False),
        second_group={"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
        tolerance=1e-12,
    ),
    OptimizerRow(
        name="GenericAdam-AdaGrad",
        by_options=GenericAdam,
        descent={"lr": 0.1, "theta": "r=1", "beta": 0.0, "lr_schedule": "s=0.5"},
        make=lambda params: GenericAdam(params, lr=0.1, theta="r=1", beta=0.0, lr_schedule="s=0.5", eps=0.0),
        oracle=lambda params: torch.optim.Adagrad(params, lr=0.1, eps=0.0, foreach=False),
        second_group={"lr": 0.03, "weight_decay": 0.01},
        tolerance=1e-12,
        note="v_t is the mean of all squares and α_t = η/√t, so that their root cancels",
    ),
]
