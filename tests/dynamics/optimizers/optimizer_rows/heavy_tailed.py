"""Heavy-tailed noise: the law is judged in test_heavy_tailed.py and test_stable.py."""

import torch
from sharpscope.dynamics.optimizers.heavy_tailed import HeavyTailedSGD

from .row import OptimizerRow

NOTE = "random; test_heavy_tailed.py has its stationary law"
ROWS = [
    OptimizerRow("HeavyTailedSGD", HeavyTailedSGD, {"lr": 0.1, "alpha": 1.7, "sigma": 1e-3}, note=NOTE, draws=True),
    OptimizerRow(
        "HeavyTailedSGD, each weight",
        HeavyTailedSGD,
        {"lr": 0.1, "alpha": 1.7, "sigma": 1e-3, "isotropic": False},
        note=NOTE,
        draws=True,
    ),
    OptimizerRow(
        "HeavyTailedSGD without noise",
        HeavyTailedSGD,
        {"lr": 0.1, "alpha": 1.5, "sigma": 0.0, "momentum": 0.9, "weight_decay": 0.01},
        oracle=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
        second_group={"lr": 0.02, "weight_decay": 0.1},
    ),
]
