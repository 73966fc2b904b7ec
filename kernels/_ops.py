"""The functions as operators of torch (`torch.ops.sharpscope`): torch.compile then needs no graph break for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import choose
from .adamw4_batch import Batch, Scalars, check_memory, scalars
from .codec_tables import BLOCK

_LIBRARY = torch.library.Library("sharpscope", "DEF")
_LIBRARY.define(
    "quantize4(Tensor x, SymInt rows, str map, bool stochastic, SymInt seed, SymInt step, SymInt stream) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("dequantize4(Tensor codes, Tensor scales, Tensor columns, SymInt n, str map) -> Tensor")
_LIBRARY.define(
    "adamw4_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m_codes, Tensor(c!)[] m_scales, Tensor(d!)[] v_codes, "
    "Tensor(e!)[] v_scales, Tensor(f!)[] v_columns, Tensor(g!)[] skipped, int[] ids, str map, bool stochastic, "
    "SymInt seed, float lr, float beta1, float beta2, float eps, float weight_decay, SymInt step, Tensor? numbers) "
    "-> ()"
)


def quantize4(
    x: Tensor, rows: int, map: str, stochastic: bool, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales (or row maxima), column maxima [0 or C] and count of bad blocks of x [n]; blocks if rows = 0."""
    out = _empty4(x, rows)
    codes, first, columns, bad = out
    bad.zero_()
    path, x = choose("codec", x.device), x.detach().to(torch.float32)
    how = {"map": map, "stochastic": stochastic, "seed": seed, "step": step, "stream": stream}
    if rows:
        path.quantize_rank1(x.view(rows, -1), codes, first, columns, bad, **how)
    else:
        path.quantize_block(x, codes, first, bad, **how)
    return out


def dequantize4(codes: Tensor, scales: Tensor, columns: Tensor, n: int, map: str) -> Tensor:
    """Values [n] float32."""
    out = codes.new_empty(n, dtype=torch.float32)
    path = choose("codec", codes.device)
    if columns.numel():
        path.dequantize_rank1(codes, scales, columns, out.view(scales.numel(), columns.numel()), map=map)
    else:
        path.dequantize_block(codes, scales, out, map=map)
    return out


def adamw4_(
    params: list[Tensor],
    grads: list[Tensor],
    m_codes: list[Tensor],
    m_scales: list[Tensor],
    v_codes: list[Tensor],
    v_scales: list[Tensor],
    v_columns: list[Tensor],
    skipped: list[Tensor],
    ids: list[int],
    map: str,
    stochastic: bool,
    seed: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    numbers: Tensor | None,
) -> None:
    """One step in place."""
    batch = Batch(
        params, grads, m_codes, m_scales, v_codes, v_scales, v_columns, skipped, ids, map, stochastic, int(seed)
    )
    by_value = scalars(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, step=int(step))
    run_adamw4(batch, by_value, numbers)


def run_adamw4(batch: Batch, by_value: Scalars, numbers: Tensor | None) -> None:
    """The step with its numbers by value, or from a tensor [9] on the device, which may change under a CUDA graph."""
    path = choose("adamw4", batch.params[0].device)
    check_memory(batch)
    # The tensors are written through their addresses, which autograd does not see.
    torch.autograd.graph.increment_version(batch.params)
    if numbers is None:
        path.step(batch, by_value)
    elif hasattr(path, "SOURCES"):
        path.step(batch, by_value, device_numbers=numbers)
    else:
        words = numbers.detach().cpu().numpy()
        path.step(batch, Scalars._make([*words[:8], words.view("uint32")[8]]))


def _empty4(x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.numel()
    return (
        x.new_empty((n + 1) // 2, dtype=torch.uint8),
        x.new_empty(rows or (n + BLOCK - 1) // BLOCK, dtype=torch.float32),
        x.new_empty(n // rows if rows else 0, dtype=torch.float32),
        x.new_empty(1, dtype=torch.int64),
    )


for _kind in ("CPU", "CUDA"):
    for _function in (quantize4, dequantize4, adamw4_):
        _LIBRARY.impl(_function.__name__, _function, _kind)


@torch.library.register_fake("sharpscope::quantize4")
def _(
    x: Tensor, rows: int, map: str, stochastic: bool, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty4(x, rows)


@torch.library.register_fake("sharpscope::dequantize4")
def _(codes: Tensor, scales: Tensor, columns: Tensor, n: int, map: str) -> Tensor:
    return codes.new_empty(n, dtype=torch.float32)


@torch.library.register_fake("sharpscope::adamw4_")
def _(*_: object) -> None:
    return None
