"""SAM and ASAM round SGD with momentum, and round AdamW, against the formulas in NumPy.

The SAM of pytorch_optimizer sums its norm in float32, so it cannot judge float64 steps; test_sam.py compares with it.
"""

import numpy as np
import torch
from sharpscope.dynamics.optimizers.sam import SAM

from .row import OptimizerRow

SGD_OPTIONS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.02}


class SAMOfThePaper(torch.optim.Optimizer):
    """Heavy ball with coupled weight decay after the ascent of SAM or ASAM, all arithmetic in NumPy."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.buffers = {}

    def step(self, closure):
        loss = closure()
        everything = [(p, group) for group in self.param_groups for p in group["params"]]
        found = [p.detach().numpy().copy() for p, _ in everything]
        ascent = [p.grad.numpy().copy() for p, _ in everything]
        squares = [
            ((np.abs(x) * g if group["adaptive"] else g) ** 2).sum()
            for x, g, (_, group) in zip(found, ascent, everything, strict=True)
        ]
        length = np.sqrt(np.sum(squares))
        for x, g, (p, group) in zip(found, ascent, everything, strict=True):
            direction = x**2 * g if group["adaptive"] else g
            scale = group["rho"] / (length + 1e-12) if group["normalize"] else group["rho"]
            p.data = torch.from_numpy(x + scale * direction)
        closure()
        for x, (p, group) in zip(found, everything, strict=True):
            g = p.grad.numpy() + group["weight_decay"] * x
            self.buffers[p] = group["momentum"] * self.buffers[p] + g if p in self.buffers else g.copy()
            p.data = torch.from_numpy(x - group["lr"] * self.buffers[p])
        return loss


def round_sgd(**options):
    return lambda params: SAM(torch.optim.SGD(params, **SGD_OPTIONS), **options)


def paper(**options):
    return lambda params: SAMOfThePaper(params, **SGD_OPTIONS, **{"adaptive": False, "normalize": True, **options})


def by_options(params, **options):
    return SAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), **options)


def round_adamw(params, **options):
    return SAM(torch.optim.AdamW(params, lr=0.005), **options)


NOTE = "oracle: the papers' formulas in float64 NumPy"
ROWS = [
    OptimizerRow(
        "SAM",
        by_options,
        {"rho": 0.05},
        make=round_sgd(rho=0.05),
        oracle=paper(rho=0.05),
        second_group={"rho": 0.2, "lr": 0.02},
        tolerance=1e-12,
        closure=True,
        note=NOTE,
    ),
    OptimizerRow(
        "ASAM",
        by_options,
        {"rho": 0.5, "adaptive": True},
        make=round_sgd(rho=0.5, adaptive=True),
        oracle=paper(rho=0.5, adaptive=True),
        second_group={"rho": 0.2, "adaptive": False},
        tolerance=1e-12,
        closure=True,
        note=NOTE,
    ),
    OptimizerRow(
        "SAM, unnormalised",
        by_options,
        {"rho": 0.02, "normalize": False},
        make=round_sgd(rho=0.02, normalize=False),
        oracle=paper(rho=0.02, normalize=False),
        second_group={"rho": 0.01, "weight_decay": 0.1},
        tolerance=1e-12,
        closure=True,
        note=NOTE,
    ),
    OptimizerRow("SAM round AdamW", round_adamw, {"rho": 0.05}, closure=True, note="its parts are judged alone"),
]
