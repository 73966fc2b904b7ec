"""PSGD whitening gradients against the updates of psgd_torch, its probes and coins given to them."""

from unittest import mock

import torch
from sharpscope.dynamics.optimizers.psgd import PSGD
from sharpscope.dynamics.optimizers.streams import generator

from .row import OptimizerRow

SCALE, RATE, SEED = 0.7, 0.1, 5


class PackagedUpdates(torch.optim.Optimizer):
    """psgd_torch's updates of Q and products with P, in a loop with groups, momentum and decoupled decay."""

    def __init__(self, params, kind, lr, momentum=0.0, weight_decay=0.0, rank=3, clip=None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.kind, self.rank, self.clip, self.number = kind, rank, clip, 0
        self.Q = self.m = None

    @torch.no_grad()
    def step(self, closure=None):
        self.number += 1
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        params = [p for p, _ in pairs]
        grads = [p.grad for p in params]
        draws = torch.rand(3, dtype=torch.float64, generator=generator(SEED, -1, self.number, "cpu")).tolist()
        toss = mock.patch("torch.rand", side_effect=[torch.tensor(draw) for draw in draws[1:] * len(params)])
        if self.m is None:
            self.m = [torch.zeros_like(p) for p in params]
        for m, g, (_, group) in zip(self.m, grads, pairs, strict=True):
            m.mul_(group["momentum"]).add_((1 - group["momentum"]) * g)
        with toss if self.kind == "lra" else mock.MagicMock():
            directions = self._tensors(params, grads, draws) if self.kind == "kron" else self._vector(params, grads)
        if self.clip is not None:
            size = torch.cat([d.flatten() for d in directions]).norm()
            directions = [d * min(1.0, self.clip / float(size)) for d in directions]
        for d, (p, group) in zip(directions, pairs, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * d)

    def _vector(self, params, grads):
        from psgd_torch import psgd

        g = torch.cat([g.flatten() for g in grads])
        m = torch.cat([m.flatten() for m in self.m])
        draw = generator(SEED, -2, self.number, "cpu")
        v = torch.randn(len(g), dtype=g.dtype, generator=draw)
        tiny = torch.finfo(g.dtype).tiny
        if self.kind == "xmat":
            if self.Q is None:
                self.Q = (torch.full_like(g, SCALE), torch.zeros_like(g))
            psgd.update_precond_Xmat_math_(*self.Q, v, g, RATE, "2nd", tiny)
            d = psgd.precond_grad_Xmat_math(*self.Q, m)
        else:
            if self.Q is None:
                size = (len(g) * (self.rank + 10)) ** -0.5
                drawn = [
                    [size * torch.randn(p.numel(), self.rank, dtype=g.dtype, generator=draw) for _ in "UV"]
                    for p in params
                ]
                U, V = (torch.cat([pair[i] for pair in drawn]) for i in (0, 1))
                self.Q = (U, V, torch.full((len(g), 1), SCALE, dtype=g.dtype))
            psgd.update_precond_UVd_math_(*self.Q, v[:, None], g[:, None], RATE, "2nd", tiny)
            d = psgd.precond_grad_UVd_math(*self.Q, m[:, None])[:, 0]
        return [piece.view(p.shape) for p, piece in zip(params, d.split([p.numel() for p in params]), strict=True)]

    def _tensors(self, params, grads, draws):
        from psgd_torch import psgd

        if self.Q is None:
            self.Q = [psgd.init_Q_exprs(p, SCALE, 8192, 10.0) for p in params]
        directions = []
        for i, (g, m, (Q, exprs)) in enumerate(zip(grads, self.m, self.Q, strict=True)):
            v = torch.randn(g.numel(), dtype=g.dtype, generator=generator(SEED, i, self.number, "cpu")).view(g.shape)
            with mock.patch("torch.rand", side_effect=[torch.tensor(draws[1])]):
                psgd.update_precond_kron_math_(Q, exprs, v, g, RATE, "2nd", torch.finfo(g.dtype).tiny)
            directions.append(psgd.precond_grad_kron_math(Q, exprs, m))
        return directions


def row(kind, **options):
    fixed = {"mode": "whiten", "init_scale": SCALE, "lr_preconditioner": RATE, "seed": SEED, "damping": 0.0, "rank": 3}
    shared = {"lr": 0.01, **options}
    return OptimizerRow(
        name=f"PSGD-{kind}-whiten" + "".join(f"-{name}" for name in options),
        by_options=lambda params, **more: PSGD(params, kind=kind, mode="whiten", **more),
        descent={"lr": 0.003},
        make=lambda params: PSGD(params, kind=kind, **fixed, **shared),
        oracle=lambda params: PackagedUpdates(params, kind, **shared),
        second_group={"lr": 0.02, "weight_decay": 0.05},
        tolerance=1e-12,
        package="psgd_torch",
    )


def newton_row(kind):
    return OptimizerRow(
        name=f"PSGD-{kind}-newton",
        by_options=lambda params, **more: PSGD(params, kind=kind, **more),
        descent={"lr": 0.05},
        closure=True,
        note="its pairs are differences, whose rounding no oracle shares: test_psgd.py has the exact ones",
    )


ROWS = [
    *(row(kind) for kind in ("xmat", "lra", "kron")),
    *(row(kind, momentum=0.9, weight_decay=0.01, clip=1.0) for kind in ("xmat", "lra", "kron")),
    *(newton_row(kind) for kind in ("xmat", "lra", "kron")),
]
