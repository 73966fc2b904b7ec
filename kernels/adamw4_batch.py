"""What one fused step of 4-bit AdamW works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Scalars(NamedTuple):
    """The numbers of a step: computed in double precision, rounded to float32 once, the same on every path."""

    b1: np.float32
    omb1: np.float32
    b2: np.float32
    omb2: np.float32
    eps: np.float32
    decay: np.float32
    step_size: np.float32
    rs2: np.float32
    step: np.uint32


def scalars(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> Scalars:
    """β₁, 1 − β₁, β₂, 1 − β₂, ε, 1 − lr·wd, lr/(1 − β₁ᵗ), 1/√(1 − β₂ᵗ) and t itself for step t ≥ 1."""
    b1, b2 = betas
    numbers = (b1, 1 - b1, b2, 1 - b2, eps, 1 - lr * weight_decay, lr / (1 - b1**step), 1 / math.sqrt(1 - b2**step))
    return Scalars._make([*map(np.float32, numbers), np.uint32(step & 0xFFFFFFFF)])


def scalars_tensor(numbers: Scalars) -> Tensor:
    """As float32 [9]; the last entry holds the bits of the step count."""
    words = np.array(numbers[:8], np.float32).view(np.uint32)
    return torch.from_numpy(np.append(words, numbers.step).view(np.float32))


@dataclass(frozen=True)
class Batch:
    """Checked tensors of one device, one entry in each list, which stay as they are; contiguous, none overlapping.

    Attributes:
        params, grads: float32 or bfloat16, of any shape, n entries.
        m_codes, v_codes: uint8 [⌈n/2⌉].
        m_scales: float32 [⌈n/128⌉].
        v_scales: float32 [⌈n/128⌉]; row maxima [R] where the entry of `v_columns` is not empty.
        v_columns: float32, column maxima [C] with R C = n for rank-1 scales; [0] for scales of blocks.
        skipped: int64 [1], how many blocks were left as they were because their new moments were not finite.
        ids: Streams of random numbers: tensor i uses 2·id for m and 2·id + 1 for v.
        map: Of the second moment, "linear" or "square".
        stochastic: Rounding of both moments; `seed` is its key.
    """

    params: list[Tensor]
    grads: list[Tensor]
    m_codes: list[Tensor]
    m_scales: list[Tensor]
    v_codes: list[Tensor]
    v_scales: list[Tensor]
    v_columns: list[Tensor]
    skipped: list[Tensor]
    ids: list[int]
    map: str
    stochastic: bool
    seed: int

    @cached_property
    def addresses(self) -> np.ndarray:
        """Of the tensors [8, tensors], int64, in the order of the attributes."""
        lists = (self.params, self.grads, self.m_codes, self.m_scales, self.v_codes, self.v_scales, self.v_columns)
        return np.array([[x.data_ptr() for x in tensors] for tensors in (*lists, self.skipped)], np.uint64).view(
            np.int64
        )


def check_memory(batch: Batch) -> None:
    """Raise ValueError where what is written shares memory with anything else; two gradients may be one tensor."""
    lists = (batch.params, batch.m_codes, batch.m_scales, batch.v_codes, batch.v_scales, batch.v_columns, batch.skipped)
    first = batch.addresses[[0, 2, 3, 4, 5, 6, 7, 1]].reshape(-1)
    size = np.array([x.nbytes for tensors in (*lists, batch.grads) for x in tensors])
    order = first.argsort()
    ends = (first + size)[order]
    if (ends[:-1] > first[order[1:]]).any():
        _explain_overlap(first[order].tolist(), ends.tolist(), order.tolist(), len(batch.params))


def _explain_overlap(first: list[int], last: list[int], order: list[int], count: int) -> None:
    """Raise unless all overlaps of these spans, in ascending order, are of gradients with one another."""
    kinds = ("params[{}]", *("states[{}].m",) * 2, *("states[{}].v",) * 3, "states[{}].skipped", "grads[{}]")
    farthest: dict[bool, int] = {}  # of what is written and of gradients, the span that reaches farthest so far
    for at, index in enumerate(order):
        reads = index >= 7 * count
        for of_reads, before in farthest.items():
            if last[before] > first[at] and not (reads and of_reads):
                names = [kinds[i // count].format(i % count) for i in sorted((order[before], index))]
                raise ValueError(f"`{names[0]}` and `{names[1]}` share memory; a step updates each of them by itself")
        if last[at] > last[farthest.setdefault(reads, at)]:
            farthest[reads] = at
