"""Measured parts of the study of coherence: random instances, and the family of the paper."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hessian.coherence import Coherence
from ...hessian.mean_square import MeanSquareStability

NUM_EXAMPLES = 100  # of the family
LAMBDA1 = 2.0  # λ_1(H) of the family
SAMPLINGS = ("bernoulli", "without_replacement")


def family(copies: int) -> Tensor:
    """Factors [100, d, 1]: `copies` Hessians on one axis, each other one on its own axis; λ_1(H) = 2."""
    factors = torch.zeros(NUM_EXAMPLES, NUM_EXAMPLES - copies + 1, 1, dtype=torch.float64)
    axes = torch.arange(NUM_EXAMPLES).sub(copies - 1).clamp(min=0)
    factors[torch.arange(NUM_EXAMPLES), axes] = math.sqrt(LAMBDA1 * NUM_EXAMPLES / copies)
    return factors


def random_factors(seed: int, n: int, d: int, r: int) -> Tensor:
    """Factors [n, d, r], normal, each example of its own random size."""
    random = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, d, r, generator=random, dtype=torch.float64)
    return factors * torch.rand(n, 1, 1, generator=random, dtype=torch.float64)


def family_values(copies: Sequence[int]) -> list[list[float]]:
    """σ, λ_1(H), max λ_1(H_i) of the family."""
    found = [Coherence.from_factors(family(c)) for c in copies]
    return [[f.sigma, f.lambda1, f.max_lambda1] for f in found]


def dense_agreement(num: int) -> dict[str, float]:
    """Coherence of random rank-2 Hessians (d = 6, n = 8) against matrix square roots."""
    import scipy.linalg

    torch.set_num_threads(1)
    found = {"S": 0.0, "sigma": 0.0, "violations": 0}
    for seed in range(num):
        factors = random_factors(seed, 8, 6, 2)
        H = factors @ factors.mT
        measured = Coherence.from_factors(factors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the matrices are singular
            roots = torch.stack([torch.as_tensor(np.real(scipy.linalg.sqrtm(h.numpy()))) for h in H])
        S = torch.linalg.matrix_norm(roots.unsqueeze(1) @ roots.unsqueeze(0))
        sigma = float(torch.linalg.eigvalsh(S)[-1] / torch.linalg.eigvalsh(H)[:, -1].max())
        found["S"] = max(found["S"], float((S - measured.S).abs().max() / S.max()))
        found["sigma"] = max(found["sigma"], abs(sigma - measured.sigma) / sigma)
        bound = measured.sigma * measured.max_lambda1 / 8
        found["violations"] += measured.lambda1 > bound * (1 + 1e-12)
    return found


def threshold_order(num: int) -> dict[str, Any]:
    """Violations of exact ≤ D ≤ theorem 1 ≤ 2/λ_1, for both samplings, and the ratios exact / theorem 1."""
    torch.set_num_threads(1)
    ratios, violations = [], 0
    for seed in range(num):
        n, d, r = 3 + seed % 6, 2 + seed % 5, 1 + seed % 3
        found = Coherence.from_factors(random_factors(seed, n, d, r))
        for sampling in SAMPLINGS:
            t = found.thresholds(1 + seed % n, sampling)
            order = [t.exact, t.condition_d, t.theorem1, t.gradient_descent]
            violations += any(a > b * (1 + 1e-12) for a, b in itertools.pairwise(order))
            ratios.append(t.exact / t.theorem1)
    return {"violations": violations, "ratios": [min(ratios), max(ratios)]}


def monte_carlo_growth(seed: int, runs: int) -> list[float]:
    """(mean − prediction) / standard error of ‖w‖² after five steps, for two samplings and two learning rates."""
    torch.set_num_threads(1)
    n, batch_size = 8, 2
    stability = MeanSquareStability(random_factors(1000 + seed, n, 6, 2))
    H = stability.coordinates @ stability.coordinates.mT
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(stability.rank, generator=random, dtype=torch.float64)
    found = []
    for sampling in SAMPLINGS:
        for share in (0.7, 1.3):
            lr = share * stability.threshold(batch_size, sampling=sampling)
            w, moment = start.expand(runs, -1), torch.outer(start, start)
            for _ in range(5):
                members = drawn((runs, n), batch_size, sampling, random).double()
                w = w - lr / batch_size * (torch.einsum("iab,rb->ria", H, w) * members.unsqueeze(2)).sum(1)
                moment = stability.advanced(moment, lr, batch_size, sampling=sampling)
            lengths = w.square().sum(1)
            error = float(lengths.std()) / math.sqrt(runs)
            found.append((float(lengths.mean()) - float(moment.trace())) / error)
    return found


def shared_axis(grid: Sequence[Sequence[float]]) -> dict[str, float]:
    """Radius and threshold on the axis of σ copies against their closed forms, for (σ, B, η)."""
    radius, threshold = 0.0, 0.0
    for copies, batch_size, lr in grid:
        stability = MeanSquareStability(family(int(copies))[:, :1])
        growth = NUM_EXAMPLES / batch_size - 1
        exact = (1 - lr * LAMBDA1) ** 2 + lr**2 * growth * LAMBDA1**2 / copies
        radius = max(radius, abs(stability.radius(lr, batch_size) - exact))
        limit = 2 * copies / (LAMBDA1 * (copies + growth))
        threshold = max(threshold, abs(stability.threshold(batch_size) / limit - 1))
    return {"radius": radius, "threshold": threshold}


def drawn(shape: tuple[int, ...], batch_size: int, sampling: str, random: torch.Generator) -> Tensor:
    """Which examples (last axis) are in each batch."""
    uniform = torch.rand(shape, generator=random)
    if sampling == "bernoulli":
        return uniform < batch_size / shape[-1]
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, uniform.topk(batch_size, dim=-1).indices, True)


def diverged(
    lr: float, batch_size: int, sampling: str, most: int, runs: int, steps: int, seed: int
) -> dict[str, list[float]]:
    """Share of runs of SGD on the family with ‖w‖² above 1000 times its start, for σ = 1 … `most`.

    All Hessians are diagonal, so that a run is a product of factors on each axis. "end": after the last step. "ever":
    after any step.
    """
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(1000 * seed + batch_size)
    members = drawn((runs, steps, NUM_EXAMPLES), batch_size, sampling, random)
    counts = members.cumsum(2, dtype=torch.int16)  # of the first so many examples
    start = torch.randn(runs, NUM_EXAMPLES, generator=random, dtype=torch.float64).square()
    found: dict[str, list[float]] = {"end": [], "ever": []}
    for copies in range(1, most + 1):
        factor = lr / batch_size * LAMBDA1 * NUM_EXAMPLES / copies
        shared = (1 - factor * counts[:, :, copies - 1].double()).abs().log().cumsum(1).mul(2).exp()
        own = members[:, :, copies:].cumsum(1).double().mul(2 * math.log(max(abs(1 - factor), 1e-300))).exp()
        lengths = start[:, :1] * shared + (own * start[:, copies:].unsqueeze(1)).sum(2)
        ratio = lengths / (start[:, 0] + start[:, copies:].sum(1)).unsqueeze(1)
        found["end"].append(float((ratio[:, -1] > 1000).double().mean()))
        found["ever"].append(float((ratio > 1000).any(1).double().mean()))
    return found


def diverged_for(batch_sizes: Sequence[int], **settings: Any) -> list[dict[str, list[float]]]:
    """`diverged` for several batch sizes."""
    return [diverged(batch_size=size, **settings) for size in batch_sizes]


def typical_exponents(lr: float, batch_size: int, sampling: str, most: int) -> list[float]:
    """Largest E log|factor| of an axis of the family, for σ = 1 … `most`: above 0 typical runs diverge."""
    from scipy.stats import binom, hypergeom

    found = []
    for copies in range(1, most + 1):
        factor = lr / batch_size * LAMBDA1 * NUM_EXAMPLES / copies
        largest = -math.inf
        for held in (copies, 1) if copies < NUM_EXAMPLES else (copies,):
            counts = np.arange(held + 1)
            if sampling == "bernoulli":
                shares = binom.pmf(counts, held, batch_size / NUM_EXAMPLES)
            else:
                shares = hypergeom.pmf(counts, NUM_EXAMPLES, held, batch_size)
            logarithms = np.log(np.maximum(np.abs(1 - factor * counts), 1e-300))
            largest = max(largest, float(shares @ logarithms))
        found.append(largest)
    return found
