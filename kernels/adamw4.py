"""AdamW whose two moments take four bits an entry: decoded, updated and encoded again in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import _ops
from .adamw4_batch import Batch, scalars, scalars_tensor
from .codec import ROUNDINGS, SIGNED_MAP, UNSIGNED_MAPS, Packed, Rounding, Scale, check_streams
from .codec_tables import BLOCK, ZERO_CODE

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class AdamW4State:
    """Moments of one parameter.

    Attributes:
        m, v: Encoded moments, of the parameter's shape, updated in place.
        skipped: int64 [1], how often a block of 128 entries was left as it was because its new moments were not
            finite.
        id: Number of the tensor's streams of random numbers; tensors that share a seed need different ones.
    """

    m: Packed
    v: Packed
    skipped: Tensor
    id: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: 1.0625 n for scales of blocks."""
        return self.m.nbytes + self.v.nbytes


def adamw4_state(
    param: Tensor, *, map: Literal["linear", "square"] = "linear", scale: Scale = "rank1", id: int = 0
) -> AdamW4State:
    """Moments of zero for `param`, on its device; `map` and `scale` are those of `quantize_v`."""
    n, shape = param.numel(), param.shape
    if n == 0:
        raise ValueError(f"`param` has shape {list(shape)} and no entries; leave it out of the step")
    if map not in UNSIGNED_MAPS:
        raise ValueError(f"`map` is {map!r}; it must be one of {', '.join(f'{name!r}' for name in UNSIGNED_MAPS)}")
    if scale not in ("rank1", "block128"):
        raise ValueError(f"`scale` is {scale!r}; it must be 'rank1' or 'block128'")
    check_streams(0, 0, id)

    def moment(name: Literal["de", "linear", "square"], lengths: tuple[int, ...]) -> Packed:
        code = ZERO_CODE[name]
        codes = torch.full((-(-n // 2),), code | code << 4, dtype=torch.uint8, device=param.device)
        zeros = tuple(torch.zeros(length, device=param.device, dtype=torch.float32) for length in lengths)
        return Packed(codes, zeros, shape, name, torch.zeros(1, dtype=torch.int64, device=param.device))

    blocks = (-(-n // BLOCK),)
    rank1 = scale == "rank1" and param.ndim > 1
    m, v = moment(SIGNED_MAP, blocks), moment(map, (shape[0], n // shape[0]) if rank1 else blocks)
    return AdamW4State(m, v, torch.zeros(1, dtype=torch.int64, device=param.device), id)


def adamw4_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[AdamW4State],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    step: int,
    rounding: Rounding = "nearest",
    seed: int = 0,
    numbers: Tensor | None = None,
) -> None:
    """One step of AdamW on every parameter and its state, in place.

    p ← (1 − lr·wd) p − lr/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε) with the new m and v before they are encoded again. A
    block of 128 entries whose new moments are not finite keeps p, m and v, and is counted in `skipped`.

    Args:
        params, grads: float32 or bfloat16, contiguous, of equal shapes, all on one device; the update is computed in
            float32.
        states: From `adamw4_state`, all with one map.
        step: t ≥ 1, the count of this step.
        rounding, seed: As for `quantize_m`; the streams are those of the states' ids.
        numbers: From `adamw4_numbers`, on the device of the parameters, instead of lr, betas, eps, weight_decay and
            step: a captured CUDA graph reads it at every replay.

    Raises:
        TypeError, ValueError: Lists of different lengths; dtypes, shapes, layouts or devices that do not fit; tensors
            that share memory; a state used twice; numbers out of range.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2; Li, Chen and Zhu, Memory
    Efficient Optimizers with 4-bit States, 2023, algorithm 1.
    """
    _check_lists(params, grads, states)
    check_numbers(lr, betas, eps, weight_decay, step)
    if rounding not in ROUNDINGS:
        raise ValueError(f"`rounding` is {rounding!r}; it must be 'nearest' or 'stochastic'")
    check_streams(seed, 0, 0)
    if not params:
        return
    none = params[0].new_empty(0, dtype=torch.float32)
    with torch.no_grad():
        batch = Batch(
            params=list(params),
            grads=list(grads),
            m_codes=[state.m.codes for state in states],
            m_scales=[state.m.scales[0] for state in states],
            v_codes=[state.v.codes for state in states],
            v_scales=[state.v.scales[0] for state in states],
            v_columns=[state.v.scales[1] if len(state.v.scales) == 2 else none for state in states],
            skipped=[state.skipped for state in states],
            ids=[state.id for state in states],
            map=states[0].v.map,
            stochastic=rounding == "stochastic",
            seed=seed,
        )
        if torch.compiler.is_compiling():
            _through_torch(batch, lr, betas, eps, weight_decay, step, numbers)
        else:
            _check_memory(batch)
            by_value = scalars(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
            _ops.run_adamw4(batch, by_value, numbers)


def adamw4_numbers(
    *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, step: int
) -> Tensor:
    """What a step computes with, float32 [9] on the CPU: copy it to the device before a graph is replayed."""
    check_numbers(lr, betas, eps, weight_decay, step)
    return scalars_tensor(scalars(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step))


def check_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> None:
    """Raise ValueError for what AdamW cannot work with."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` is {value}; it must be at least 0 and finite")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"`betas` is {betas}; it must hold two numbers in [0, 1)")
    if not 1 <= step < 2**32:
        raise ValueError(f"`step` is {step}; it counts from 1 and must be below 2**32")


def _through_torch(
    batch: Batch,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    numbers: Tensor | None,
) -> None:
    torch.ops.sharpscope.adamw4_(
        batch.params,
        batch.grads,
        batch.m_codes,
        batch.m_scales,
        batch.v_codes,
        batch.v_scales,
        batch.v_columns,
        batch.skipped,
        batch.ids,
        batch.map,
        batch.stochastic,
        batch.seed,
        lr,
        *betas,
        eps,
        weight_decay,
        step,
        numbers,
    )


def _check_lists(params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[AdamW4State]) -> None:
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"there are {len(params)} `params`, {len(grads)} `grads` and {len(states)} `states`; pass one of each for "
            "every parameter, and leave out parameters without a gradient"
        )
    if not params:
        return
    device, map = params[0].device, states[0].v.map
    for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
        m, v = state.m, state.v
        shape = p.shape
        fits = p.dtype in DTYPES and g.dtype in DTYPES and p.is_contiguous() and g.is_contiguous()
        fits = fits and shape == g.shape == m.shape == v.shape and m.map == SIGNED_MAP and v.map == map
        if not fits or not p.device == g.device == m.codes.device == v.codes.device == device:
            _explain(i, p, g, state, device, map)


def _explain(i: int, p: Tensor, g: Tensor, state: AdamW4State, device: torch.device, map: str) -> None:
    m, v = state.m, state.v
    for name, x in (("params", p), ("grads", g)):
        if x.dtype not in DTYPES:
            raise TypeError(f"`{name}[{i}]` is {x.dtype}; it must be float32 or bfloat16")
        if not x.is_contiguous():
            raise ValueError(f"`{name}[{i}]` has strides {list(x.stride())}; it must be contiguous")
    if not p.shape == g.shape == m.shape == v.shape:
        raise ValueError(
            f"`params[{i}]` has shape {list(p.shape)}, `grads[{i}]` {list(g.shape)} and the moments in "
            f"`states[{i}]` {list(m.shape)} and {list(v.shape)}; all must be equal"
        )
    if not p.device == g.device == m.codes.device == v.codes.device == device:
        raise ValueError(
            f"`params[{i}]` is on {p.device}, `grads[{i}]` on {g.device}, `states[{i}]` on {m.codes.device} and "
            f"{v.codes.device}, `params[0]` on {device}; make one call for each device"
        )
    raise ValueError(
        f"`states[{i}]` holds maps {m.map!r} and {v.map!r}; m needs 'de', and v in all states {map!r} as in the first"
    )


def _check_memory(batch: Batch) -> None:
    """What is written must share memory with nothing else; two gradients may be one tensor."""
    tensors = (batch.params, batch.m_codes, batch.v_codes, batch.grads)
    first = batch.addresses[[0, 2, 4, 1]].reshape(-1)
    size = np.array([x.nbytes for kind in tensors for x in kind])
    order = first.argsort()
    ends = (first + size)[order]
    if (ends[:-1] > first[order[1:]]).any():
        _explain_overlap(first[order].tolist(), ends.tolist(), order.tolist(), len(batch.params))


def _explain_overlap(first: list[int], last: list[int], order: list[int], count: int) -> None:
    """Raise unless all overlaps of these spans, in ascending order, are of gradients with one another."""
    kinds = ("params[{}]", "states[{}].m", "states[{}].v", "grads[{}]")
    farthest = {}  # of what is written and of gradients, the span that reaches farthest so far
    for at, index in enumerate(order):
        reads = index >= 3 * count
        for of_reads, before in farthest.items():
            if last[before] > first[at] and not (reads and of_reads):
                names = [kinds[i // count].format(i % count) for i in sorted((order[before], index))]
                raise ValueError(f"`{names[0]}` and `{names[1]}` share memory; a step updates each of them by itself")
        if last[at] > last[farthest.setdefault(reads, at)]:
            farthest[reads] = at
