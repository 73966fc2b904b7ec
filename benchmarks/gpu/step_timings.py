"""The fused 4-bit step beside torch's own AdamW, and beside a copy of the bytes that it must move."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sharpscope.kernels import AdamW4State, Packed, adamw4_state, adamw4_step
from torch import Tensor

from .clock import Clock
from .report import Part

HOW: dict[str, Any] = {"lr": 1e-3, "step": 100}


class Variant(NamedTuple):
    """A kind of step: what it works on, and the bytes that it must move for each parameter."""

    name: str
    p: torch.dtype
    g: torch.dtype
    scale: str
    map: str
    rounding: str
    bytes: float


F, B = torch.float32, torch.bfloat16
VARIANTS = (
    Variant("block fp32", F, F, "block128", "linear", "nearest", 14.125),
    Variant("rank-1 fp32", F, F, "rank1", "linear", "nearest", 18.5625),
    Variant("block bf16", B, B, "block128", "linear", "nearest", 8.125),
    Variant("rank-1 bf16", B, B, "rank1", "linear", "nearest", 10.5625),
    Variant("block fp32, gradients bf16", F, B, "block128", "linear", "nearest", 12.125),
    Variant("block fp32, square map", F, F, "block128", "square", "nearest", 14.125),
    Variant("block fp32, stochastic", F, F, "block128", "linear", "stochastic", 14.125),
    Variant("rank-1 fp32, square map, stochastic", F, F, "rank1", "square", "stochastic", 18.5625),
)


class Buffers:
    """Parameters, gradients and states of one set."""

    def __init__(self, shapes: list[tuple[int, ...]], variant: Variant, device: torch.device) -> None:
        self.variant = variant
        self.params = [torch.randn(shape, device=device, dtype=variant.p) for shape in shapes]
        self.grads = [torch.randn(shape, device=device, dtype=variant.g) for shape in shapes]
        self.states = [
            adamw4_state(p, map=variant.map, scale=variant.scale, id=i)  # type: ignore[arg-type]
            for i, p in enumerate(self.params)
        ]

    def step(self) -> None:
        """One step on all tensors."""
        adamw4_step(self.params, self.grads, self.states, rounding=self.variant.rounding, **HOW)  # type: ignore[arg-type]

    def step_one_by_one(self) -> None:
        """The same in a call for each tensor."""
        for one in zip(self.params, self.grads, self.states, strict=True):
            adamw4_step(*([x] for x in one), rounding=self.variant.rounding, **HOW)  # type: ignore[arg-type]

    def parts(self) -> list[Tensor]:
        """Every tensor that a step writes."""
        moments = [packed for state in self.states for packed in (state.m, state.v)]
        return [*self.params, *(part for packed in moments for part in (packed.codes, *packed.scales))]

    def on_cpu(self) -> Buffers:
        """A copy."""
        copy = object.__new__(Buffers)
        copy.variant = self.variant
        copy.params, copy.grads = [p.cpu().clone() for p in self.params], [g.cpu().clone() for g in self.grads]
        copy.states = [
            AdamW4State(_on_cpu(state.m), _on_cpu(state.v), state.skipped.cpu().clone(), state.id)
            for state in self.states
        ]
        return copy


def _on_cpu(packed: Packed) -> Packed:
    scales = tuple(scale.cpu().clone() for scale in packed.scales)
    return replace(packed, codes=packed.codes.cpu().clone(), scales=scales, bad=packed.bad.cpu().clone())


def equals_cpu(buffers: Buffers) -> bool:
    """A further step gives the bytes that it gives on the CPU, in every tensor."""
    copy = buffers.on_cpu()
    buffers.step()
    copy.step()
    return all(
        torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(buffers.parts(), copy.parts(), strict=True)
    )


def time_steps(part: Part, clock: Clock, sizes: list[int], *, small_tensors: int) -> None:
    """All variants at all sizes, of which the largest is that of the figures, and many small tensors."""
    largest = math.isqrt(max(sizes)) ** 2
    for n in sizes:
        side = math.isqrt(n)
        shape, n = (side, side), side * side
        fused = _time(part, f"torch fused fp32, n = {n}", lambda n=n, s=shape: _torch(part, clock, s, n, F, fused=True))
        _time(part, "torch foreach fp32", lambda n=n, s=shape: _torch(part, clock, s, n, F, foreach=True))
        _time(part, "torch fused bf16", lambda n=n, s=shape: _torch(part, clock, s, n, B, fused=True))
        for variant in VARIANTS:
            found = _time(part, variant.name, lambda n=n, s=shape, v=variant: _ours(part, clock, s, n, v))
            if found and fused and n == largest:
                found["times_faster_than_torch_fused"] = fused["device_us"] / found["device_us"]
                _figures(part, variant, found)
        if n < 5e7:
            with forced("torch"):
                _time(
                    part,
                    "torch operations",
                    lambda n=n, s=shape: _ours(part, clock, s, n, VARIANTS[0], ", torch operations"),
                )
    _time(part, "small tensors", lambda: _small(part, clock, small_tensors))


def _figures(part: Part, variant: Variant, found: dict[str, Any]) -> None:
    if variant.name in ("block fp32", "rank-1 fp32"):
        part.figure(f"{variant.name} step: times faster than torch fused AdamW", found["times_faster_than_torch_fused"])
    if variant.name in ("block fp32", "block bf16"):
        part.figure(f"{variant.name} step: time over a copy of {variant.bytes:g} B/parameter", found["copies"])


def _time(part: Part, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The measurement; what goes wrong is kept and the next one comes."""
    try:
        return measure()
    except Exception as error:
        part.fail(what, error)
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ours(
    part: Part, clock: Clock, shape: tuple[int, int], n: int, variant: Variant, suffix: str = ""
) -> dict[str, Any]:
    moved = variant.bytes * n
    sets = [Buffers([shape], variant, clock.device) for _ in range(clock.sets_for(moved))]
    timing = clock.measure([buffers.step for buffers in sets])
    correct = equals_cpu(sets[0]) if not suffix else None
    del sets
    copies = timing["device_us"] / clock.copy_us(moved)
    record = part.add(variant.name + suffix, n, timing, bytes=moved, copies=copies, correct=correct)
    if correct is False:
        raise AssertionError(f"n = {n}: the step differs from that of the CPU")
    return record


def _torch(part: Part, clock: Clock, shape: tuple[int, int], n: int, dtype: torch.dtype, **kind: Any) -> dict[str, Any]:
    bytes_per_parameter = 7 * torch.finfo(dtype).bits // 8
    steps = []
    for _ in range(clock.sets_for(bytes_per_parameter * n)):
        p = torch.randn(shape, device=clock.device, dtype=dtype, requires_grad=True)
        p.grad = torch.randn_like(p)
        steps.append(torch.optim.AdamW([p], lr=HOW["lr"], **kind).step)
    timing = clock.measure(steps)
    moved = bytes_per_parameter * n
    copies = timing["device_us"] / clock.copy_us(moved)
    name = f"torch AdamW {', '.join(kind)}, {str(dtype).removeprefix('torch.')}"
    return part.add(name, n, timing, bytes=moved, copies=copies)


def _small(part: Part, clock: Clock, count: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(int(size),) for size in torch.randint(32, 4096, (count,), generator=rng)]
    n, variant = sum(size for (size,) in shapes), VARIANTS[0]
    sets = [Buffers(shapes, variant, clock.device) for _ in range(4)]
    together = clock.measure([buffers.step for buffers in sets])
    correct = equals_cpu(sets[0])
    # The warm-up makes the tables of every tensor, and the cache holds them.
    alone = clock.measure([buffers.step_one_by_one for buffers in sets])
    what = f"{count} small tensors"
    record = part.add(what, n, together, correct=correct)
    part.add(f"{what}, our step on each", n, alone)
    kinds: dict[str, dict[str, Any]] = {
        "loop": {"foreach": False, "fused": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    others = {}
    for name, kind in kinds.items():
        tensors = [torch.randn(shape, device=clock.device, requires_grad=True) for shape in shapes]
        for p in tensors:
            p.grad = torch.randn_like(p)
        others[name] = clock.measure([torch.optim.AdamW(tensors, lr=1e-3, **kind).step])
        part.add(f"{what}, torch AdamW {name}", n, others[name])
    if not correct:
        raise AssertionError("the step differs from that of the CPU")
    ours = "1000 small tensors in one step: times faster than"
    part.figure(f"{ours} our step on each, tables cached", alone["wall_us"] / together["wall_us"])
    part.figure(f"{ours} torch AdamW on each (foreach=False)", others["loop"]["wall_us"] / together["wall_us"])
    return record


@contextmanager
def forced(path: str) -> Iterator[None]:
    """Functions run on one path."""
    before = os.environ.get("SHARPSCOPE_KERNELS")
    os.environ["SHARPSCOPE_KERNELS"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["SHARPSCOPE_KERNELS"]
        else:
            os.environ["SHARPSCOPE_KERNELS"] = before
