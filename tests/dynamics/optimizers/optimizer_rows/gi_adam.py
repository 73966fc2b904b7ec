"""GI-Adam against torch's Adam whose second moment is overwritten before the first step."""

import torch
from sharpscope.dynamics.optimizers.gi_adam import GIAdam

from .row import OptimizerRow


class OverwrittenAdam(torch.optim.AdamW):
    """AdamW with exp_avg_sq = scale · g², g the gradient of each parameter's first step."""

    def __init__(self, params, scale=1.0, **options):
        super().__init__(params, **options)
        self.scale = scale

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    zeros = torch.zeros_like(p)
                    self.state[p] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": zeros,
                        "exp_avg_sq": self.scale * p.grad.square(),
                    }
        return super().step(closure)


OPTIONS = {"lr": 3e-3, "betas": (0.85, 0.99), "weight_decay": 0.1}
SECOND = {"lr": 1e-3, "betas": (0.0, 0.9), "eps": 1e-6, "weight_decay": 0.0}

ROWS = [
    OptimizerRow(
        name="GIAdam",
        by_options=GIAdam,
        descent={"lr": 0.03},
        make=lambda params: GIAdam(params, **OPTIONS),
        oracle=lambda params: OverwrittenAdam(params, foreach=False, **OPTIONS),
        second_group=SECOND,
        tolerance=1e-12,
    ),
    OptimizerRow(
        name="GIAdam-scaled",
        by_options=GIAdam,
        descent={"lr": 0.01, "v0_scale": 0.1, "weight_decay": 0.01},
        make=lambda params: GIAdam(params, v0_scale=0.1, **OPTIONS),
        oracle=lambda params: OverwrittenAdam(params, scale=0.1, foreach=False, **OPTIONS),
        second_group=SECOND,
        tolerance=1e-12,
    ),
    OptimizerRow(
        name="RIAdam",
        by_options=GIAdam,
        descent={"lr": 0.03, "v0": "random"},
        note="its start is random: test_gi_adam.py judges it",
    ),
]
