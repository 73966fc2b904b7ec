"""Digests of what the codec and the step make of fixed inputs, by any path, on any device.

The inputs are integers times powers of two, from generators whose numbers never change: they have the same bits
everywhere.
"""

import hashlib

import numpy as np
import torch
from sharpscope.kernels.adamw4_batch import Batch, scalars

N, ROWS, COLUMNS = 5003, 37, 128
ODD_COLUMNS = 131
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 3


def values(n, seed):
    """n numbers with 20 random bits each and magnitudes of 2^-40 to 1, float32; some zeros."""
    rng = np.random.RandomState(seed)
    signed = rng.randint(-(2**19), 2**19, n) * (rng.randint(0, 16, n) > 0)
    return torch.from_numpy(np.ldexp(signed.astype(np.float32), -19 - rng.randint(0, 40, n)))


def digests(codec, adamw4, device="cpu", **how):
    """A sha256 for each of the keys

    - "<map>/block128/<rounding>" for map de, linear and square,
    - "<map>/rank1/<columns>/<rounding>" for map linear and square,
    - "adamw4/<map>/<rounding>/<dtype of p>/<dtype of g>": three steps on four tensors, two of them with rank-1 scales,

    where `codec` and `adamw4` are modules of one path and `how` is passed to them (launcher=).
    """
    found = {}
    for rounding in ("nearest", "stochastic"):
        random = {"stochastic": rounding == "stochastic", "seed": 2**63 + 11, "step": 2**31 + 5, "stream": 6}
        for map in ("de", "linear", "square"):
            made = _blocks(codec, values(N, 1), map, device, random, how)
            found[f"{map}/block128/{rounding}"] = _digest(made)
        for map in ("linear", "square"):
            for columns in (COLUMNS, ODD_COLUMNS):
                made = _rank1(codec, values(ROWS * columns, 2).view(ROWS, columns), map, device, random, how)
                found[f"{map}/rank1/{columns}/{rounding}"] = _digest(made)
            for param in DTYPES:
                for grad in DTYPES:
                    key = f"adamw4/{map}/{rounding}/{param}/{grad}"
                    batch = _batch(map, random["stochastic"], DTYPES[param], DTYPES[grad], device)
                    found[key] = _digest(_after_steps(adamw4, batch, how))
    return found


def _blocks(codec, x, map, device, random, how):
    n = x.numel()
    x = (x if map == "de" else x.abs()).to(device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-n // 128), device=device)
    out, bad = torch.empty_like(x), torch.zeros(1, dtype=torch.int64, device=device)
    codec.quantize_block(x, codes, scales, bad, map=map, **random, **how)
    codec.dequantize_block(codes, scales, out, map=map, **how)
    return codes, scales, out, bad


def _rank1(codec, x, map, device, random, how):
    x = x.abs().to(device)
    codes = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=device)
    rows, columns = torch.empty(len(x), device=device), torch.empty(len(x[0]), device=device)
    out, bad = torch.empty_like(x), torch.zeros(1, dtype=torch.int64, device=device)
    codec.quantize_rank1(x, codes, rows, columns, bad, map=map, **random, **how)
    codec.dequantize_rank1(codes, rows, columns, out, map=map, **how)
    return codes, rows, columns, out, bad


def _batch(map, stochastic, param, grad, device):
    """A new optimizer's state for four tensors."""
    shapes = [(N, 0), (1, 0), (ROWS * COLUMNS, COLUMNS), (ROWS * ODD_COLUMNS, ODD_COLUMNS)]
    zeros = [torch.zeros(n // side if side else -(-n // 128), device=device) for n, side in shapes]
    return Batch(
        params=[values(n, 3).to(device, param) for n, _ in shapes],
        grads=[values(n, 4).to(device, grad) for n, _ in shapes],
        m_codes=[torch.full(((n + 1) // 2,), 0x77, dtype=torch.uint8, device=device) for n, _ in shapes],
        m_scales=[torch.zeros(-(-n // 128), device=device) for n, _ in shapes],
        v_codes=[torch.zeros((n + 1) // 2, dtype=torch.uint8, device=device) for n, _ in shapes],
        v_scales=zeros,
        v_columns=[torch.zeros(side, device=device) for _, side in shapes],
        skipped=[torch.zeros(1, dtype=torch.int64, device=device) for _ in shapes],
        ids=[4, 3, 2, 1],
        map=map,
        stochastic=stochastic,
        seed=2**62 + 9,
    )


def _after_steps(adamw4, batch, how):
    for t in range(1, STEPS + 1):
        for i, g in enumerate(batch.grads):
            g.copy_(values(g.numel(), 10 * t + i))
        adamw4.step(batch, scalars(lr=2**-6, betas=(0.875, 0.96875), eps=2**-20, weight_decay=2**-4, step=t), **how)
    state = (batch.params, batch.m_codes, batch.m_scales, batch.v_codes, batch.v_scales, batch.v_columns, batch.skipped)
    return [tensor for tensors in state for tensor in tensors]


def _digest(tensors):
    everything = hashlib.sha256()
    for tensor in tensors:
        everything.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return everything.hexdigest()
