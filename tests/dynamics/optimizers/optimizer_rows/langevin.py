"""Langevin noise: the law is judged in test_langevin.py."""

import torch
from sharpscope.dynamics.optimizers.langevin import LangevinSGD

from .row import OptimizerRow

NOTE = "random; test_langevin.py has its stationary variance"
ROWS = [
    OptimizerRow("LangevinSGD", LangevinSGD, {"lr": 0.1, "temperature": 1e-5}, note=NOTE, draws=True),
    OptimizerRow(
        "LangevinSGD at temperature 0",
        LangevinSGD,
        {"lr": 0.1, "temperature": 0.0, "momentum": 0.9, "weight_decay": 0.01},
        oracle=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
        second_group={"lr": 0.02, "weight_decay": 0.1},
    ),
    OptimizerRow(
        "Langevin noise round AdamW",
        lambda params, **options: LangevinSGD(torch.optim.AdamW(params, lr=0.005), **options),
        {"temperature": 1e-5, "seed": 4},
        note=NOTE,
        draws=True,
    ),
]
