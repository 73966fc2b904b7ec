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

from ..kernels.accurate import norm
from ..kernels.batched_lanczos import DTYPES, LanczosRuns, NonFiniteProduct, batched_lanczos
from ..landscape.memory import available_bytes, refuse_unless_fits
from .deflation import Complement
from .hessian_block import products
from .operator import LinearOperator
from .probes import ProbeMoments, probe_groups, rademacher, random_generator

# Share of the free memory that the bases of a round may take, and the vectors of one probe beside the k of its basis.
MEMORY_SHARE = 8
VECTORS_BESIDE = 4
# A basis is rounded to float16 where it would take more than one part in so many of the free memory, and than this.
UNROUNDED_SHARE = 2
SMALL_BASIS = 256 << 20


@dataclass
class Sampled:
    """What the probes of one operator have given so far.

    Attributes:
        op: Symmetric, shape [n, n].
        generator: Of its probes.
        moments: Of the samples zᵀ A z.
        orthogonality: Largest inner product of two vectors of one basis, seen at the last step.
        alpha, beta, steps, remainder: Coefficients [g, k], [g, k − 1], steps made [g] and length of what was left after
            the last one [g], one entry for each round, on the operator's device.
        products, seconds: Spent; the time in products of its own, and its share by size of the other work.
    """

    op: LinearOperator
    generator: torch.Generator
    moments: ProbeMoments
    orthogonality: float = 0.0
    alpha: list[Tensor] = field(default_factory=list)
    beta: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    remainder: list[Tensor] = field(default_factory=list)
    products: int = 0
    seconds: float = 0.0


def sample(
    ops: Sequence[LinearOperator],
    num_steps: int,
    num_probes: int,
    seeds: Sequence[int],
    on_products: Callable[[int], object],
    *,
    basis_dtype: torch.dtype | None = None,
) -> list[Sampled]:
    """`num_steps` of Lanczos from each of `num_probes` random sign vectors for every operator.

    As many operators and probes run in lockstep as an eighth of the free memory holds bases of, at least one of each;
    what comes out does not depend on that beyond rounding. On a `Complement` the sign vectors are projected into it.

    Args:
        ops: On one device and in one dtype.
        seeds: Of the operators' probes.
        on_products: Called with the number of products just made.
        basis_dtype: In which the bases are kept; by default float16 where one in float32 would take more than half of
            the free memory, else as the run.
    """
    samples = [Sampled(op, random_generator(op, seed), ProbeMoments(op)) for op, seed in zip(ops, seeds, strict=True)]
    extend(samples, num_steps, num_probes, on_products, basis_dtype=basis_dtype)
    return samples


def extend(
    samples: list[Sampled],
    num_steps: int,
    num_probes: int,
    on_products: Callable[[int], object],
    *,
    basis_dtype: torch.dtype | None = None,
) -> None:
    """Go on with `samples` until every operator has `num_probes` in all; see `sample`."""
    budget = available_bytes(samples[0].op.device) // MEMORY_SHARE
    if basis_dtype is None:
        basis_dtype = default_basis_dtype([s.op for s in samples], num_steps)
    largest = max((s.op for s in samples), key=lambda op: op.shape[0])
    per_step = largest.shape[0] * (basis_dtype or _working_dtype(largest)).itemsize
    refuse_unless_fits(
        run_bytes(largest, num_steps, basis_dtype),
        largest.device,
        what=f"a Lanczos run of {num_steps} steps with {largest!r}",
        cure=f"{available_bytes(largest.device) // per_step - 2 * VECTORS_BESIDE} steps would fit: lower `num_steps`"
        + ("" if basis_dtype == torch.float16 else ", or take basis_dtype=torch.float16"),
    )
    for group in _groups(samples, num_steps, budget, basis_dtype):
        fits = max(1, budget // sum(run_bytes(s.op, num_steps, basis_dtype) for s in group))
        while left := num_probes - group[0].moments.count:
            most = min(next(probe_groups(s.op, left)) for s in group)
            _advance(group, num_steps, min(most, fits), on_products, basis_dtype)


def _groups(
    samples: Sequence[Sampled], num_steps: int, budget: int, basis_dtype: torch.dtype | None
) -> list[list[Sampled]]:
    """Neighbours whose bases for one probe fit the budget together, at least one in a group."""
    groups: list[list[Sampled]] = []
    taken = math.inf
    for s in samples:
        size = run_bytes(s.op, num_steps, basis_dtype)
        if taken + size > budget:
            groups.append([])
            taken = 0
        groups[-1].append(s)
        taken += size
    return groups


def default_basis_dtype(ops: Sequence[LinearOperator], num_steps: int) -> torch.dtype | None:
    """float16 where one run's basis in float32 would take more than half of the free memory; else as the run."""
    limit = max(available_bytes(ops[0].device) // UNROUNDED_SHARE, SMALL_BASIS)
    return _rounded_dtype(ops[0]) if max(run_bytes(op, num_steps) for op in ops) > limit else None


def probes_at_once(op: LinearOperator, num_steps: int, num_probes: int, basis_dtype: torch.dtype | None) -> int:
    """How many probes of one operator run in lockstep: as an eighth of the free memory holds, at least one."""
    fits = max(1, available_bytes(op.device) // MEMORY_SHARE // run_bytes(op, num_steps, basis_dtype))
    return min(fits, next(probe_groups(op, num_probes)))


def run_bytes(op: LinearOperator, num_steps: int, basis_dtype: torch.dtype | None = None) -> int:
    """Memory of one probe's run."""
    working = _working_dtype(op)
    return op.shape[0] * (num_steps * (basis_dtype or working).itemsize + VECTORS_BESIDE * working.itemsize)


def _rounded_dtype(op: LinearOperator) -> torch.dtype | None:
    """A float64 run is there for its digits."""
    return torch.float16 if _working_dtype(op) == torch.float32 else None


def _working_dtype(op: LinearOperator) -> torch.dtype:
    return op.dtype if op.dtype in DTYPES else torch.float32


def _advance(
    group: list[Sampled],
    num_steps: int,
    count: int,
    on_products: Callable[[int], object],
    basis_dtype: torch.dtype | None,
) -> None:
    """One round: `count` probes of every operator."""
    began = time.perf_counter()
    before = [s.products for s in group]
    probes = [rademacher(s.op, count, s.generator).to(torch.int8) for s in group]
    starts = [_projected(s.op, Z.to(_working_dtype(s.op))) for s, Z in zip(group, probes, strict=True)]
    lengths = [[float(norm(z)) for z in Z] for Z in starts]
    product = _Product(group, count, on_products)
    start = starts.pop().reshape(-1) if len(starts) == 1 else torch.cat([Z.reshape(-1) for Z in starts])
    try:
        runs = batched_lanczos(product, product.offsets, num_steps, start=start, basis_dtype=basis_dtype)
    except NonFiniteProduct as error:
        raise _not_finite(group[error.recurrence // count]) from error
    del start, starts
    for i, (s, Z) in enumerate(zip(group, probes, strict=True)):
        rows = slice(i * count, (i + 1) * count)
        if not bool(torch.isfinite(runs.alpha[rows]).all() & torch.isfinite(runs.residual_norm[rows]).all()):
            raise _not_finite(s)
        s.alpha.append(runs.alpha[rows])
        s.beta.append(runs.beta[rows])
        s.steps.append(runs.steps[rows])
        s.remainder.append(runs.residual_norm[rows])
        for row, z in enumerate(Z):
            b = i * count + row
            image = lengths[i][row] * _first_image(runs, b)
            s.moments.add(z.to(s.op.dtype), image.to(s.op.dtype), product=before[i] + row + 1)
            s.orthogonality = max(s.orthogonality, runs.orthogonality(b))
    shared = time.perf_counter() - began - sum(product.seconds)
    size = sum(s.op.shape[0] for s in group)
    for s, own in zip(group, product.seconds, strict=True):
        s.seconds += own + shared * s.op.shape[0] / size


def _projected(op: LinearOperator, Z: Tensor) -> Tensor:
    return op.subspace.project(Z) if isinstance(op, Complement) else Z


def _first_image(runs: LanczosRuns, b: int) -> Tensor:
    """A q₀ from the first step of recurrence b."""
    image = runs.alpha[b, 0].item() * runs.vector(b, 0)
    if int(runs.steps[b]) > 1:
        image = image + runs.beta[b, 0].item() * runs.vector(b, 1)
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
        wanted, places = [], []
        for i, s in enumerate(self._group):
            part = slice(self.offsets[i * self._count], self.offsets[(i + 1) * self._count])
            V, image = flat[part].view(self._count, -1), out[part].view(self._count, -1)
            rows = V.any(dim=1).nonzero().squeeze(1) if V.device.type == "cpu" else slice(None)
            chosen = V[rows].to(s.op.dtype).T.contiguous()
            if chosen.shape[1]:
                wanted.append((s, chosen))
                places.append((i, image, rows))
        images, seconds = products([s.op for s, _ in wanted], [V for _, V in wanted], time.perf_counter)
        for (s, V), (i, image, rows), W, spent in zip(wanted, places, images, seconds, strict=True):
            if W.shape != V.shape or W.dtype != V.dtype:
                raise ValueError(
                    f"product of {s.op!r} is {W.dtype} {list(W.shape)}; matmat must return {V.dtype} {list(V.shape)}"
                )
            image[rows] = W.detach().T.to(flat.dtype)
            self.seconds[i] += spent
            s.products += V.shape[1]
            self._on_products(V.shape[1])
        return out
