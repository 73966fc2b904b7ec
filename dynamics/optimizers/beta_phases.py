"""For which (β₁, β₂) Adam converges on a given problem: the phase diagram, and a detector of divergence.

Source: Zhang, Chen, Shi, Sun, Luo, Adam Can Converge Without Any Modification On Update Rules, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .elementwise_adam import Paths, adam_paths
from .option_checks import check_choice, check_number
from .schedules import Values

CONVERGED, NEIGHBOURHOOD, DIVERGED = "converged", "neighbourhood", "diverged"


@dataclass(frozen=True)
class FiniteSum:
    """ℓ(x) = (1/n) Σ_i ℓ_i(x) of one variable; a step sees one ℓ_i.

    As a data set it is the indices 0 to n − 1: `value` is the loss of a batch of them, so that any optimizer can run on
    it, with `torch.utils.data.DataLoader(range(n), shuffle=True)` for instance.

    Attributes:
        name: In words.
        n: Number of terms, i.e. of minibatches per epoch.
        slope: ℓ_i'(x) for arrays x and i that broadcast.
        value: Mean of ℓ_i(x) over indices i [b], for a scalar x; differentiable.
        minimizer: Of ℓ, within the box.
        box: To which x is projected; None where it is free.
    """

    name: str
    n: int
    slope: Callable[[Values, Any], Values]
    value: Callable[[Tensor, Tensor], Tensor]
    minimizer: float
    box: tuple[float, float] | None = None

    def full_slope(self, x: Values) -> Values:
        """ℓ'(x), of the shape of x."""
        return self.slope(np.asarray(x, np.float64)[..., None], np.arange(self.n)).mean(-1)


@dataclass(frozen=True)
class PhaseDiagram:
    """
    Attributes:
        problem: Its name.
        beta1s, beta2s: The grid, [B1] and [B2].
        labels: "converged", "neighbourhood" or "diverged", [B1, B2]; see `phase_diagram`.
        final: Mean of x over the last tenth of the run, [B1, B2, seeds].
        curves: Mean of x over each hundredth of the run, [100, B1, B2, seeds], up to the steps `ends` [100].
    """

    problem: str
    beta1s: tuple[float, ...]
    beta2s: tuple[float, ...]
    labels: list[list[str]]
    final: Values
    curves: Values
    ends: Values

    def label(self, beta1: float, beta2: float) -> str:
        return self.labels[self.beta1s.index(beta1)][self.beta2s.index(beta2)]

    def critical_beta2(self, beta1: float) -> tuple[float | None, float | None]:
        """Largest β₂ of the grid at which the runs diverge, and the next one; None where there is none."""
        row = self.labels[self.beta1s.index(beta1)]
        last = max((i for i, label in enumerate(row) if label == DIVERGED), default=-1)
        return (self.beta2s[last] if last >= 0 else None, self.beta2s[last + 1] if last + 1 < len(row) else None)


def phase_diagram(
    problem: FiniteSum,
    beta1s: Sequence[float],
    beta2s: Sequence[float],
    *,
    steps: int = 50_000,
    seeds: int = 4,
    first_seed: int = 0,
    lr: float = 0.1,
    decay: float = 0.5,
    start: float = 1.0,
    order: str = "uniform",
    eps: float = 1e-8,
    tolerance: float = 0.05,
) -> PhaseDiagram:
    """Adam with bias correction and η_k = lr / k^decay on a grid of beta pairs, all runs at once.

    Divergence is slow, x grows as Σ η_k, so it is recognised by drift and not by overflow. With d the distance of x to
    the minimizer, averaged over a tenth of the run, and its median over seeds:

    - converged: d over the last tenth is at most `tolerance` for every seed;
    - diverged: the last d is above the distance at the start and has not come down since the middle of the run;
    - neighbourhood: anything else, also where erratic jumps leave no trend.

    All pairs see the same terms in the same order.

    Args:
        beta1s, beta2s: Ascending, each in [0, 1).
        seeds: Number of runs for each pair, of the seeds from `first_seed` on.
        order: "uniform" draws a term each step, "cyclic" takes them in turn, "shuffled" in a new order each epoch.
        eps: As in Adam; above about the size of a common gradient it hides the effect.
    """
    for name, betas in (("beta1s", beta1s), ("beta2s", beta2s)):
        for beta in betas:
            check_number(name, beta, least=0, below=1)
        if list(betas) != sorted(set(betas)):
            raise ValueError(f"`{name}` is {list(betas)}; give different values in ascending order")
    check_number("steps", steps, least=100)
    check_number("seeds", seeds, least=1)
    check_choice("order", order, ("uniform", "cyclic", "shuffled"))
    x = np.full((len(beta1s), len(beta2s), seeds), float(start))
    paths = adam_paths(
        problem.slope,
        index_samples(problem.n, seeds, order, first_seed),
        x,
        steps=steps,
        alpha=lambda t: lr * t**-decay,
        beta=np.asarray(beta1s, np.float64)[:, None, None],
        theta=np.asarray(beta2s, np.float64)[None, :, None],
        corrected=True,
        eps=eps,
        box=problem.box,
    )
    final = paths.means[-10:].mean(0)
    labels = _labels(paths, problem.minimizer, abs(start - problem.minimizer), tolerance)
    return PhaseDiagram(problem.name, tuple(beta1s), tuple(beta2s), labels, final, paths.means, paths.ends)


def index_samples(n: int, seeds: int, order: str = "uniform", first_seed: int = 0) -> Callable[[int], Any]:
    """`samples(k)` for `adam_paths`: indices of terms [k, seeds], each seed with its own stream."""
    streams = [np.random.default_rng([n, first_seed + seed]) for seed in range(seeds)]
    place = 0
    epoch: list[Any] = [None] * seeds

    def uniform(k: int) -> Any:
        return np.stack([stream.integers(n, size=k) for stream in streams], axis=1)

    def cyclic(k: int) -> Any:
        nonlocal place
        taken = (place + np.arange(k)) % n
        place += k
        return np.repeat(taken[:, None], seeds, axis=1)

    def shuffled(k: int) -> Any:
        nonlocal place
        taken = np.empty((k, seeds), dtype=np.int64)
        for j in range(k):
            if place % n == 0:
                epoch[:] = [stream.permutation(n) for stream in streams]
            taken[j] = [order[place % n] for order in epoch]
            place += 1
        return taken

    return {"uniform": uniform, "cyclic": cyclic, "shuffled": shuffled}[order]


def rescaled_beta2(beta2: float, batch_size: int, new_batch_size: int) -> float:
    """β₂ for another batch size, β₂^(new/old): it averages over as many examples as before.

    A rule of thumb: the theory asks only that 1 − β₂ be small against the reciprocal of the number of batches per
    epoch, so that smaller batches need a larger β₂, which this respects.
    """
    check_number("beta2", beta2, least=0, below=1)
    check_number("batch_size", batch_size, least=1)
    check_number("new_batch_size", new_batch_size, least=1)
    return beta2 ** (new_batch_size / batch_size)


def _labels(paths: Paths, minimizer: float, at_start: float, tolerance: float) -> list[list[str]]:
    last, middle = (np.abs(paths.means[part] - minimizer).mean(0) for part in (slice(-10, None), slice(45, 55)))
    near = (last <= tolerance).all(-1)
    last, middle = np.median(last, -1), np.median(middle, -1)
    away = (last > max(at_start, tolerance)) & (last >= 0.99 * middle)
    return np.where(near, CONVERGED, np.where(away, DIVERGED, NEIGHBOURHOOD)).tolist()
