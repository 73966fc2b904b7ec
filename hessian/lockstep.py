"""Lanczos from random probes on several operators at once: one flat product and one call of the kernel a step.

Sizes: n rows of an operator, g probes of a round, k Lanczos steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.batched_lanczos import DTYPES, LanczosRuns, NonFiniteProduct, batched_lanczos
from ..landscape.memory import available_bytes
from .operator import LinearOperator
from .probes import ProbeMoments, probe_groups, rademacher, random_generator

# Share of the free memory that the bases of a round may take, and the vectors of one probe beside the k of its basis.
MEMORY_SHARE = 8
VECTORS_BESIDE = 4


@dataclass
class Sampled:
    """What the probes of one operator have given so far.

    Attributes:
        op: Symmetric, shape [n, n].
        generator: Of its probes.
        moments: Of the samples zᵀ A z.
        alpha, beta, steps: Coefficients [g, k], [g, k − 1] and steps made [g], one entry for each round, on the
            operator's device.
        products, seconds: Spent; the time in products of its own, and its share by size of the other work.
    """

    op: LinearOperator
    generator: torch.Generator
    moments: ProbeMoments
    alpha: list[Tensor] = field(default_factory=list)
    beta: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    products: int = 0
    seconds: float = 0.0


def sample(
    ops: Sequence[LinearOperator],
    num_steps: int,
    num_probes: int,
    seeds: Sequence[int],
    on_products: Callable[[int], object],
) -> list[Sampled]:
    """`num_steps` of Lanczos from each of `num_probes` random sign vectors for every operator.

    As many operators and probes run in lockstep as an eighth of the free memory holds bases of, at least one of each;
    what comes out does not depend on that beyond rounding.

    Args:
        ops: On one device and in one dtype.
        seeds: Of the operators' probes.
        on_products: Called with the number of products just made.
    """
    samples = [Sampled(op, random_generator(op, seed), ProbeMoments(op)) for op, seed in zip(ops, seeds, strict=True)]
    vectors = num_steps + VECTORS_BESIDE
    budget = available_bytes(ops[0].device) // MEMORY_SHARE
    for group in _groups(samples, vectors, budget):
        fits = max(1, budget // sum(_bytes(s, vectors) for s in group))
        while left := num_probes - group[0].moments.count:
            most = min(next(probe_groups(s.op, left)) for s in group)
            _advance(group, num_steps, min(most, fits), on_products)
    return samples


def _groups(samples: Sequence[Sampled], vectors: int, budget: int) -> list[list[Sampled]]:
    """Neighbours whose bases for one probe fit the budget together, at least one in a group."""
    groups: list[list[Sampled]] = []
    taken = math.inf
    for s in samples:
        size = _bytes(s, vectors)
        if taken + size > budget:
            groups.append([])
            taken = 0
        groups[-1].append(s)
        taken += size
    return groups


def _bytes(s: Sampled, vectors: int) -> int:
    return s.op.shape[0] * vectors * _working_dtype(s.op).itemsize


def _working_dtype(op: LinearOperator) -> torch.dtype:
    return op.dtype if op.dtype in DTYPES else torch.float32


def _advance(group: list[Sampled], num_steps: int, count: int, on_products: Callable[[int], object]) -> None:
    """One round: `count` probes of every operator."""
    began = time.perf_counter()
    before = [s.products for s in group]
    probes = [rademacher(s.op, count, s.generator) for s in group]
    product = _Product(group, count, on_products)
    start = torch.cat([Z.reshape(-1) for Z in probes]).to(_working_dtype(group[0].op))
    try:
        runs = batched_lanczos(product, product.offsets, num_steps, start=start)
    except NonFiniteProduct as error:
        raise _not_finite(group[error.recurrence // count]) from error
    del start
    for i, (s, Z) in enumerate(zip(group, probes, strict=True)):
        rows = slice(i * count, (i + 1) * count)
        if not bool(torch.isfinite(runs.alpha[rows]).all() & torch.isfinite(runs.residual_norm[rows]).all()):
            raise _not_finite(s)
        s.alpha.append(runs.alpha[rows])
        s.beta.append(runs.beta[rows])
        s.steps.append(runs.steps[rows])
        for row, z in enumerate(Z):
            image = math.sqrt(len(z)) * _first_image(runs, i * count + row).to(z.dtype)
            s.moments.add(z, image, product=before[i] + row + 1)
    shared = time.perf_counter() - began - sum(product.seconds)
    size = sum(s.op.shape[0] for s in group)
    for s, own in zip(group, product.seconds, strict=True):
        s.seconds += own + shared * s.op.shape[0] / size


def _first_image(runs: LanczosRuns, b: int) -> Tensor:
    """A q₀ from the first step of recurrence b."""
    Q = runs.vectors(b)
    image = runs.alpha[b, 0].item() * Q[0]
    if int(runs.steps[b]) > 1:
        image = image + runs.beta[b, 0].item() * Q[1]
    return image


def _not_finite(s: Sampled) -> ValueError:
    return ValueError(
        f"a product of {s.op!r} has NaN or infinite entries; "
        "check that the loss and the gradient are finite at these weights, or work in float64"
    )


class _Product:
    """A V for every operator, on one flat vector: the vectors of an operator one after the other, operator by operator.

    On a CPU, where it costs nothing to look, a recurrence that has ended, whose vector is zero, gets no product.

    Attributes:
        offsets: Of the recurrences, one for each vector.
        seconds: In the products of each operator; on a GPU, where nothing is waited for, until they were handed over.
    """

    def __init__(self, group: list[Sampled], count: int, on_products: Callable[[int], object]) -> None:
        self._group, self._count, self._on_products = group, count, on_products
        self.offsets = [0]
        for s in group:
            for _ in range(count):
                self.offsets.append(self.offsets[-1] + s.op.shape[0])
        self.seconds = [0.0] * len(group)

    def __call__(self, flat: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        for i, s in enumerate(self._group):
            part = slice(self.offsets[i * self._count], self.offsets[(i + 1) * self._count])
            V, image = flat[part].view(self._count, -1), out[part].view(self._count, -1)
            rows = V.any(dim=1).nonzero().squeeze(1) if V.device.type == "cpu" else slice(None)
            chosen = V[rows]
            if len(chosen) == 0:
                continue
            began = time.perf_counter()
            image[rows] = _multiply(s.op, chosen)
            self.seconds[i] += time.perf_counter() - began
            s.products += len(chosen)
            self._on_products(len(chosen))
        return out


def _multiply(op: LinearOperator, V: Tensor) -> Tensor:
    """The rows A v [g, n] for the rows v of V [g, n]."""
    V = V.to(op.dtype).T.contiguous()
    W = op.matmat(V)
    if W.shape != V.shape or W.dtype != V.dtype:
        raise ValueError(
            f"product of {op!r} is {W.dtype} {list(W.shape)}; matmat must return {V.dtype} {list(V.shape)}"
        )
    return W.detach().T.to(_working_dtype(op))
