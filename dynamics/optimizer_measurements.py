"""Measurements of an optimizer's memory: how much it keeps, and what is lost where that is encoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.accurate import dot, norm
from .optimizers.adamw4bit import AdamW4bit
from .optimizers.base import tensor_bytes
from .point import Point
from .row import Row


@dataclass(frozen=True)
class OptimizerStateBytes:
    """Memory that the optimizer keeps between steps: the tensors of its state, codes, scales and counters among them.

    Rows: bytes under the measurement's name, and "NAME_per_parameter", the same over the number of entries of the
    optimizer's parameters. Exact, for any optimizer: `state_bytes()` where it has that, else the tensors of `state`.
    """

    every: int | None = None
    _: KW_ONLY
    name: str = "optimizer_state_bytes"

    def measure(self, point: Point) -> Iterator[Row]:
        if point.optimizer is None:
            return
        num_bytes = state_bytes_of(point.optimizer)
        entries = sum(p.numel() for group in point.optimizer.param_groups for p in group["params"])
        yield Row(self.name, num_bytes, error=0.0)
        yield Row(f"{self.name}_per_parameter", num_bytes / max(entries, 1), error=0.0)


@dataclass(frozen=True)
class CodecError:
    """What `AdamW4bit` loses of the moments of the next step when it encodes them.

    With g the gradient of the objective, m' = β₁ m + (1 − β₁) g and v' = β₂ v + (1 − β₂) g² are formed from the kept
    moments, encoded as the next step would encode them, and decoded to m̃ and ṽ. Nothing is changed. Where the
    optimizer trains on minibatches, these are the moments that it would have with the gradient of all data.

    Rows for each parameter that is compressed, under its name as block:

    - NAME_m, NAME_v: ‖m̃ − m'‖ / ‖m'‖ and ‖ṽ − v'‖ / ‖v'‖;
    - NAME_update: 1 − cosine between the steps m̃/(√ṽ̂ + ε) and m'/(√v̂' + ε), with bias corrections;
    - NAME_lowest: share of the entries of v whose code is the lowest, which hides how small they are;
    - NAME_changed: share of the codes of v that this step changes. Nearest rounding freezes them for β₂ near 1.

    The last two only where v has four-bit codes. No rows for other optimizers; of a wrapper the base is read.
    """

    every: int | None = None
    _: KW_ONLY
    name: str = "codec_error"

    def measure(self, point: Point) -> Iterator[Row]:
        optimizers = [part for part in _parts(point.optimizer) if isinstance(part, AdamW4bit)]
        if not optimizers:
            return
        gradients = point.objective.unflatten(point.gradient())
        for block, p in point.objective.parameters.items():
            for optimizer in optimizers:
                if any(p is q for group in optimizer.param_groups for q in group["params"]):
                    yield from self._rows(optimizer, p, gradients[block], block)

    @torch.no_grad()
    def _rows(self, optimizer: AdamW4bit, p: Tensor, gradient: Tensor, block: str) -> Iterator[Row]:
        if not optimizer.is_compressed(p):
            return
        m, v = optimizer.next_moments(p, gradient.to(p.device))
        kept = optimizer.encoded(p, m.clone(), v.clone())
        m_again, v_again = optimizer.decoded(p, kept)
        yield Row(f"{self.name}_m", _relative(m_again, m), block=block)
        yield Row(f"{self.name}_v", _relative(v_again, v), block=block)
        exact, coarse = optimizer.direction(p, m, v), optimizer.direction(p, m_again, v_again)
        yield Row(f"{self.name}_update", _angle(exact, coarse), block=block)
        if "codes" in kept[1]:
            codes = nibbles(kept[1]["codes"], p.numel())
            yield Row(f"{self.name}_lowest", float((codes == 0).double().mean()), block=block)
            before = optimizer.state.get(p, {}).get("v_codes")
            if before is not None:
                changed = codes != nibbles(before, p.numel())
                yield Row(f"{self.name}_changed", float(changed.double().mean()), block=block)


def state_bytes_of(optimizer: Any) -> int:
    """Bytes of the tensors that any optimizer keeps between steps."""
    if hasattr(optimizer, "state_bytes"):
        return int(optimizer.state_bytes())
    if hasattr(optimizer, "optimizers"):
        return sum(state_bytes_of(part) for part in optimizer.optimizers)
    return tensor_bytes(optimizer.state.values() if isinstance(optimizer.state, Mapping) else [])


def nibbles(codes: Tensor, n: int) -> Tensor:
    """The n codes in uint8 [⌈n/2⌉], the earlier one in the low nibble."""
    return torch.stack((codes & 15, codes >> 4), dim=1).reshape(-1)[:n]


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers that an optimizer is made of."""
    if hasattr(optimizer, "optimizers"):
        for part in optimizer.optimizers:
            yield from _parts(part)
    elif hasattr(optimizer, "base"):
        yield from _parts(optimizer.base)
    elif optimizer is not None:
        yield optimizer


def _relative(approximate: Tensor, exact: Tensor) -> float:
    size = float(norm(exact.reshape(-1)))
    return float(norm((approximate - exact).reshape(-1))) / size if size > 0 else math.nan


def _angle(one: Tensor, other: Tensor) -> float:
    a, b = one.reshape(-1).double(), other.reshape(-1).double()
    scale = float(norm(a)) * float(norm(b))
    return 1 - float(dot(a, b)) / scale if scale > 0 else math.nan
