"""The sign method with gradient transport against its recurrence in NumPy."""

import numpy as np
import torch
from sharpscope.dynamics.optimizers.sign_momentum2 import SignMomentum2

from .row import OptimizerRow


class Recurrence(torch.optim.Optimizer):
    """Keeps w_t, w_(t-1) and m as arrays; the gradient is taken at w_t + θ/(1 − θ)(w_t − w_(t-1))."""

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.kept = {}

    def step(self):
        for group in self.param_groups:
            th, lr = group["momentum"], group["lr"]
            for p in group["params"]:
                start = p.detach().numpy().copy()
                w, _, m = self.kept.get(p, (start, start, np.zeros_like(start)))
                m = th * m + (1 - th) * p.grad.numpy()
                w, previous = (1 - lr * group["weight_decay"]) * w - lr * np.sign(m), w
                self.kept[p] = (w, previous, m)
                p.data = torch.from_numpy(w + th / (1 - th) * (w - previous))


ROWS = [
    OptimizerRow(
        name="SignMomentum2",
        by_options=SignMomentum2,
        descent={"lr": 2e-3},
        coasts=True,
        make=lambda params: SignMomentum2(params, lr=1e-3, momentum=0.9, weight_decay=0.1),
        oracle=lambda params: Recurrence(params, lr=1e-3, momentum=0.9, weight_decay=0.1),
        second_group={"lr": 3e-3, "momentum": 0.7, "weight_decay": 0.0},
        tolerance=1e-12,
        note="no package has it",
    )
]
