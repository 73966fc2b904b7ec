import math

import torch
from sharpscope.dynamics.optimizers.sgd_sai import SGDSaI

from .row import OptimizerRow


class WrittenOut(torch.optim.Optimizer):
    """The formulas with the gradients of the first step at hand, one list of numbers per tensor."""

    def __init__(self, groups, paper, **options):
        super().__init__(groups, options)
        self.paper = paper

    @torch.no_grad()
    def step(self, closure=None):
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        if not self.state:
            for group, p in every:
                g = p.grad.reshape(-1).tolist()
                mean = sum(g) / len(g)
                squares = sum((x - mean) ** 2 for x in g)
                if len(g) == 1:
                    G = 1.0
                elif self.paper:
                    G = math.sqrt(sum(x * x for x in g) / (squares / len(g) + group["eps"]))
                else:
                    G = math.sqrt(sum(x * x for x in g)) / (math.sqrt(squares / (len(g) - 1)) + group["eps"])
                self.state[p] = {"S": G, "m": p.grad.clone()}
            if self.paper:
                largest = max(state["S"] for state in self.state.values())
                for state in self.state.values():
                    state["S"] /= largest
        else:
            for group, p in every:
                mu = group["momentum"]
                self.state[p]["m"] = mu * self.state[p]["m"] + (1 - mu) * p.grad
        for group, p in every:
            p.copy_(
                p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * self.state[p]["S"] * self.state[p]["m"]
            )


def row(name, paper, lr, descent):
    options = {"lr": lr, "momentum": 0.9, "eps": 1e-8, "weight_decay": 0.1}
    return OptimizerRow(
        name,
        lambda params, **more: SGDSaI(params, scale="paper" if paper else "code", **more),
        descent,
        make=lambda groups: SGDSaI(groups, scale="paper" if paper else "code", **options),
        oracle=lambda groups: WrittenOut(groups, paper, **options),
        second_group={"lr": lr / 3, "momentum": 0.0, "weight_decay": 0.3},
        tolerance=1e-12,
        note="the package sgd-sai itself: test_sgd_sai.py",
    )


ROWS = [row("SGDSaI", False, 1e-2, {"lr": 1e-2}), row("SGDSaI as in the paper", True, 1e-1, {"lr": 0.5})]
