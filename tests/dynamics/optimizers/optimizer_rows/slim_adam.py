import torch
from sharpscope.dynamics.optimizers.slim_adam import SlimAdam

from .row import OptimizerRow


class RowsAndTensors(torch.optim.Optimizer):
    """AdamW with the second moment of matrices averaged along dimension 1, written out."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                (b1, b2), t, squared = group["betas"], state["t"], p.grad**2
                if p.ndim == 2:
                    squared = torch.stack([row.sum() / len(row) * torch.ones_like(row) for row in squared])
                state["m"] = b1 * state["m"] + (1 - b1) * p.grad
                state["v"] = b2 * state["v"] + (1 - b2) * squared
                decay = 1 - group["lr"] * group["weight_decay"] if p.ndim >= 2 else 1.0
                size = (state["v"] / (1 - b2**t)).sqrt() + 1e-8
                p.copy_(decay * p - group["lr"] * (state["m"] / (1 - b1**t)) / size)


def by_rows(params, **options):
    params = list(params)
    if not isinstance(params[0], dict):
        params = [{"params": params}]
    named = []
    for i, group in enumerate(params):
        inside = [(f"{'matrix' if p.ndim == 2 else 'other'}.{i}.{j}", p) for j, p in enumerate(group["params"])]
        named.append({**group, "params": inside})
    return SlimAdam(named, rules={"matrix.*": (1,)}, **options)


def plain(params, **options):
    return SlimAdam(params, rules=None, decay_vectors=True, **options)


COMMON = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
SECOND = {"lr": 3e-3, "weight_decay": 0.3}

ROWS = [
    OptimizerRow(
        "SlimAdam",
        plain,
        {"lr": 1e-2},
        make=lambda groups: by_rows(groups, **COMMON),
        oracle=lambda groups: RowsAndTensors(groups, COMMON),
        second_group=SECOND,
        tolerance=1e-12,
        note="equal to Adam-mini's rows and to the closed forms: test_slim_adam.py",
    ),
    OptimizerRow(
        "SlimAdam without compression",
        plain,
        {"lr": 1e-2},
        make=lambda groups: plain(groups, **COMMON),
        oracle=lambda groups: torch.optim.AdamW(groups, foreach=False, **COMMON),
        second_group=SECOND,
        tolerance=0.0,
    ),
]
