"""AdamW in four bits, against torch's AdamW where nothing is compressed and a plain NumPy transcription where it is."""

import numpy as np
import torch
from sharpscope.dynamics.optimizers.adamw4bit import AdamW4bit
from sharpscope.dynamics.optimizers.moment_codecs import Uncompressed

from .row import OptimizerRow

BLOCK = 128


def signed_map():
    """Dynamic exponents in four bits: a sign, E zeros, a one, F = 2 − E bits for the middle of a part of [0.1, 1]."""
    positive = []
    for E in range(3):
        edges = np.linspace(0.1, 1, 2 ** (2 - E) + 1)
        positive += list(10.0**-E * (edges[:-1] + edges[1:]) / 2)
    return np.float32(sorted([-x for x in positive] + positive + [0.0, 1.0]))


LINEAR = np.arange(1, 17, dtype=np.float32) / np.float32(16)
MAPS = {"m": signed_map(), "linear": LINEAR, "square": LINEAR**2}


def block_scale(x):
    """The largest magnitude of the block of each entry."""
    flat = np.abs(x.reshape(-1))
    padded = np.append(flat, np.zeros(-flat.size % BLOCK, flat.dtype)).reshape(-1, BLOCK)
    return np.repeat(padded.max(axis=1), BLOCK)[: flat.size].reshape(x.shape)


def rank1_scale(x):
    matrix = x.reshape(len(x), -1)
    return np.minimum(matrix.max(axis=1)[:, None], matrix.max(axis=0)[None, :]).reshape(x.shape)


def through_codes(x, kind, scale):
    """x after encoding and decoding: the nearest value of the map in units of the scale."""
    s = scale(np.float32(x))
    y = np.float64(np.float32(x) * np.where(s > 0, np.float32(1) / np.where(s > 0, s, np.float32(1)), np.float32(0)))
    if kind == "m":
        nearest = np.abs(y[..., None] - np.float64(MAPS["m"])).argmin(axis=-1)
    else:  # evenly spaced, in the root for "square"; ties go to the even multiple of 1/16
        nearest = np.clip(np.rint(16 * (y if kind == "linear" else np.sqrt(y))), 1, 16).astype(int) - 1
    return MAPS[kind][nearest] * s


class PlainAdamW4bit(torch.optim.Optimizer):
    """The printed algorithm, decoded moments kept in full; every operation rounds to the precision of the parameter."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, map="linear", v="block"):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.map, self.v = map, v

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self._step(p, self.state[p], group)

    def _step(self, p, state, group):
        x, g = p.numpy(), p.grad.numpy()
        number = x.dtype.type
        (b1, b2), lr = group["betas"], group["lr"]
        t = state["t"] = state.get("t", 0) + 1
        zeros = np.zeros_like(x)
        m = number(b1) * state.get("m", zeros).astype(x.dtype) + number(1 - b1) * g
        if self.v == "factor" and x.ndim > 1:
            rows = state["rows"] = b2 * state.get("rows", 0.0) + (1 - b2) * (g * g).mean(axis=-1)
            columns = state["columns"] = b2 * state.get("columns", 0.0) + (1 - b2) * (g * g).mean(axis=-2)
            v = rows[..., :, None] * columns[..., None, :] / rows.mean(axis=-1)[..., None, None]
        else:
            v = number(b2) * state.get("v", zeros).astype(x.dtype) + number(1 - b2) * (g * g)
            state["v"] = through_codes(v, self.map, rank1_scale if self.v == "rank1" and x.ndim > 1 else block_scale)
        root = np.sqrt(v) * number(1 / np.sqrt(1 - b2**t)) + number(group["eps"])
        x[...] = x * number(1 - lr * group["weight_decay"]) - number(lr / (1 - b1**t)) * (m / root)
        state["m"] = through_codes(m, "m", block_scale)


OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SECOND = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}


def compressed(name, *, dtype=torch.float32, tolerance=0.0, oracle_options=None, **options):
    # Small tensors too, or the tables below would compress nothing.
    options = {"min_size": 0, **options}
    return OptimizerRow(
        name=name,
        by_options=AdamW4bit,
        descent={"lr": 1e-2, **options},
        make=lambda params: AdamW4bit(params, **OPTIONS, **options),
        oracle=lambda params: PlainAdamW4bit(params, **OPTIONS, **oracle_options),
        second_group=SECOND,
        tolerance=tolerance,
        dtype=dtype,
        note="the oracle is a transcription in NumPy; test_adamw4bit.py has rank-1 scales",
    )


def of_torch(name, **options):
    return OptimizerRow(
        name=name,
        by_options=AdamW4bit,
        descent={"lr": 1e-2, **options},
        make=lambda params: AdamW4bit(params, **OPTIONS, **options),
        oracle=lambda params: torch.optim.AdamW(params, **OPTIONS),
        second_group=SECOND,
        tolerance=1e-12,
    )


ROWS = [
    compressed("AdamW4bit block linear", v="block", oracle_options={}),
    compressed("AdamW4bit block square", v="block", map="square", oracle_options={"map": "square"}),
    compressed("AdamW4bit default", oracle_options={}),  # no matrix here is wide enough for rank-1 scales
    compressed("AdamW4bit float64", v="block", dtype=torch.float64, tolerance=1e-12, oracle_options={}),
    compressed("AdamW4bit factored", v="factor", dtype=torch.float64, tolerance=1e-12, oracle_options={"v": "factor"}),
    OptimizerRow(
        name="AdamW4bit stochastic",
        by_options=AdamW4bit,
        descent={"lr": 1e-2, "min_size": 0, "rounding": "stochastic", "seed": 3},
        note="test_adamw4bit.py compares its mean over seeds with the step in full precision",
    ),
    of_torch("AdamW4bit small tensors"),
    of_torch("AdamW4bit identity codec", min_size=0, codec=Uncompressed()),
]
