"""Densities of the large blocks of a curvature matrix: all in lockstep, or each to an accuracy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from ..landscape.memory import available_bytes
from .deflation import MEMORY_SHARE, Complement, EndPairs, leading_subspace, products_for
from .density import SpectralDensity
from .estimate import NotConvergedWarning
from .extremes import Extremes, deflated_extremes, extremes
from .lanczos import plain_tensors
from .lockstep import sample
from .operator import LinearOperator
from .quadrature import densities
from .slq import DENSE_LIMIT, spectral_densities, spectral_density

Found = tuple[SpectralDensity, Extremes | None]


def densities_together(
    ops: Sequence[LinearOperator],
    seeds: Sequence[int],
    *,
    num_steps: int,
    num_probes: int,
    deflate: int,
    num_top: int,
    tol: float,
) -> list[Found]:
    """Their runs in lockstep, with `num_top` eigenvalues at each end that the same runs show.

    With `deflate`, so many leading eigenpairs of each are taken out first, by a run that goes on until the ends meet
    `tol`; the vectors of as many operators are held at once as an eighth of the free memory has room for. An operator
    with no more rows than all this would take products gets all its eigenvalues instead.
    """
    limit = max(num_steps, min(num_steps * num_probes, DENSE_LIMIT))
    whole = [i for i, op in enumerate(ops) if op.shape[0] <= limit]
    rest = [i for i, op in enumerate(ops) if op.shape[0] > limit]
    exact = spectral_densities(
        [ops[i] for i in whole], seeds=[seeds[i] for i in whole], num_steps=num_steps, num_probes=num_probes
    )
    found: dict[int, Found] = {i: (density, None) for i, density in zip(whole, exact, strict=True)}
    if rest and num_steps == 1:
        raise ValueError("`num_steps` is 1; one node is no density: take 20 to 100 steps")
    wanted = EndPairs(num_top, tol) if deflate else None
    with plain_tensors():
        for group in _groups([ops[i] for i in rest], deflate, wanted):
            numbers, rest = rest[: len(group)], rest[len(group) :]
            together = _sampled(group, [seeds[i] for i in numbers], num_steps, num_probes, deflate, num_top, tol)
            found |= dict(zip(numbers, together, strict=True))
    return [found[i] for i in range(len(ops))]


def _sampled(
    ops: Sequence[LinearOperator],
    seeds: Sequence[int],
    num_steps: int,
    num_probes: int,
    deflate: int,
    num_top: int,
    tol: float,
) -> list[Found]:
    """A group whose deflated vectors are held at once."""
    ends = EndPairs(num_top, tol) if deflate else None
    for op in ops:
        op.expect(num_steps * num_probes + (products_for(deflate, op.shape[0], ends) if deflate else 0))
    if deflate:
        ops = [
            Complement(op, leading_subspace(op, deflate, seed=seed, ends=ends))
            for op, seed in zip(ops, seeds, strict=True)
        ]
    samples = sample(ops, num_steps, num_probes, seeds, lambda _: None)
    shown = [deflated_extremes(runs, num_top, tol) if deflate else extremes(runs, num_top) for runs in samples]
    return list(zip(densities(samples), shown, strict=True))


def _groups(ops: Sequence[LinearOperator], deflate: int, ends: EndPairs | None) -> list[list[LinearOperator]]:
    """Neighbours whose deflated vectors fit an eighth of the free memory together, at least one in a group."""
    if not deflate or not ops:
        return [list(ops)] if ops else []
    budget = available_bytes(ops[0].device) // MEMORY_SHARE
    groups: list[list[LinearOperator]] = []
    taken = math.inf
    for op in ops:
        size = products_for(deflate, op.shape[0], ends) * op.shape[0] * op.dtype.itemsize
        if taken + size > budget:
            groups.append([])
            taken = 0
        groups[-1].append(op)
        taken += size
    return groups


def densities_within(ops: Sequence[LinearOperator], seeds: Sequence[int], tol: float) -> list[Found]:
    """One after the other, each to `tol` times its spectral radius in Wasserstein-1 distance, by its own estimate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)  # in `converged`
        return [(spectral_density(op, tol=tol, seed=seed), None) for op, seed in zip(ops, seeds, strict=True)]
