"""Steps and probes of stochastic Lanczos quadrature chosen by the accuracy that is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from .deflation import Complement, leading_subspace, products_for
from .density import SpectralDensity
from .lockstep import Sampled, extend, sample
from .operator import LinearOperator
from .quadrature import Watched, densities, exact_density

# Where the search begins.
FIRST_STEPS = 20
FIRST_PROBES = 4
DEFLATE = 10
# What neglected residuals and unresolved nodes may take of the tolerance; the rest is for the scatter of probes.
STEPS_SHARE = 0.5
# The error of the nodes falls as the steps grow, or faster: they grow by what is missing, between these factors.
GROWTH = (1.5, 4.0)
# Beyond these the nodes gain little, as long as there are fewer probes than this.
MOST_STEPS = 320
# What an operator is told to expect: a few hundred products are usual.
EXPECTED_PRODUCTS = 300


@dataclass(frozen=True)
class Target:
    """An accuracy in units of the spectral radius, and the most to spend on it; None leaves steps and probes free."""

    tol: float
    num_steps: int | None
    num_probes: int | None
    max_products: int

    def __post_init__(self) -> None:
        if not self.tol > 0:
            raise ValueError(f"`tol` is {self.tol}; a share of the spectral radius must be positive, like 1e-3")
        if self.num_probes == 1:
            raise ValueError("`num_probes` is 1; with `tol` at least two probes are needed to see their scatter")
        if self.num_steps == 1:
            raise ValueError("`num_steps` is 1; one node has no resolution: take 20 to 100 steps, or leave it to `tol`")


def density_within(
    op: LinearOperator, target: Target, deflate: int | None, basis_dtype: torch.dtype | None, seed: int, bar: tqdm
) -> SpectralDensity:
    """The density with `w1_error()` of at most `target.tol` times its radius, or the best within the budget.

    Each round either starts again with more steps or goes on with more probes, whichever limits the accuracy. A matrix
    of which all columns cost less than the next round is formed as a whole.
    """
    n = op.shape[0]
    steps, most = target.num_steps or FIRST_STEPS, target.num_probes or n
    probes = min(FIRST_PROBES, most)
    bar.reset(target.max_products)
    op.expect(min(EXPECTED_PRODUCTS, target.max_products))
    if n <= steps * probes:
        return exact_density(Watched(op, bar.update))
    deflate = _default_pairs(n, target.max_products) if deflate is None else deflate
    whole, lost = op, 0
    if deflate:
        subspace = leading_subspace(Watched(op, bar.update), deflate, seed=seed)
        op = Complement(op, subspace)

    def start() -> list[Sampled]:
        return sample([op], steps, probes, [seed], bar.update, basis_dtype=basis_dtype)

    samples = start()
    while True:
        (density,) = densities(samples)
        density = replace(density, products=density.products + lost)
        goal = target.tol * density.radius()
        if density.w1_error() <= goal:
            return density
        left = target.max_products - density.products
        systematic = density.resolution + density.coupling
        if systematic > STEPS_SHARE * goal and target.num_steps is None and steps < MOST_STEPS:
            factor = min(max(systematic / (STEPS_SHARE * goal), GROWTH[0]), GROWTH[1])
            more_steps, more = min(math.ceil(factor * steps), MOST_STEPS, n), 0
        else:
            more_steps, more = 0, _more_probes(density, goal - systematic, probes, min(left // steps, most - probes))
        cost = more_steps * probes + more * steps
        if density.products + cost >= n and n <= left:
            found = exact_density(Watched(whole, bar.update))
            return replace(found, products=density.products + n)
        if cost == 0 or cost > left:
            return replace(density, converged=False)
        if more_steps:
            lost += samples[0].products
            steps, probes = more_steps, min(FIRST_PROBES, most)
            samples = start()
        else:
            probes += more
            extend(samples, steps, probes, bar.update, basis_dtype=basis_dtype)


def _default_pairs(n: int, max_products: int) -> int:
    """Ten where the run for them is a small part of the budget and of the matrix."""
    return DEFLATE if products_for(DEFLATE, n) <= min(n, max_products) // 4 else 0


def _more_probes(density: SpectralDensity, room: float, probes: int, most: int) -> int:
    """Probes to add so that the standard error fits into `room`, at most as many as there are and `most`."""
    if room <= 0:
        return 0
    needed = math.ceil(probes * (density.w1_stderr() / room) ** 2)
    return max(min(needed - probes, probes, most), min(most, 1))
