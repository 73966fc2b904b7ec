"""AdamW whose two moments take four bits an entry: decoded, updated and encoded again in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _ops
from .adamw4_batch import Batch, scalars, scalars_tensor
from .codec import ROUNDINGS, SIGNED_MAP, UNSIGNED_MAPS, Packed, Rounding, Scale, check_packed, check_streams, is_plain
from .codec_tables import BLOCK, VERSION, ZERO_CODE

DTYPES = (torch.float32, torch.bfloat16)
LARGEST, SMALLEST, BELOW_ONE = torch.finfo(torch.float32).max, 2.0**-149, 1 - 2.0**-24
# A matrix has rank-1 scales if they take at most half a byte an entry.
ENTRIES_PER_SCALE = 8


@dataclass(frozen=True, eq=False)
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
    """Moments of zero for `param`, on its device; `map` and `scale` are those of `quantize_v`.

    "rank1" stands for scales of blocks where row and column maxima would take more than half a byte an entry: in
    matrices with few rows or columns.
    """
    if not isinstance(param, Tensor) or param.dtype not in DTYPES:
        found = param.dtype if isinstance(param, Tensor) else f"a {type(param).__name__}"
        raise TypeError(f"`param` is {found}; it must be a tensor of float32 or bfloat16")
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
    rank1 = scale_of_shape(shape, scale) == "rank1"
    m, v = moment(SIGNED_MAP, blocks), moment(map, (shape[0], n // shape[0]) if rank1 else blocks)
    return AdamW4State(m, v, torch.zeros(1, dtype=torch.int64, device=param.device), id)


def scale_of_shape(shape: torch.Size, scale: Scale) -> Scale:
    """The kind of scales that `adamw4_state` gives a second moment of this shape where `scale` is asked for."""
    n = shape.numel()
    pays = len(shape) > 1 and n > 0 and ENTRIES_PER_SCALE * (shape[0] + n // shape[0]) <= n
    return "rank1" if scale == "rank1" and pays else "block128"


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
        numbers: From `adamw4_numbers`, on the device of the parameters: takes the place of lr, betas, eps, weight_decay
            and step, which then count for nothing. A captured CUDA graph reads it at every replay. A step compiled by
            torch.compile needs it as soon as the learning rate changes: torch compiles anew for every other float.

    Raises:
        TypeError, ValueError: Lists of different lengths; dtypes, shapes, layouts or devices that do not fit; tensors
            that share memory; a state used twice; numbers out of range.
        RuntimeError: A CUDA graph is being captured and no step has been made yet on these very tensors.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2; Li, Chen and Zhu, Memory
    Efficient Optimizers with 4-bit States, 2023, algorithm 1.
    """
    _check_lists(params, grads, states)
    check_numbers(lr, betas, eps, weight_decay, step)
    if rounding not in ROUNDINGS:
        raise ValueError(f"`rounding` is {rounding!r}; it must be 'nearest' or 'stochastic'")
    check_streams(seed, 0, 0)
    if rounding == "stochastic" and len({state.id for state in states}) < len(states):
        raise ValueError(
            f"`states` have the ids {[state.id for state in states][:10]}, so that tensors would be rounded with the "
            "same random numbers; give each its own: adamw4_state(p, id=i)"
        )
    if not params:
        return
    if numbers is not None:
        _check_numbers_tensor(numbers, params[0].device)
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
        if not isinstance(value, int | float | torch.SymFloat):
            raise TypeError(f"`{name}` is {value!r}; it must be a number")
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` is {value}; it must be at least 0 and finite")
        if abs(value) > LARGEST or 0 < value < SMALLEST:
            raise ValueError(f"`{name}` is {value}; in float32, in which steps are computed, that is 0 or infinite")
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(0 <= beta <= BELOW_ONE for beta in betas):
        raise ValueError(f"`betas` is {betas}; it must hold two numbers of at least 0, below 1 in float32")
    if isinstance(step, bool) or not isinstance(step, int | torch.SymInt):
        raise TypeError(f"`step` is {step!r}; it must be an int, the count of this step")
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
    # Addresses are not known yet, and what shares memory will have copies of its own.
    written = [*batch.params, *batch.m_codes, *batch.v_codes]
    if len({*written, *batch.grads}) < len(written) + len({*batch.grads}):
        raise ValueError("`params`, `grads` and `states` share tensors; a step updates each of them by itself")
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


def _check_numbers_tensor(numbers: Tensor, device: torch.device) -> None:
    if (
        numbers.dtype != torch.float32
        or numbers.shape != (9,)
        or not numbers.is_contiguous()
        or numbers.device != device
    ):
        raise ValueError(
            f"`numbers` is {numbers.dtype} {list(numbers.shape)} on {numbers.device}; it must be contiguous float32 "
            f"[9] on {device}: adamw4_numbers(...).to(device)"
        )


def _check_lists(params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[AdamW4State]) -> None:
    for name, given in (("params", params), ("grads", grads), ("states", states)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"`{name}` is a {type(given).__name__}; pass a list, one entry for each parameter")
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"there are {len(params)} `params`, {len(grads)} `grads` and {len(states)} `states`; pass one of each for "
            "every parameter, and leave out parameters without a gradient"
        )
    if not params:
        return
    for name, given, kind in (("params", params, Tensor), ("grads", grads, Tensor), ("states", states, AdamW4State)):
        for i, x in enumerate(given):
            if not isinstance(x, kind):
                cure = "leave out parameters without a gradient" if name == "grads" else "see adamw4_state"
                raise TypeError(f"`{name}[{i}]` is a {type(x).__name__}; it must be a {kind.__name__}: {cure}")
    device, map = params[0].device, states[0].v.map
    for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
        m, v = state.m, state.v
        shape = p.shape
        fits = (
            p.dtype in DTYPES
            and g.dtype in DTYPES
            and p.layout == g.layout == torch.strided
            and p.is_contiguous()
            and g.is_contiguous()
        )
        fits = fits and shape == g.shape == m.shape == v.shape and m.map == SIGNED_MAP and v.map == map
        fits = fits and m.version == v.version == VERSION
        fits = fits and state.skipped.dtype == torch.int64 and state.skipped.shape == (1,)
        fits = fits and is_plain(p) and is_plain(g)
        if not fits or not p.device == g.device == m.codes.device == v.codes.device == state.skipped.device == device:
            _explain(i, p, g, state, device, map)


def _explain(i: int, p: Tensor, g: Tensor, state: AdamW4State, device: torch.device, map: str) -> None:
    m, v = state.m, state.v
    for name, x in (("params", p), ("grads", g)):
        if x.dtype not in DTYPES:
            raise TypeError(f"`{name}[{i}]` is {x.dtype}; it must be float32 or bfloat16: use .float()")
        if x.layout != torch.strided:
            raise ValueError(f"`{name}[{i}]` is {x.layout}; it must be dense: use .to_dense()")
        if not x.is_contiguous():
            raise ValueError(f"`{name}[{i}]` has strides {list(x.stride())}; it must be contiguous: use .contiguous()")
        if not is_plain(x):
            raise ValueError(f"`{name}[{i}]` is a negated view or has no memory of its own: use .resolve_neg().clone()")
    if not p.shape == g.shape == m.shape == v.shape:
        raise ValueError(
            f"`params[{i}]` has shape {list(p.shape)}, `grads[{i}]` {list(g.shape)} and the moments in "
            f"`states[{i}]` {list(m.shape)} and {list(v.shape)}; all must be equal"
        )
    if state.skipped.dtype != torch.int64 or state.skipped.shape != (1,):
        raise ValueError(
            f"`states[{i}].skipped` is {state.skipped.dtype} {list(state.skipped.shape)}; it must be int64 [1], as "
            "adamw4_state makes it"
        )
    if not p.device == g.device == m.codes.device == v.codes.device == state.skipped.device == device:
        raise ValueError(
            f"`params[{i}]` is on {p.device}, `grads[{i}]` on {g.device}, `states[{i}]` on {m.codes.device}, "
            f"{v.codes.device} and {state.skipped.device}, `params[0]` on {device}; make one call for each device"
        )
    check_packed(m)
    check_packed(v)
    raise ValueError(
        f"`states[{i}]` holds maps {m.map!r} and {v.map!r}; m needs 'de', and v in all states {map!r} as in the first"
    )


torch.serialization.add_safe_globals([AdamW4State])
